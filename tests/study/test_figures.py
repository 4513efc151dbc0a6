"""Figures and tables from result files alone: complete, the same each time, and honest about what differs."""

import itertools
import json
import math
from dataclasses import asdict, replace

import pytest
from matplotlib.figure import Figure
from study_rows import TOKENS, accuracy, analysis, curve, real_config, row, run_script, study, unigram, write_run

from alibi_lm.files import write_json
from alibi_lm.results.curves import Curve, View, by_byte, curves
from alibi_lm.results.rows import write_rows
from alibi_lm.study import fairness, plots
from alibi_lm.study.analysis import Series, read_analysis
from alibi_lm.study.evidence import Evidence, read_results
from alibi_lm.study.figures import (
    close_up,
    curve_figure,
    curve_panels,
    depth_panel,
    draw,
    memory_figure,
    missing,
    of_accuracies,
    split_into_panels,
)
from alibi_lm.study.labels import spread
from alibi_lm.study.pages import markdown
from alibi_lm.study.plots import MOST_WHISKERS, Line, Panel, draw_panel, hidden_under, length_ticks, limits_of
from alibi_lm.study.records import find_records
from alibi_lm.study.stages import stages_of
from alibi_lm.study.style import LOOKS, look
from alibi_lm.study.tables import results_page, view_table
from alibi_lm.study.view_figures import analysis_figure, analysis_page, line_panels, position_panels

PLAIN = View("validation", "nonoverlapping")


def texts(figure):
    return [item.get_text() for axis in figure.axes for item in axis.texts] + [t.get_text() for t in figure.texts]


def lines(axis, color):
    return [line for line in axis.lines if line.get_color() == color and len(line.get_xdata()) > 1]


def test_draw_writes_a_figure_per_view_and_the_same_bytes_again(tmp_path):
    rows = study(tmp_path) + curve("alibi", {64: 18.0}, mode="sliding", stride=8)
    write_rows(tmp_path / "results.jsonl", rows)
    stems = ("extrapolation", "extrapolation_validation_sliding8")
    names = {"table.md", *(f"{stem}.{kind}" for stem in stems for kind in ("png", "svg"))}
    assert {path.name for path in draw(tmp_path)} == names
    first = {name: (tmp_path / name).read_bytes() for name in names}
    assert first["table.md"].partition(b"## Differences")[0].count(b"\n## ") == 2
    assert first["extrapolation.png"].startswith(b"\x89PNG")
    assert b"<svg" in first["extrapolation.svg"] and b"dc:date" not in first["extrapolation.svg"]
    draw(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in names} == first
    assert {entry.name for entry in tmp_path.iterdir()} == names | {"results.jsonl"}


def test_memory_is_drawn_against_perplexity_if_caches_let_keys_go():
    def streamed(seed, cache, keys, perplexity, **changes):
        cached = {"mode": "stream", "changes": {"cache": cache}, "extra": {"keys_held": keys}}
        return row("alibi", 10_000, perplexity, seed=seed, **cached, **changes)

    own = [
        streamed(s, cache, keys * s, 20.0) for s in (1, 3) for cache, keys in (("proved", 300), ("certified", 50))
    ]
    other = streamed(1, "proved", 700, 19.0, suffix="_c0ffee00")
    words = {row.run: "" for row in own} | {other.run: "last_exponent 6"}
    assert memory_figure(own, words) is None  # a single model
    full = [streamed(1, "full", 10_000, 20.0), streamed(1, "full", 10_000, 19.0, suffix="_c0ffee00")]
    assert memory_figure(full, words) is None and memory_figure([row()], {}) is None

    (axis,) = (figure := memory_figure([*own, other], words)).axes
    points = {tuple(line.get_xdata()): list(line.get_ydata()) for line in axis.lines if len(line.get_xdata())}
    assert points[100, 600] == pytest.approx([20.0, 20.0]) and points[700,] == pytest.approx([19.0])
    assert "Each line, from left to right: cache=certified, cache=proved." in texts(figure)
    assert "last_exponent 6" in texts(figure)


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


