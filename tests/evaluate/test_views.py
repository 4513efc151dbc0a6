"""Views against sums by hand, and the whole command on trained runs."""

import json
import math
import shutil
from itertools import pairwise

import numpy as np
import pytest
from alibi_lm.evaluate.analysis import SETTINGS, AnalyseConfig, analyse

import alibi_lm.evaluate.passes as passes_module
from alibi_lm.config import EvaluateConfig
from alibi_lm.distributed import World
from alibi_lm.evaluate import sweep, views
from alibi_lm.evaluate.passes import Passes
from alibi_lm.results.documents import change_sums, interval_ends, position_curve, positions_in_window
from alibi_lm.results.statistics import mean_nats_interval
from alibi_lm.study.analysis_data import read_analysis
from alibi_lm.study.analysis_figures import draw_analysis
from alibi_lm.study.analysis_tables import markdown

N, L = 400, 16
DOCUMENTS = np.array([0, 90, 200, 310])


@pytest.fixture
def group(tiny_model):
    """Two seeds of a small model over 400 tokens in 4 documents."""
    tokens = np.random.default_rng(0).integers(0, 50, N).astype(np.uint16)
    models = []
    for seed in range(2):
        model = tiny_model("sinusoidal", "sdpa", train_length=L)
        model.vocabulary.embedding.data.mul_(1 + seed)
        models.append(model)
    made = [Passes(lambda _, m=m: m, tokens, 7) for m in models]
    return views.Group("sinusoidal", L, ["run_s1", "run_s2"], made, DOCUMENTS)


def nats_of(group, length, stride=None):
    return np.stack([p.nats(length, stride) for p in group.passes]).astype(np.float64)


def test_perplexity_has_both_kinds_of_windows(group):
    points = views.perplexity(group, [8, 16, 32], 4)
    assert [(p["mode"], p["length"]) for p in points] == [
        (mode, n) for mode in ("nonoverlapping", "sliding") for n in (8, 16, 32)
    ]
    for point in points:
        nats = nats_of(group, point["length"], point["stride"])
        assert point["nats"] == pytest.approx(nats.mean(), rel=1e-9)
        assert list(point["by_run"].values()) == pytest.approx(nats.mean(axis=1).tolist(), rel=1e-9)
        own = nats_of(group, L, point["stride"])
        assert point["difference"]["nats"] == pytest.approx((nats - own).mean(), abs=1e-9)
        if point["length"] != L:
            both = np.stack([np.add.reduceat(n, DOCUMENTS) for n in nats - own])
            expected = mean_nats_interval(both, np.diff(DOCUMENTS, append=N))
            assert point["difference"]["low"] == pytest.approx(expected.low)
            assert point["difference"]["high"] == pytest.approx(expected.high)
    assert points[3]["nats"] != points[0]["nats"]


def test_a_stride_longer_than_a_window_is_no_value(group):
    assert views.perplexity(group, [2, 8], 4)[2]["reason"] == "stride = 4 is longer than the window"


def test_the_curve_is_the_mean_at_each_position(group):
    (point,) = views.position(group, [32])
    nats, positions = nats_of(group, 32).mean(axis=0), positions_in_window(N, 32)
    curve = point["curve"]
    assert curve["first"][0] == 1 and curve["last"][-1] == 32 and L in curve["last"]
    assert curve["first"][1:] == [last + 1 for last in curve["last"][:-1]]
    for first, last, mean, low, high in zip(
        *(curve[k] for k in ("first", "last", "nats", "low", "high")), strict=True
    ):
        chosen = (positions >= first) & (positions <= last)
        assert mean == pytest.approx(nats[chosen].mean(), abs=1e-6)
        assert low < mean < high


def test_a_level_shared_by_a_document_is_not_in_the_band(group):
    """Documents that differ in level alone have no uncertain shape."""
    documents = np.arange(0, 400, 16)  # whole windows, so that each document has each position once
    level = np.repeat(np.random.default_rng(0).normal(size=25), 16)
    curve = position_curve(3 + level, documents, positions_in_window(400, 16), 16, 4)
    np.testing.assert_allclose(curve["curve_low"], curve["curve_nats"], atol=1e-12)
    shape = 3 + level + np.tile(np.arange(16) / 10, 25) + np.random.default_rng(1).normal(size=400) / 10
    curve = position_curve(shape, documents, positions_in_window(400, 16), 16, 4)
    true = level.mean() + 3 + (curve["curve_first"] + curve["curve_last"] - 2) / 20
    assert (curve["curve_high"] - curve["curve_low"]).max() < 0.2
    assert ((curve["curve_low"] < true) & (true < curve["curve_high"])).mean() > 0.7


