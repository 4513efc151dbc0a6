"""Figures and tables from result files alone: complete, the same each time, and honest about what differs."""

import itertools
import math

import pytest
from study_rows import curve, run_script, study, unigram, write_run

from alibi_lm.results.curves import Curve, View, curves
from alibi_lm.results.rows import write_rows
from alibi_lm.study.axes import length_ticks, spread
from alibi_lm.study.figures import build_figure, draw, needs_close_up, split_into_panels
from alibi_lm.study.style import LOOKS, look
from alibi_lm.study.tables import markdown, view_table

PLAIN = View("validation", "nonoverlapping")


def texts(figure):
    return [item.get_text() for axis in figure.axes for item in axis.texts] + [t.get_text() for t in figure.texts]


def lines(axis, color):
    return [line for line in axis.lines if line.get_color() == color and len(line.get_xdata()) > 1]


def test_draw_writes_the_documented_files_and_the_same_bytes_again(tmp_path):
    study(tmp_path)
    names = {"extrapolation.png", "extrapolation.svg", "table.md"}
    assert {path.name for path in draw(tmp_path)} == names
    first = {name: (tmp_path / name).read_bytes() for name in names}
    assert first["extrapolation.png"].startswith(b"\x89PNG")
    assert b"<svg" in first["extrapolation.svg"] and b"dc:date" not in first["extrapolation.svg"]
    draw(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in names} == first
    assert {entry.name for entry in tmp_path.iterdir()} == names | {"results.jsonl"}


def test_other_modes_and_splits_are_drawn_apart(tmp_path):
    rows = curve("alibi", {64: 20.0, 128: 19.0}) + curve("alibi", {64: 18.0}, mode="sliding", stride=8)
    write_rows(tmp_path / "results.jsonl", [*rows, *curve("alibi", {64: 21.0}, split="test")])
    assert {path.name for path in draw(tmp_path) if path.suffix == ".png"} == {
        "extrapolation.png",
        "extrapolation_validation_sliding8.png",
        "extrapolation_test_nonoverlapping.png",
    }
    assert (tmp_path / "table.md").read_text().count("\n## ") == 3


def test_lines_hold_the_rows_values(tmp_path):
    rows = study(tmp_path, seeds=(1, 2))
    figure = build_figure(rows, PLAIN)
    whole, close_up = figure.axes
    assert whole.get_yscale() == "log" and close_up.get_yscale() == "linear"
    for axis in figure.axes:
        assert axis.get_xscale() == "log"
        drawn = lines(axis, look("sinusoidal").color)[0]
        expected = [v * math.sqrt(1.01 * 1.02) for v in (22.5, 20.5, 40.0, 160.0)]
        assert list(drawn.get_xdata()) == [32, 64, 128, 512]
        assert list(drawn.get_ydata()) == pytest.approx(expected)
        # the training length is a vertical line
        assert any(list(line.get_xdata()) == [64, 64] for line in axis.lines)
    assert whole.get_ylim()[1] > 160 > close_up.get_ylim()[1] > 22.5


def test_every_line_has_its_name_and_a_refused_scheme_says_where_it_ends(tmp_path):
    found = texts(build_figure(study(tmp_path), PLAIN))
    for name in ("ALiBi", "ALiBi L=32", "sinusoidal", "learned", "ends at 64"):
        assert name in found
    learned = lines(build_figure(study(tmp_path), PLAIN).axes[0], look("learned").color)[0]
    assert list(learned.get_xdata()) == [32, 64]


def test_a_baseline_is_a_line_where_it_fits_and_words_where_it_would_squash_the_curves(tmp_path):
    rows = [row for row in study(tmp_path) if row.run is not None]
    near = build_figure([*rows, unigram(170.0)], PLAIN).axes[0]
    assert "unigram baseline" in [text.get_text() for text in near.texts]
    assert any(line.get_ydata()[0] == pytest.approx(170.0) for line in near.lines)
    far = build_figure([*rows, unigram(50_000.0)], PLAIN).axes[0]
    assert "unigram baseline 5e+04, above" in [text.get_text() for text in far.texts]
    assert far.get_ylim()[1] < 1000