def test_every_line_has_its_name_and_a_refused_scheme_says_where_it_ends(tmp_path):
    figure = curve_figure(study(tmp_path), PLAIN)
    assert {"ALiBi", "ALiBi L=32", "sinusoidal", "learned", "ends at 64"} <= set(texts(figure))
    learned = lines(figure.axes[0], look("learned").color)[0]
    assert list(learned.get_xdata()) == [32, 64]


def test_a_baseline_is_a_line_where_it_fits_and_words_where_it_would_squash_the_curves(tmp_path):
    rows = [row for row in study(tmp_path) if row.run is not None]
    near = curve_figure([*rows, unigram(170.0)], PLAIN).axes[0]
    assert "unigram baseline" in [text.get_text() for text in near.texts]
    assert any(line.get_ydata()[0] == pytest.approx(170.0) for line in near.lines)
    far = curve_figure([*rows, unigram(50_000.0)], PLAIN)
    assert "Out of range: unigram baseline, 5e+04." in texts(far) and far.axes[0].get_ylim()[1] < 1000


def test_training_lengths_that_curves_share_have_a_panel_and_strays_join_the_next_longer():
    def made(position, length):
        return Curve(position, length, "", {length: {"r": 1.0}})

    alibi = [made("alibi", n) for n in (32, 64, 256)]
    others = [made("sinusoidal", n) for n in (64, 128)] + [made("t5", 128)]
    panels = split_into_panels([*alibi, *others])
    assert [length for length, _ in panels] == [64, 128]
    assert [(c.position, c.train_length) for c in panels[0][1]] == [
        ("alibi", 32),
        ("alibi", 64),
        ("sinusoidal", 64),
    ]
    assert ("alibi", 256) in [(c.position, c.train_length) for c in panels[1][1]]
    assert [length for length, _ in split_into_panels(alibi)] == [None]


def drawn(**shapes):
    return [c for position, shape in shapes.items() for c in curves(curve(position, shape), PLAIN)]


def test_a_small_range_needs_one_linear_panel_only():
    (whole, near) = curve_panels(drawn(alibi={64: 20.0, 128: 19.0}, t5={64: 20.0, 128: 21.0}), 64, {})
    assert near is None and not whole.log_y


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


def test_labels_are_words_and_never_hashes(tmp_path):
    folder = tmp_path / "extrapolation"
    folder.mkdir()
    made = {"alibi_L64_s1": {}, "alibi_L64_s1_a1f069d5": dict(position__learned_slopes=True),
            "alibi_L64_s2_0f3a9c21": dict(measurements=["x"], seed=2)}  # fmt: skip
    rows = [r for name in made for r in curve("alibi", {64: 20.0, 128: 19.0}, run=name, seed=int(name[11]))]
    rows += [replace(r, changes={"position.scaling": "yarn"}) for r in rows[:2]]
    for name, changes in made.items():
        write_run(tmp_path / "runs", name, real_config("alibi", **changes))
    write_rows(folder / "results.jsonl", rows)
    text = markdown(results_page(read_results(folder)))
    for start in (
        "ALiBi | 64 | seeds 1, 2 |",
        "ALiBi (learned\\_slopes) | 64",
        "ALiBi (tested with scaling=yarn) | 64",
    ):
        assert f"| {start}" in text
    assert "a1f069d5" not in text.split("## Differences")[0] and "0f3a9c21" not in text


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
    reach = {"in_reach": 0.6, "beyond": 0.25, "items_beyond": 80}
    known = [accuracy("alibi", 64, 1.0), accuracy("alibi", 128, 0.7, extra=reach)]
    known += [
        accuracy("alibi", 64, 1.0, seed=2),
        accuracy("alibi", 128, 0.9, seed=2, extra=reach | {"beyond": 0.75}),
    ]
    grey = curve_panels(curves(known, view), 64, {})[0].behind
    assert [(line.x, line.y) for line in grey] == [([64.0, 128.0], [1.0, 0.6])] and not panel.behind
    text = markdown(results_page(Evidence(known)))
    assert "| a perfect reader of the last 64 |  |  |  | 0.600 |" in text
    assert "| ALiBi | 64 | seeds 1, 2 | 0.500 (" in text and "beyond the last L" in text
    several = [accuracy("alibi", 64, v, seed=s) for s, v in ((1, 0.8), (2, 0.9))]
    panel, _ = curve_panels(curves(several, view), 64, {})
    assert panel.lines[0].low < [0.3] and panel.lines[0].high == [1.0]  # two seeds say little of a third
    assert panel.lines[0].dots == [(64, 0.8), (64, 0.9)]


