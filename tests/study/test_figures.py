"""Figures and tables from result files alone: complete, the same each time, and honest about what differs."""

import json
import math
from dataclasses import replace

import pytest
from study_rows import accuracy, curve, real_config, row, run_script, study, unigram, write_run

from alibi_lm.results.curves import View, by_byte, curves
from alibi_lm.results.rows import write_rows
from alibi_lm.study import fairness
from alibi_lm.study.analysis import Analysis, Series, read_analysis
from alibi_lm.study.evidence import Evidence
from alibi_lm.study.figures import close_up, curve_figure, curve_panels, draw, missing, split_into_panels
from alibi_lm.study.pages import markdown
from alibi_lm.study.plots import limits_of
from alibi_lm.study.records import find_records
from alibi_lm.study.stages import stages_of
from alibi_lm.study.style import LOOKS, look
from alibi_lm.study.tables import results_page, view_table
from alibi_lm.study.view_figures import analysis_figure, line_panels, position_panels

PLAIN = View("validation", "nonoverlapping")


def texts(figure):
    return [item.get_text() for axis in figure.axes for item in axis.texts] + [t.get_text() for t in figure.texts]


def lines(axis, color):
    return [line for line in axis.lines if line.get_color() == color and len(line.get_xdata()) > 1]


def test_draw_writes_a_figure_per_view_and_the_same_bytes_again(tmp_path):
    rows = study(tmp_path) + curve("alibi", {64: 18.0}, mode="sliding", stride=8)
    write_rows(tmp_path / "results.jsonl", [*rows, *curve("alibi", {64: 21.0}, split="test")])
    stems = [f"extrapolation{view}" for view in ("", "_validation_sliding8", "_test_nonoverlapping")]
    names = {"table.md", *(f"{stem}.{kind}" for stem in stems for kind in ("png", "svg"))}
    assert {path.name for path in draw(tmp_path)} == names
    first = {name: (tmp_path / name).read_bytes() for name in names}
    assert first["extrapolation.png"].startswith(b"\x89PNG")
    assert b"<svg" in first["extrapolation.svg"] and b"dc:date" not in first["extrapolation.svg"]
    draw(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in names} == first
    assert {entry.name for entry in tmp_path.iterdir()} == names | {"results.jsonl"}


def test_lines_hold_the_rows_values(tmp_path):
    rows = study(tmp_path, seeds=(1, 2))
    whole, near = curve_figure(rows, PLAIN).axes
    assert whole.get_yscale() == "log" and near.get_yscale() == "linear"
    for axis in (whole, near):
        assert axis.get_xscale() == "log"
        drawn = lines(axis, look("sinusoidal").color)[0]
        expected = [v * math.sqrt(1.01 * 1.02) for v in (22.5, 20.5, 40.0, 160.0)]
        assert list(drawn.get_xdata()) == [32, 64, 128, 512]
        assert list(drawn.get_ydata()) == pytest.approx(expected)
        # the training length is a vertical line
        assert any(list(line.get_xdata()) == [64, 64] for line in axis.lines)
    assert whole.get_ylim()[1] > 160 > near.get_ylim()[1] > 22.5


def test_a_baseline_is_a_line_where_it_fits_and_words_where_it_would_squash_the_curves(tmp_path):
    rows = [row for row in study(tmp_path) if row.run is not None]
    near = curve_figure([*rows, unigram(170.0)], PLAIN).axes[0]
    assert "unigram baseline" in [text.get_text() for text in near.texts]
    assert any(line.get_ydata()[0] == pytest.approx(170.0) for line in near.lines)
    far = curve_figure([*rows, unigram(50_000.0)], PLAIN)
    assert "Out of range: unigram baseline, 5e+04." in texts(far) and far.axes[0].get_ylim()[1] < 1000


def drawn(**shapes):
    return [c for position, shape in shapes.items() for c in curves(curve(position, shape), PLAIN)]


def test_a_bad_run_does_not_take_the_close_up_with_it():
    found = drawn(alibi={64: 20.0, 128: 19.0}, t5={64: 21.0, 128: 22.0}, rotary={64: 9000.0, 128: 9e5})
    low, high = close_up(found)
    assert 18.0 < low < 19.0 and 21.0 < high < 25.0
    whole, near = curve_panels(found, 64, {})
    assert whole.log_y and near.title == "trained at 64, close-up; above it: rotary"
    # all alike and all rising: a close-up would show the same again
    assert close_up(drawn(alibi={64: 20.0, 128: 40.0}, t5={64: 29.9, 128: 41.0})) is None