def test_small_ranges_need_one_linear_panel_only():
    rows = curve("alibi", {64: 20.0, 128: 19.0}) + curve("t5", {64: 20.0, 128: 21.0})
    (axis,) = build_figure(rows, PLAIN).axes
    assert axis.get_yscale() == "linear"


def test_training_lengths_that_curves_share_have_a_panel_and_strays_join_the_next_longer():
    def made(position, length):
        return Curve(position, length, "", {length: {"r": 1.0}})

    alibi = [made("alibi", n) for n in (32, 64, 256)]
    others = [made("sinusoidal", n) for n in (64, 128)] + [made("t5", 128)]
    panels = split_into_panels([*alibi, *others])
    assert [panel.train_length for panel in panels] == [64, 128]
    assert [(c.position, c.train_length) for c in panels[0].curves] == [
        ("alibi", 32),
        ("alibi", 64),
        ("sinusoidal", 64),
    ]
    assert ("alibi", 256) in [(c.position, c.train_length) for c in panels[1].curves]
    assert [panel.train_length for panel in split_into_panels(alibi)] == [None]


def test_close_up_comes_with_a_wide_range_only():
    shapes = {"alibi": {64: 20.0, 128: 19.0}, "rotary": {64: 20.0, 128: 45.0}}
    panel = split_into_panels([c for p, s in shapes.items() for c in curves(curve(p, s), PLAIN)])[0]
    assert needs_close_up(panel)
    assert not needs_close_up(split_into_panels(curves(curve("alibi", shapes["alibi"]), PLAIN))[0])


@pytest.mark.parametrize(
    "rows",
    [
        curve("learned", {64: None, 128: None}),
        curve("alibi", {64: 20.0}),
        curve("alibi", {64: 20.0, 65: 20.0}),
        curve("alibi", {100: 20.0, 128: 1e4}, train=64) + curve("none", {100: 20.0}),
        [r for n in range(1, 7) for p in ("alibi", "t5") for r in curve(p, {n: 9.0, 99 * n: 30.0}, train=n)],
        curve("a $x_1$ & <b> scheme", {64: 20.0, 128: 21.0}, run="r&<$^$>"),
    ],
    ids=["all refused", "one point", "a hair apart", "none at the training length", "6 panels", "odd names"],
)
def test_odd_studies_are_drawn_too(rows, tmp_path):
    write_rows(tmp_path / "results.jsonl", rows)
    assert (draw(tmp_path)[0]).stat().st_size > 3000


def test_looks_are_distinct_and_do_not_depend_on_company():
    looks = list(LOOKS.values())
    assert len({item.color for item in looks}) == len({item.marker for item in looks}) == len(looks)
    assert look("brand_new") == look("brand_new") and look("brand_new").name == "brand_new"
    assert look("brand_new").color != look("another_new").color


def test_labels_keep_their_order_and_distance():
    assert spread([0.1, 0.5, 0.9], 0.05) == pytest.approx([0.1, 0.5, 0.9])
    assert spread([0.5, 0.5, 0.5], 0.1) == pytest.approx([0.4, 0.5, 0.6])
    places = spread([0.1, 0.11, 0.12, 0.3, 0.31], 0.04)
    assert all(b - a >= 0.04 - 1e-12 for a, b in itertools.pairwise(places))


def test_ticks_are_the_training_length_times_powers_of_two():
    assert length_ticks(32, 1024, 64) == [32, 64, 128, 256, 512, 1024]
    assert length_ticks(512, 15512, 512) == [512, 1024, 2048, 4096, 8192]
    assert length_ticks(3072, 3172, 3072) == [3072, 3172]
    assert len(length_ticks(1, 2**20, 64)) <= 10


