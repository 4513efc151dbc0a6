"""Views against sums by hand."""

from itertools import pairwise

import numpy as np
import pytest

from alibi_lm.data.windows import positions_in_window
from alibi_lm.evaluate import views
from alibi_lm.evaluate.passes import Passes
from alibi_lm.evaluate.views import change_sums, curve_edges, position_curve
from alibi_lm.results.statistics import mean_nats_interval
from alibi_lm.tasks.text import TextTask

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
        model.label = f"run_s{seed + 1}"
        models.append(model)
    text = TextTask(tokens, 7, documents=DOCUMENTS)
    return views.Group("sinusoidal", L, [Passes(model, text) for model in models])


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
    np.testing.assert_allclose(curve["low"], curve["nats"], atol=1e-12)
    shape = 3 + level + np.tile(np.arange(16) / 10, 25) + np.random.default_rng(1).normal(size=400) / 10
    curve = position_curve(shape, documents, positions_in_window(400, 16), 16, 4)
    true = level.mean() + 3 + (curve["first"] + curve["last"] - 2) / 20
    assert (curve["high"] - curve["low"]).max() < 0.2
    assert ((curve["low"] < true) & (true < curve["high"])).mean() > 0.7


def test_a_change_is_the_difference_of_two_means_and_paired_where_the_targets_are_the_same():
    draw = np.random.default_rng(0)
    tokens, other_tokens = draw.integers(50, 500, (2, 20))
    base, other = draw.normal(3, 1, (2, 3, 20)) * tokens
    found, weights = change_sums(other, tokens, base, tokens)
    np.testing.assert_allclose(found, other - base)
    assert weights.tolist() == tokens.tolist()
    for lacking in (0, 8):  # documents without a target in one of the means
        other_tokens[:lacking] = tokens[lacking : 2 * lacking] = 0
        base, other = draw.normal(3, 1, (2, 3, 20)) * [[tokens], [other_tokens]]
        found, weights = change_sums(other, other_tokens, base, tokens)
        expected = other.sum(axis=1) / other_tokens.sum() - base.sum(axis=1) / tokens.sum()
        np.testing.assert_allclose(found.sum(axis=1) / weights.sum(), expected)


def test_the_band_covers_also_where_few_documents_have_targets_up_to_the_trained_length():
    """Documents of a tenth of a window: most that lie beyond L have no target up to it."""
    starts, positions, inside = np.arange(0, 20_000, 50), positions_in_window(20_000, 512), []
    for seed in range(200):
        draw = np.random.default_rng(seed)
        nats = 3 + np.repeat(draw.normal(size=400), 50)
        curve = position_curve(nats, starts, positions, 512, 64)
        flat, beyond = nats[positions <= 64].mean(), curve["first"] > 64
        inside.append(((curve["low"] < flat) & (flat < curve["high"]))[beyond].mean())
    assert np.mean(inside) == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize("count", [1, 5])
def test_last_takes_the_end_of_whole_windows(group, count):
    points = views.last(group, [16, 134, 500, 4], count)  # the last window of 134 ends two tokens too early
    for point, length in zip(points[:2], (16, 134), strict=True):
        chosen = [t for t in range(N // length * length) if t % length >= length - count]
        assert point["targets"] == len(chosen)
        assert point["nats"] == pytest.approx(nats_of(group, length)[:, chosen].mean(), rel=1e-9)
    assert points[2]["reason"] == "the split has 400 tokens: no window of 500 is full"
    assert ("longer than the window" in points[3].get("reason", "")) == (count == 5)


def test_documents_have_their_own_means(group):
    (point,) = views.documents(group, [32])
    nats = nats_of(group, 32).mean(axis=0)
    borders = [*DOCUMENTS, N]
    expected = [nats[a:b].mean() for a, b in pairwise(borders)]
    assert point["documents"] == pytest.approx(expected, abs=1e-6)


def test_intervals_need_two_documents_and_seeds_may_agree_exactly(group):
    point = group.point(np.zeros((2, 4)), np.array([1, 2, 3, 4]))
    assert point["nats"] == point["low"] == point["high"] == 0
    point = group.point(np.array([[3.0, 0, 0, 0], [3.0, 0, 0, 0]]), np.array([2, 0, 0, 0]))
    assert point["nats"] == 1.5 and point["low"] is None
    passes = Passes(group.passes[0].model, TextTask(np.arange(50), 7, documents=np.array([0])))
    assert "one document" in views.Group("toy", L, [passes]).note and not group.note


def test_changes_that_decide_claims_carry_their_sums_by_seed_and_document(group):
    changes = [point["difference"] for point in views.fixed(group, [8, 16, 32], every=3)]
    (apart,) = views.decomposition(group, [32], 4)
    for change in [*changes, *(apart[name] for name in (*views.TERMS, "total"))]:
        own = change["by_document"]
        nats, tokens = np.array(own["nats"]), np.array(own["tokens"])
        assert nats.shape == (len(group.passes), len(group.documents)) and tokens.shape == nats.shape[1:]
        assert (nats.sum(axis=1) / tokens.sum()).mean() == pytest.approx(change["nats"], abs=1e-6)


@pytest.mark.parametrize("length", [401, 10**10])
def test_no_view_has_a_point_at_a_length_that_the_text_does_not_have(group, length):
    found = {
        "perplexity": views.perplexity(group, [16, length], 4),
        "position": views.position(group, [16, length]),
        "last": views.last(group, [16, length], 4),
        "documents": views.documents(group, [16, length]),
        "fixed": views.fixed(group, [16, length], every=7),
        "decomposition": views.decomposition(group, [32, length], 4),
    }
    for view, points in found.items():
        beyond = [p for p in points if p.get("length", p.get("context")) == length]
        rest = [p for p in points if p not in beyond]
        assert all(p["reason"] == f"the split has 400 tokens: no window of {length:,} is full" for p in beyond), (
            view
        )
        assert beyond and rest and all("reason" not in p for p in rest), view
    assert found["fixed"][0]["targets"] == len(range(15, 400, 7))


@pytest.mark.parametrize(("length", "trained"), [(5, 8), (8, 8), (100, 8), (3, 100), (1, 1), (16384, 512)])
def test_bins_of_the_curve_cover_the_window_and_end_at_the_trained_length(length, trained):
    edges = curve_edges(length, trained)
    assert edges[0] == 1 and edges[-1] == length + 1 and (np.diff(edges) > 0).all()
    assert length <= trained or trained + 1 in edges
    assert (np.diff(edges) <= np.maximum(1, 0.2 * edges[:-1] + 1)).all()