def test_a_map_of_depths_marks_what_the_last_tokens_give():
    shares = {n: {f"{k / 4}": 0.5 for k in range(5)} for n in (64, 128)}
    axis = Figure().subplots()
    depth_panel(axis, Curve("alibi", 64, "", {64: {"a": 0.5}, 128: {"a": 0.5}}, in_reach={128: 0.4}), shares)
    assert [(list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines] == [([0.5, 1.5], [2.5, 2.5])]
    assert len(axis.texts) == 10, "two of five depths are below the line at 128"
    many = {64: {f"{k / 48:.3f}": 0.5 for k in range(49)}}
    axis = Figure().subplots()
    depth_panel(axis, Curve("alibi", 64, "", {64: {"a": 0.5}}), many)
    assert not axis.texts and not axis.lines and len(axis.get_yticks()) <= 6


# ---- analyses


def series(position, values, at="length", length=64, **changes):
    """A series whose points are {x: (nats, low, high)}; the difference is from the training length."""
    base = values[length][0]
    points = []
    for x, (nats, low, high) in values.items():
        change = {"from": length, "nats": nats - base, "low": low - base, "high": high - base}
        points.append({at: x, "nats": nats, "low": low, "high": high, "difference": change, "targets": 100})
    return Series(position, length, [f"{position}_L{length}_s1"], points, "c0ffee", 1000, 9, **changes)


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


def test_dots_stay_at_their_line_and_too_many_lines_have_no_whiskers():
    def panel(count):
        one = Line(
            "alibi", "", [64.0, 128.0], [0.9, 0.5], low=[0.8, 0.4], high=[1.0, 0.6], dots=[(64, 0.8), (64, 1.0)]
        )
        return Panel([one] * count, y_label="accuracy")

    for count in (MOST_WHISKERS, MOST_WHISKERS + 1):
        axis = Figure().subplots()
        draw_panel(axis, panel(count))
        dots = [line.get_xdata() for line in axis.lines if line.get_marker() == "."]
        curves = [line.get_xdata() for line in axis.lines if line.get_color() == look("alibi").color]
        curves = [x for x in curves if len(x) == 2 and x[1] > 1.5 * x[0]]
        assert len(curves) == len(dots) == count
        assert all(own[0] == dot[0] == dot[1] for own, dot in zip(curves, dots, strict=True))
        whiskers = len(axis.collections)
        assert whiskers == (count if count <= MOST_WHISKERS else 0)
        assert max(x[0] for x in curves) / min(x[0] for x in curves) < 2**0.3
    assert (
        "table.md" in of_accuracies([panel(MOST_WHISKERS + 1)])[0] and "Whiskers" in of_accuracies([panel(3)])[0]
    )


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


def test_a_curve_under_another_one_is_drawn_wider():
    heights = {"rotary": [0.0, 1e-9, 0.0], "sinusoidal": [0.0, 0.3, 0.6], "alibi": [0.0, 0.0, 0.0]}
    lines = [Line(name, name, [0.0, 16.0, 32.0], y) for name, y in heights.items()]
    assert hidden_under(lines, (-0.1, 0.7), False) == [1, 0, 0]
    offset = [{"offset": x, "nats": y, "low": y, "high": y, "largest": 0.0} for x, y in ((0, 0.0), (16, 0.0))]
    members = [Series(name, 64, ["r"], offset, "c0ffee", 1000, 9) for name in ("rotary", "alibi")]
    axis = analysis_figure(analysis("offset", *members)).axes[0]
    widths = {line.get_color(): line.get_linewidth() for line in axis.lines if len(line.get_xdata()) == 2}
    assert widths[look("rotary").color] > 2 * widths[look("alibi").color]


def test_attention_is_drawn_as_heat_maps_and_as_curves():
    def at(length, weight):
        heads = [{"layer": k // 2, "head": k % 2, "weights": [weight, weight / 9]} for k in range(4)]
        return {"length": length, "nearest": [0, 8], "farthest": [7, 63], "heads": heads}

    near, far = at(64, 0.5), at(512, 0.25)
    members = [Series("alibi", 64, ["r"], [near, far], "c0ffee", 1000, 9),
               Series("learned", 64, ["s"], [{"length": 64, "reason": "no room"}], "c0ffee", 1000, 9)]  # fmt: skip
    first, last, both, refused = analysis_figure(analysis("attention", *members)).axes
    assert [a.images[0].get_array().max() for a in (first, last)] == [0.5, 0.25]
    drawn = [(line.get_linestyle(), line.get_ydata()[0]) for line in both.lines if len(line.get_ydata()) == 2]
    assert drawn[:8] == [("--", 0.5)] * 4 + [("-", 0.25)] * 4 and both.get_yscale() == "log"
    assert "no room" in [text.get_text() for text in refused.texts]
    for head in near["heads"]:
        head |= {"distance": 3.0, "entropy": 1.0, "first": 0.1}
    near |= {"sink_rate": 0, "numbers": {"distance": {"r": 3.0, "s": 4.0}, "near": {"r": 0.5}}}
    near |= {"bias_alone": {"distance": 3.25, "near": 0.75}}
    text = markdown(analysis_page(analysis("attention", replace(members[0], points=[near]), members[1])))
    assert "| ALiBi | 64 | 64 | 3.5 (3.25) | 0.5 (0.75) | - | 3, 3, 3 | 1, 1, 1 |" in text


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
        curve("alibi", {64: 20.0}),
        curve("alibi", {64: 20.0, 65: 20.0}),
        curve("alibi", {100: 20.0, 128: 1e4}, train=64) + curve("none", {100: 20.0}),
        [r for n in range(1, 5) for p in ("alibi", "t5") for r in curve(p, {n: 9.0, 99 * n: 30.0}, train=n)],
        curve("a $x_1$ & <b> scheme", {64: 20.0, 128: 21.0}, run="r&<$^$>"),
    ):
        curve_figure(rows, PLAIN).draw_without_rendering()


def test_many_labels_get_a_higher_panel_and_stay_inside():
    lines = [
        Line(f"scheme{k}", f"scheme{k}", [64.0, 128.0], [20.0, 20.0 + k / 99], "lr 0.002, steps 5")
        for k in range(25)
    ]
    figure = plots.build("title", [[Panel(lines, trained=64)]], "origin")
    places = [text.get_position()[1] for text in figure.axes[0].texts]
    assert len(places) == 50 and max(places) <= 1.0001 and min(places) >= 0


@pytest.mark.parametrize("values", [[31.0, 34.0], [498.9551, 498.9582], [-0.0031, 0.0029]], ids=str)
def test_the_name_of_the_axis_stays_in_the_picture_beside_long_numbers(values):
    panel = Panel([Line("alibi", "ALiBi", [64.0, 128.0], values)])
    figure = plots.build("Title", [[panel, panel]], "origin")
    figure.canvas.draw()
    boxes = [axis.yaxis.get_tightbbox() for axis in figure.axes]
    assert boxes[0].x0 > 0 and boxes[1].x0 > figure.axes[0].get_window_extent().x1


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


def test_an_unfair_comparison_is_marked_and_refused_when_strict(tmp_path):
    folder = tmp_path / "extrapolation"
    rows = study(folder)
    for name in {item.run for item in rows if item.run}:
        lr = 0.1 if name == "learned_L64_s1" else 0.002
        write_run(tmp_path / "runs", name, real_config(name.partition("_")[0], optimizer__lr=lr))
    page = markdown(results_page(read_results(folder)))
    assert "optimizer.lr: 0.002 in 3 runs; 0.1 in learned\\_L64\\_s1" in page
    failed = run_script("figures.py", f"folder={folder}", "strict=true")
    assert failed.returncode == 1 and "Traceback" not in failed.stderr
    assert "strict = true, and the runs differ in more than the scheme:\n  optimizer.lr: 0.002" in failed.stderr


def test_the_mark_is_on_the_picture(tmp_path):
    rows = curve("alibi", {64: 20.0}) + curve("t5", {64: 20.0}, corpus="facade")
    unfair = fairness.differences(rows, find_records(rows, tmp_path))
    found = texts(curve_figure(rows, PLAIN, unfair=unfair))
    assert any(text.startswith("NOT A FAIR COMPARISON: validation text (hash)") for text in found)


def test_the_papers_curve_is_dotted_beside_ours_on_request(tmp_path):
    rows = curve("alibi", {512: 19.0, 1024: 18.0}, train=512) + curve("none", {512: 21.0}, train=512)
    plain, with_paper = (curve_figure(rows, PLAIN, with_paper=wanted).axes[0] for wanted in (False, True))
    assert len(with_paper.lines) == len(plain.lines) + 1  # the paper has no curve of a scheme without positions
    drawn = [line for line in with_paper.lines if len(line.get_xdata()) > 30]
    assert drawn[0].get_color() == look("alibi").color and drawn[0].get_ydata()[0] == pytest.approx(19.73)


def test_the_script_finds_the_experiment_and_refuses_mistakes_without_a_traceback(tmp_path):
    folder = tmp_path / "outputs" / "mine" / "extrapolation"
    study(folder)
    (tmp_path / "base").mkdir()
    write_rows(tmp_path / "base" / "results.jsonl", [unigram()])
    points = [{"context": n, "nats": 3.0} for n in (64, 128)]
    fixed = Series("alibi", 64, ["alibi_L64_s1"], points, "c0ffee", TOKENS, 10)
    (tmp_path / "outputs" / "mine" / "analysis").mkdir()
    write_json(tmp_path / "outputs" / "mine" / "analysis" / "fixed.json", asdict(analysis("fixed", fixed)))
    done = run_script("figures.py", "experiment=mine", "paper=true", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "outputs/mine/analysis/fixed.md"
    assert (tmp_path / "outputs" / "mine" / "analysis" / "fixed.png").is_file()
    assert done.stdout.splitlines()[0] == "outputs/mine/extrapolation/extrapolation.png"
    drawn = (folder / "extrapolation.svg").read_bytes()
    draw(folder)
    assert (folder / "extrapolation.svg").read_bytes() != drawn, "the paper's curve is in it"
    for argument, message in [
        ("experiment=nope", "make eval-extrapolation EXPERIMENT=nope"),
        ("folder=[odd", "[odd/results.jsonl does not exist"),
        ("paper=perhaps", "paper = perhaps. Use true or false"),
        ("lenghts=3", "'lenghts=3' is not a setting here"),
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
    assert len({item.name for item in LOOKS.values()}) == len(LOOKS)
    assert look("brand_new") == look("brand_new") and look("brand_new").color != look("another_new").color


def test_a_task_has_ticks_where_it_was_asked():
    rows = [accuracy("alibi", n, value) for n, value in ((50, 1.0), (100, 0.9), (150, 0.8))]
    axis = curve_figure(rows, View("validation", "items", None, "copy", "accuracy")).axes[0]
    assert list(axis.get_xticks()) == [50, 100, 150]