def test_what_is_not_drawn_is_named_with_its_reason():
    rows = curve("alibi", {64: 20.0, 128: 19.0})
    rows.append(row(length=99_999, perplexity=20.0, reason="no window is full: the text has 10,000 tokens"))
    rows.append(row("t5", perplexity=None, nats=5306.0 * 10_000, reason="exp(5306) is too large for a number"))
    rows += [
        row("rotary", perplexity=20.0),
        row("rotary", perplexity=None, seed=2, reason="the sum of nats is nan"),
    ]
    found = curves(rows, PLAIN)
    assert missing(found) == [
        "Not drawn: ALiBi at 99999: no window is full: the text has 10,000 tokens.",
        "A run is missing: rotary at 64: the sum of nats is nan.",
        "Not drawn: T5 bias at 64: exp(5306) is too large for a number.",
    ]
    figure = curve_figure(rows, PLAIN)
    assert max(x for line in figure.axes[0].lines for x in line.get_xdata() if x != 1) <= 128
    assert all(line in " ".join(texts(figure)) for line in missing(found))
    table = markdown([view_table(rows, PLAIN)])
    assert "| ALiBi | 64 | seed 1 | **20.00** | 19.00 (0.95) | - [1] |" in table
    assert "| rotary | 64 | seeds 1, 2 | 20.00 [2] |" in table and "[3] exp(5306) is too large" in table


def test_a_ring_has_a_key_and_two_points_have_their_numbers():
    rows = curve("alibi", {32: 22.0, 64: 21.0}, train=32) + curve("alibi", {32: 23.0, 64: 20.0})
    rows += curve("t5", {32: 23.5, 64: 20.5})
    ((whole, _),) = [curve_panels(members, n, {}) for n, members in split_into_panels(curves(rows, PLAIN))]
    rings = {line.name: line.ring for line in whole.lines}
    assert rings == {"ALiBi": None, "ALiBi L=32": (32, pytest.approx(22.0)), "T5 bias": None}
    assert {line.note for line in whole.lines} == {"23 to 20", "22 to 21", "23.5 to 20.5"}
    assert "Ring: the length that a curve was trained at." in texts(curve_figure(rows, PLAIN))
    long = curves(curve("alibi", {32: 22.0, 64: 21.0, 128: 20.0}), PLAIN)
    assert curve_panels(long, 64, {})[0].lines[0].note == ""


def test_accuracy_is_drawn_on_its_own_scale_with_wilson_intervals():
    rows = [accuracy("alibi", n, v) for n, v in ((64, 1.0), (128, 0.9), (256, 0.5))] + [
        accuracy("learned", 128, None)
    ]
    view = View("validation", "items", None, "copy", "accuracy")
    panel, nothing = curve_panels(curves(rows, view), 64, {})
    assert nothing is None and not panel.log_y and panel.y_label == "accuracy" and panel.limits == (-0.03, 1.03)
    line = panel.lines[0]
    assert line.y == [1.0, 0.9, 0.5] and line.low[1] == pytest.approx(0.8506, abs=1e-3) and line.high[0] == 1.0
    figure = curve_figure(rows, view)
    assert "Accuracy of copy by inference length" in texts(figure)
    cells = "1.000 (0.98-1.00) | 0.900 (0.85-0.93) | 0.500 (0.43-0.57)"
    assert f"| ALiBi | 64 | seed 1 | {cells} |" in markdown([view_table(rows, view)])
    several = [accuracy("alibi", 64, v, seed=s) for s, v in ((1, 0.8), (2, 0.9))]
    panel, _ = curve_panels(curves(several, view), 64, {})
    assert panel.lines[0].low < [0.3] and panel.lines[0].high == [1.0]  # two seeds say little of a third
    assert panel.lines[0].dots == [(64, 0.8), (64, 0.9)]


# ---- analyses


def series(position, values, at="length", length=64, **changes):
    """A series whose points are {x: (nats, low, high)}; the difference is from the training length."""
    base = values[length][0]
    points = []
    for x, (nats, low, high) in values.items():
        change = {"from": length, "nats": nats - base, "low": low - base, "high": high - base}
        points.append({at: x, "nats": nats, "low": low, "high": high, "difference": change, "targets": 100})
    return Series(position, length, [f"{position}_L{length}_s1"], points, "c0ffee", 1000, 9, **changes)