def test_a_change_of_the_same_targets_is_the_paired_difference():
    draw = np.random.default_rng(0)
    tokens = draw.integers(50, 500, 20)
    base, other = draw.normal(3, 1, (2, 3, 20)) * tokens
    found = change_sums(other, tokens, base, tokens)
    np.testing.assert_allclose(found.sum(axis=1), (other - base).sum(axis=1))
    assert interval_ends(found, tokens) == pytest.approx(interval_ends(other - base, tokens))


def test_a_change_between_other_targets_is_the_difference_of_the_means():
    draw = np.random.default_rng(0)
    tokens, base_tokens = draw.integers(50, 500, (2, 20))
    sums, base = draw.normal(3, 1, (1, 20)) * tokens, draw.normal(2, 1, (1, 20)) * base_tokens
    found = change_sums(sums, tokens, base, base_tokens)
    assert found.sum() / base_tokens.sum() == pytest.approx(
        sums.sum() / tokens.sum() - base.sum() / base_tokens.sum()
    )


@pytest.mark.parametrize("count", [1, 5])
def test_last_takes_the_end_of_whole_windows(group, count):
    points = views.last(group, [16, 48, 500, 4], count)
    for point, length in zip(points[:2], (16, 48), strict=True):
        chosen = [t for t in range(N // length * length) if t % length >= length - count]
        assert point["targets"] == len(chosen)
        assert point["nats"] == pytest.approx(nats_of(group, length)[:, chosen].mean(), rel=1e-9)
    assert "less than one window" in points[2]["reason"]
    assert ("longer than the window" in points[3].get("reason", "")) == (count == 5)


def test_documents_have_their_own_means(group):
    (point,) = views.documents(group, [32])
    nats = nats_of(group, 32).mean(axis=0)
    borders = [*DOCUMENTS, N]
    expected = [nats[a:b].mean() for a, b in pairwise(borders)]
    assert point["documents"] == pytest.approx(expected, abs=1e-6)


def test_seeds_that_agree_exactly_do_not_break_an_interval(group):
    point = group.point(np.zeros((2, 4)), np.array([1, 2, 3, 4]))
    assert point["nats"] == point["low"] == point["high"] == 0


def test_one_document_has_no_interval(group):
    point = group.point(np.array([[3.0, 0, 0, 0], [3.0, 0, 0, 0]]), np.array([2, 0, 0, 0]))
    assert point["nats"] == 1.5 and point["low"] is None


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def analysed(trained_runs, tmp_path_factory):
    """Every view of the trained runs, after an evaluation."""
    place = tmp_path_factory.mktemp("analysed")
    shutil.copytree(trained_runs / "outputs", place / "outputs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        list(sweep.evaluate(EvaluateConfig(experiment="smoke", device="cpu", threads=1), World()))
        scored = []
        patch.setattr(
            passes_module,
            "score_tokens",
            lambda *a, original=passes_module.score_tokens, **k: scored.append(a[3:5]) or original(*a, **k),
        )
        files = list(
            analyse(
                AnalyseConfig(view="all", experiment="smoke", stride=2, every=3, last=2, device="cpu", threads=1)
            )
        )
        for file in files:
            draw_analysis(file)
        first = len(scored)
        list(analyse(AnalyseConfig(view="decomposition", experiment="smoke", stride=2, device="cpu", threads=1)))
        assert len(scored) == first  # the second time nothing is left to compute
    assert (8, None) not in scored[:1]  # what the evaluation had computed is used
    return place / "outputs" / "smoke" / "analysis"


def test_every_view_is_written_with_figure_and_table(analysed):
    names = {path.name for path in analysed.iterdir()}
    assert names == {f"{view}.{kind}" for view in SETTINGS for kind in ("json", "png", "svg", "md")}
    for view in SETTINGS:
        assert (analysed / f"{view}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (analysed / f"{view}.svg").read_text()


def test_seeds_of_a_scheme_are_one_curve(analysed):
    found = read_analysis(analysed / "perplexity.json")
    assert [(s.position, s.runs) for s in found.series] == [
        ("alibi", ["alibi_L8_s1", "alibi_L8_s2"]),
        ("learned", ["learned_L8_s1"]),
    ]
    assert found.same_text and found.series[0].documents == 6


def test_values_are_those_of_the_evaluation(analysed):
    rows = [
        json.loads(line) for line in (analysed.parent / "extrapolation" / "results.jsonl").read_text().splitlines()
    ]
    nats = {(r["run"], r["inference_length"]): r["nats"] for r in rows if r["run"]}
    for series in read_analysis(analysed / "perplexity.json").series:
        for point in series.points:
            if point["mode"] == "nonoverlapping" and point["nats"] is not None:
                for run, mean in point["by_run"].items():
                    assert mean == pytest.approx(nats[run, point["length"]] / series.tokens, rel=1e-9)


def test_a_scheme_without_positions_says_why(analysed):
    for view in SETTINGS:
        learned = read_analysis(analysed / f"{view}.json").series[1]
        refused = [p for p in learned.points if p.get("reason")]
        assert refused
        for point in refused:
            assert "stride" in point["reason"] or point["reason"] == "position=learned has 8 positions"
        assert "position=learned has 8 positions" in (analysed / f"{view}.md").read_text() or view == "position"


def test_the_decomposition_table_has_nats_and_factors(analysed):
    (row,) = [
        line
        for line in markdown(analysed / "decomposition.json").splitlines()
        if line.startswith("| ALiBi | 8 | 16")
    ]
    terms = [cell.split() for cell in row.strip("| ").split(" | ")[3:]]
    total = float(terms[3][0])
    assert sum(float(cell[0]) for cell in terms[:3]) == pytest.approx(total, abs=2e-4)
    assert float(terms[3][-1].removeprefix("x")) == pytest.approx(math.exp(total), rel=2e-3)


def test_figures_are_the_same_bytes_from_the_same_data(analysed, tmp_path):
    for view in ("position", "decomposition"):
        shutil.copy(analysed / f"{view}.json", tmp_path)
        draw_analysis(tmp_path / f"{view}.json")
        for kind in ("png", "svg", "md"):
            assert (tmp_path / f"{view}.{kind}").read_bytes() == (analysed / f"{view}.{kind}").read_bytes()


def test_texts_that_differ_are_marked(analysed, tmp_path):
    content = json.loads((analysed / "last.json").read_text())
    content["series"][0]["corpus"] = "other"
    (tmp_path / "last.json").write_text(json.dumps(content))
    draw_analysis(tmp_path / "last.json")
    assert "NOT THE SAME TEXT" in (tmp_path / "last.md").read_text()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"view": "last"}'])
def test_damaged_data_is_named(tmp_path, content):
    (tmp_path / "last.json").write_text(content)
    with pytest.raises(ValueError, match=r"last\.json is no analysis"):
        draw_analysis(tmp_path / "last.json")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"view": "positions"}, "view = 'positions'. Allowed: perplexity, position"),
        (
            {"view": "position", "stride": 4},
            "stride = 4 has no effect with view=position. It belongs to view=perp",
        ),
        ({"view": "last", "contexts": [4]}, "contexts = .4. has no effect with view=last"),
        ({"view": "fixed", "every": 0}, "every = 0. Use a whole number >= 1"),
        ({"view": "offset", "offsets": [-1]}, "offsets = .-1.. Use whole numbers >= 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        AnalyseConfig(**settings)


def test_a_view_of_a_part_of_the_targets_says_so(analysed):
    for view in ("fixed", "offset"):
        found = read_analysis(analysed / f"{view}.json")
        (scored,) = {p["targets"] for one in found.series for p in one.points if p.get("targets")}
        assert f"{scored:,} of {found.series[0].tokens:,} tokens scored in " in found.provenance
    assert "scored" not in read_analysis(analysed / "position.json").provenance