def test_the_table_shows_value_ratio_refusal_and_origin(tmp_path):
    text = view_table(study(tmp_path), PLAIN).markdown()
    assert "| sinusoidal | 64 | 1 | 22.73 (1.10) | **20.71** | 40.40 (1.95) | 161.60 (7.80) |" in text
    assert "| learned | 64 | 1 | 23.23 (1.10) | **21.21** | - [1] | - [1] |" in text
    assert "[1] positions end at 64" in text
    assert "| unigram baseline |  |  | 500.00 | 500.00 | 500.00 | 500.00 |" in text
    whole = (tmp_path / "table.md").read_text() if draw(tmp_path) else ""
    assert "corpus (c0ffee); 10,000 tokens scored; one seed; commit abc1234" in whole


def test_text_from_files_cannot_break_the_table():
    rows = curve("alibi", {64: 20.0, 128: None}, reason="a|b\nc <script>", run="x|y*z")
    text = markdown(rows)
    assert "a\\|b c \\<script\\>" in text and "x\\|y\\*z" in text and "<script>" not in text.replace("\\<", "")


def test_an_unfair_comparison_is_marked_and_refused_when_strict(tmp_path):
    folder = tmp_path / "extrapolation"
    rows = study(folder)
    draw(folder, strict=True)
    for name in {item.run for item in rows if item.run}:
        lr = "0.1" if name == "learned_L64_s1" else "0.002"
        write_run(tmp_path / "runs", name, f"optimizer:\n  lr: {lr}\nposition:\n  name: {name}\n")
    draw(folder)
    assert "optimizer.lr: 0.002 in 3 runs; 0.1 in learned\\_L64\\_s1" in (folder / "table.md").read_text()
    with pytest.raises(
        ValueError, match=r"(?s)strict = true.*optimizer\.lr: 0\.002 in 3 runs; 0\.1 in learned_L64_s1"
    ):
        draw(folder, strict=True)


def test_the_mark_is_on_the_picture(tmp_path):
    rows = curve("alibi", {64: 20.0}) + curve("t5", {64: 20.0}, corpus="facade")
    from alibi_lm.study.fairness import differences

    found = texts(build_figure(rows, PLAIN, differences(rows, tmp_path)))
    assert any(text.startswith("NOT A FAIR COMPARISON: validation text (hash)") for text in found)


def test_the_papers_curve_is_dotted_beside_ours_on_request(tmp_path):
    rows = curve("alibi", {512: 19.0, 1024: 18.0}, train=512) + curve("none", {512: 21.0}, train=512)
    plain = build_figure(rows, PLAIN).axes[0]
    with_paper = build_figure(rows, PLAIN, with_paper=True).axes[0]
    more = len(with_paper.lines) - len(plain.lines)
    assert more == 1  # the paper has no curve of a scheme without positions
    drawn = [line for line in with_paper.lines if len(line.get_xdata()) > 30]
    assert drawn[0].get_color() == look("alibi").color and drawn[0].get_ydata()[0] == pytest.approx(19.73)


def test_no_rows_or_no_runs_is_a_clear_error(tmp_path):
    with pytest.raises(ValueError, match="does not exist; evaluate first"):
        draw(tmp_path)
    write_rows(tmp_path / "results.jsonl", [unigram()])
    with pytest.raises(ValueError, match="holds no row of a run"):
        draw(tmp_path)


def test_the_script_finds_the_experiment_and_refuses_mistakes_without_a_traceback(tmp_path):
    study(tmp_path / "outputs" / "mine" / "extrapolation")
    done = run_script("figures.py", "experiment=mine", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "outputs/mine/extrapolation/extrapolation.png"
    for argument, message in [
        ("experiment=nope", "make eval-extrapolation EXPERIMENT=nope"),
        ("folder=[odd", "[odd/results.jsonl does not exist"),
        ("paper=perhaps", "paper = perhaps; it must be true or false"),
        ("lenghts=3", "'lenghts=3' is no setting here"),
    ]:
        failed = run_script("figures.py", argument, cwd=tmp_path)
        assert failed.returncode == 1 and message in failed.stderr and "Traceback" not in failed.stderr