def analysis(view, *members):
    return Analysis(view, "mine", "validation", {"c0ffee": "a text"}, "abc1234", list(members))


def test_intervals_are_whiskers_that_leave_the_curves_readable():
    steady = series("alibi", {64: (3.0, 3.0, 3.0), 128: (2.99, 2.98, 3.0)}, "context")
    wild = series("rotary", {64: (3.0, 3.0, 3.0), 128: (3.9, 0.1, 9.0)}, "context")
    whole, near = line_panels(analysis("fixed", steady, wild))
    assert [line.low != [] for line in whole.lines] == [True, True]
    low, high = limits_of(whole, whole.lines)
    values = [v for line in whole.lines for v in line.y]
    assert (high / low) < (max(values) / min(values)) ** 3.5  # e^9 would leave the curves a line at the bottom
    assert [line.low != [] for line in near.lines] == [True, False]  # what leaves the close-up hides nothing there
    assert near.limits[1] < 25


def test_every_curve_has_its_own_panel_by_position():
    def positions(position, nats):
        bins = {"first": [1, 2, 65], "last": [1, 64, 128], "nats": nats}
        bins |= {"low": [v - 0.5 for v in nats], "high": [v + 0.5 for v in nats]}
        point = {"length": 128, "nats": 3.0, "curve": bins}
        return Series(position, 64, ["r"], [point], "c0ffee", 1000, 9)

    members = [positions(name, [4.0, 3.0, 3.0 + k]) for k, name in enumerate(("alibi", "rotary", "t5", "none"))]
    panels = position_panels(analysis("position", *members))
    assert len(panels) == 4 and len({panel.limits for panel in panels}) == 1
    assert all(len(panel.lines) == 1 and len(panel.behind) == 3 and panel.band for panel in panels)
    assert panels[0].lines[0].x[1] == pytest.approx(math.sqrt(2 * 64))
    assert len(analysis_figure(analysis("position", *members)).axes) == 4


def test_a_text_of_one_document_has_no_intervals_and_says_why():
    one = Series("alibi", 64, ["r"], [{"length": 64, "nats": 3.0, "low": None, "high": None}], "c0ffee", 1000, 1)
    found = analysis("last", one).provenance
    assert "no intervals" in found and "single one" in found and "95%" not in found
    assert "95% intervals" in analysis("last", replace(one, documents=2)).provenance


def test_variants_of_an_analysis_are_told_apart_by_their_settings(tmp_path):
    (tmp_path / "analysis").mkdir()
    names = {"alibi_L64_s1": {}, "alibi_L64_s1_a1f069d5": dict(position__learned_slopes=True)}
    found = []
    for name, changes in names.items():
        write_run(tmp_path / "runs", name, real_config("alibi", **changes))
        one = vars(series("alibi", {64: (3.0, 2.9, 3.1), 128: (3.0, 2.9, 3.1)}))
        found.append(one | {"runs": [name], "variant": name[13:]})
    path = tmp_path / "analysis" / "last.json"
    content = dict(view="last", experiment="mine", split="validation", corpora={"c0ffee": "a"}, commit=None)
    path.write_text(json.dumps(content | {"series": found}))
    assert [one.variant for one in read_analysis(path).series] == ["", "learned_slopes"]
    assert [line.note for line in line_panels(read_analysis(path))[0].lines] == ["", "learned_slopes"]


def test_odd_studies_are_drawn_too():
    for rows in (
        curve("learned", {64: None, 128: None}),
        curve("alibi", {64: 20.0, 65: 20.0}),
        curve("alibi", {100: 20.0, 128: 1e4}, train=64) + curve("none", {100: 20.0}),
        [r for n in range(1, 5) for p in ("alibi", "t5") for r in curve(p, {n: 9.0, 99 * n: 30.0}, train=n)],
        curve("a $x_1$ & <b> scheme", {64: 20.0, 128: 21.0}, run="r&<$^$>"),
    ):
        curve_figure(rows, PLAIN).draw_without_rendering()


def test_the_table_shows_value_ratio_refusal_and_origin(tmp_path):
    text = markdown([view_table(study(tmp_path), PLAIN)])
    assert "| sinusoidal | 64 | seed 1 | 22.73 (1.10) | **20.71** | 40.40 (1.95) | 161.60 (7.80) |" in text
    assert "| learned | 64 | seed 1 | 23.23 (1.10) | **21.21** | - [1] | - [1] |" in text
    assert "[1] positions end at 64" in text
    assert "| unigram baseline |  |  | 500.00 | 500.00 | 500.00 | 500.00 |" in text
    whole = markdown(results_page(Evidence(study(tmp_path))))
    assert "corpus (c0ffee); 10,000 tokens scored; one seed; commit abc1234" in whole


