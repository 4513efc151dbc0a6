"""Rows become curves: runs are seeds of each other only when nothing else differs."""

import math

import pytest
from study_rows import curve, row, unigram

from alibi_lm.results.curves import View, baselines, curves, variant_of, views

PLAIN = View("validation", "nonoverlapping")


def test_seeds_share_a_curve_and_its_mean_is_of_the_loss():
    rows = curve("alibi", {64: 20.0, 128: 10.0}, seed=1) + curve("alibi", {64: 5.0, 128: 40.0}, seed=2)
    (found,) = curves(rows, PLAIN)
    assert found.seeds == {"alibi_L64_s1": 1, "alibi_L64_s2": 2}
    assert found.perplexity(64) == pytest.approx(10.0)  # sqrt(20 * 5), not 12.5
    assert found.ratio(128) == pytest.approx(2.0)  # mean of log(1/2) and log(8)


def test_the_ratio_pairs_runs_that_have_both_lengths():
    rows = curve("alibi", {64: 20.0, 128: 10.0}, seed=1) + curve("alibi", {128: 1000.0}, seed=2)
    (found,) = curves(rows, PLAIN)
    assert found.ratio(128) == pytest.approx(0.5)
    assert found.ratio(256) is None


def test_other_settings_are_another_curve():
    rows = [
        row(),
        row(suffix="_0f3a9c21"),
        row(suffix="+scaling=yarn"),
        row(suffix="_0f3a9c21+scaling=yarn"),
        row(run="my_run"),
        row(run="alibi_L32_s1"),  # the name speaks of another training length than the row
    ]
    assert [variant_of(item) for item in rows] == [
        "",
        "0f3a9c21",
        "+scaling=yarn",
        "0f3a9c21+scaling=yarn",
        "my_run",
        "alibi_L32_s1",
    ]
    assert len(curves(rows, PLAIN)) == 6


def test_modes_strides_and_splits_never_mix():
    rows = [
        row(length=64, perplexity=20.0),
        row(length=64, perplexity=19.0, mode="sliding", stride=16),
        row(length=64, perplexity=18.0, mode="sliding", stride=1),
        row(length=64, perplexity=21.0, split="test"),
        unigram(),
    ]
    found = views(rows)
    assert [view.slug for view in found] == [
        "validation_nonoverlapping",
        "validation_sliding1",
        "validation_sliding16",
        "test_nonoverlapping",
    ]
    assert [curves(rows, view)[0].perplexity(64) for view in found] == pytest.approx([20.0, 18.0, 19.0, 21.0])


def test_refused_lengths_keep_their_reason_and_have_no_value():
    (found,) = curves(curve("learned", {64: 20.0, 128: None}), PLAIN)
    assert found.lengths == [64] and found.refused == {128: "positions end at 64"}


def test_a_baseline_is_no_curve_and_belongs_to_its_split():
    rows = [row(), unigram(500.0)]
    assert len(curves(rows, PLAIN)) == 1
    assert baselines(rows, PLAIN) == {"unigram": pytest.approx(500.0)}
    assert baselines(rows, View("test", "nonoverlapping")) == {}
    assert math.isclose(baselines(rows, View("validation", "sliding", 4))["unigram"], 500.0)