def test_text_from_files_cannot_break_the_table():
    rows = curve("alibi", {64: 20.0, 128: None}, reason="a|b\nc <script>", run="x|y*z")
    text = markdown(results_page(Evidence(rows)))
    assert "a\\|b c \\<script\\>" in text and "x\\|y\\*z" in text and "<script>" not in text.replace("\\<", "")


def test_the_script_finds_the_experiment_and_refuses_mistakes_without_a_traceback(tmp_path):
    study(tmp_path / "outputs" / "mine" / "extrapolation")
    (tmp_path / "base").mkdir()
    write_rows(tmp_path / "base" / "results.jsonl", [unigram()])
    done = run_script("figures.py", "experiment=mine", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "outputs/mine/extrapolation/extrapolation.png"
    for argument, message in [
        ("experiment=nope", "make eval-extrapolation EXPERIMENT=nope"),
        ("folder=[odd", "[odd/results.jsonl does not exist"),
        ("lenghts=3", "'lenghts=3' is no setting here"),
        ("folder=.", "results.jsonl does not exist. Or give folder="),
        ("folder=base", "holds no row of a run"),
    ]:
        failed = run_script("figures.py", argument, cwd=tmp_path)
        assert failed.returncode == 1 and message in failed.stderr and "Traceback" not in failed.stderr


def test_stages_of_training_have_a_figure_and_a_table_and_leave_the_curves_alone(tmp_path):
    rows = []
    for step, far in ((100, 20.0), (200, 30.0), (300, 44.0)):
        changes = {} if step == 300 else {"checkpoint": f"step:{step}"}
        for seed in (1, 2):
            rows += curve("alibi", {64: 20.0, 128: far, 512: far}, seed=seed, changes=changes)
    write_rows(tmp_path / "results.jsonl", rows)
    for seed in (1, 2):
        write_run(tmp_path / "runs", f"alibi_L64_s{seed}", "steps: 300")
    drawn = [path.name for path in draw(tmp_path)]
    assert {"stages.png", "stages.svg", "extrapolation.png"} <= set(drawn)
    table = (tmp_path / "table.md").read_text()
    assert "| ALiBi | 64 | 2 L | 1.000 | 1.500 | 2.200 |" in table and "tested with" not in table
    records = find_records(rows, tmp_path)
    assert [factor for factor, _ in stages_of(rows, records)] == [2, 8]
    assert stages_of([r for r in rows if r.changes != {"checkpoint": "step:100"}], records) == []
    assert not [d for d in fairness.differences(rows, records) if d.matters]


def test_models_with_different_tokenizers_stand_on_one_axis(tmp_path):
    """The same text in 10,000 tokens of one tokenizer and 20,000 of another."""
    rows = curve("alibi", {64: 20.0, 128: 22.0}) + curve("gpt2", {64: 5.0, 128: 4.0}, corpus="beef", tokens=20_000)
    write_rows(tmp_path / "results.jsonl", rows)
    names = {path.name for path in draw(tmp_path)}
    assert {"bits_per_byte.png", "extrapolation.png"} <= names
    assert "NOT A FAIR" in (tmp_path / "extrapolation.svg").read_text(), "perplexities per token do not compare"
    assert "NOT A FAIR" not in (tmp_path / "bits_per_byte.svg").read_text()
    view = View("validation", "nonoverlapping", metric="bits_per_byte")
    found = {c.position: [c.value(n) for n in c.lengths] for c in curves(by_byte(rows, PLAIN), view)}
    texts_of = ((10_000, 20), (10_000, 22), (20_000, 5), (20_000, 4))
    bits = [tokens * math.log2(value) / 50_000 for tokens, value in texts_of]
    assert found == {"alibi": pytest.approx(bits[:2]), "gpt2": pytest.approx(bits[2:])}
    other = [replace(row, bytes=60_000) if row.position == "gpt2" else row for row in rows]
    assert not by_byte(other, PLAIN) and not by_byte(rows[:2], PLAIN), "another text, one tokenizer"


def test_looks_are_distinct():
    assert len({(item.color, item.marker) for item in LOOKS.values()}) == len(LOOKS)
    assert look("brand_new") == look("brand_new") and look("brand_new").color != look("another_new").color
