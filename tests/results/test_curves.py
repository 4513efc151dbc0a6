"""Rows become curves: runs are seeds of each other only when nothing else differs."""

import math
from dataclasses import replace

import pytest
from study_rows import accuracy, curve, row, unigram

from alibi_lm.results.curves import View, baselines, curves, effective_context, text_names, views

PLAIN = View("validation", "nonoverlapping")


def test_seeds_share_a_curve_and_its_mean_is_of_the_loss():
    rows = curve("alibi", {64: 20.0, 128: 10.0}, seed=1) + curve("alibi", {64: 5.0, 128: 40.0}, seed=2)
    (found,) = curves(rows, PLAIN)
    assert found.seeds == {"alibi_L64_s1": 1, "alibi_L64_s2": 2}
    assert found.value(64) == pytest.approx(10.0)  # sqrt(20 * 5), not 12.5
    assert found.ratio(128) == pytest.approx(2.0)  # mean of log(1/2) and log(8)
    # over the runs that have both lengths
    (found,) = curves(rows[:2] + curve("alibi", {128: 1000.0}, seed=2), PLAIN)
    assert found.ratio(128) == pytest.approx(0.5) and found.ratio(256) is None


def test_without_configs_runs_are_seeds_of_each_other_only_by_their_names():
    rows = [
        row(),
        row(suffix="_0f3a9c21"),
        row(suffix="_a1f069d5"),
        row(suffix="_large"),
        row(changes={"position.scaling": "yarn"}),
        row(suffix="_0f3a9c21", changes={"position.scaling": "yarn"}),
        row(run="my_run"),
        row(run="alibi_L32_s1"),  # the name speaks of another training length than the row
    ]
    # never by a hash, which says nothing to anybody
    assert [curve.variant for curve in curves(rows, PLAIN)] == [
        "",
        "alibi_L32_s1",
        "large",
        "my_run",
        "other settings #1",
        "other settings #1; tested with scaling=yarn",
        "other settings #2",
        "tested with scaling=yarn",
    ]


def test_recipes_decide_which_runs_are_seeds_of_each_other():
    rows = [row(seed=1), row(seed=2, suffix="_0f3a9c21"), row(seed=1, suffix="_a1f069d5")]
    words = {rows[0].run: "", rows[1].run: "", rows[2].run: "lr 0.002"}
    found = curves(rows, PLAIN, words)
    assert [(c.variant, sorted(c.seeds.values())) for c in found] == [("", [1, 2]), ("lr 0.002", [1])]


def test_two_texts_are_two_curves_with_two_baselines():
    names = [{"corpus_name": "A"}, {"corpus_name": "B"}]
    rows = [
        row(corpus="a0", extra=names[0]),
        row(corpus="b0", extra=names[1]),
        row("t5", corpus="b0", extra=names[1]),
    ]
    rows += [unigram(500.0, corpus="a0"), unigram(100.0, corpus="b0"), unigram(7.0, corpus="elsewhere")]
    assert [(c.position, c.variant) for c in curves(rows, PLAIN)] == [("alibi", "A"), ("alibi", "B"), ("t5", "B")]
    assert baselines(rows, PLAIN) == {"unigram (A)": pytest.approx(500.0), "unigram (B)": pytest.approx(100.0)}
    same = [replace(r, extra={}) for r in rows]
    assert sorted(text_names(same[:3]).values()) == ["text", "text #2"]


def test_a_row_with_a_reason_measured_nothing_at_its_length():
    beyond = row(length=99_999, perplexity=20.0, reason="no window is full: the text has 10,000 tokens")
    diverged = row("t5", perplexity=None, nats=5306.0 * 10_000, reason="exp(5306) is too large for a number")
    blanks = replace(row("rotary"), words=5, word_perplexity=None, reason="per word: too large for a number")
    found = {c.position: c for c in curves([row(), beyond, diverged, blanks], PLAIN)}
    assert found["alibi"].lengths == [64] and found["alibi"].refused == {99_999: beyond.reason}
    assert found["t5"].lengths == [] and "too large" in found["t5"].refused[64]
    assert found["rotary"].lengths == [64] and not found["rotary"].refused


def test_other_metrics_have_views_of_their_own_and_plain_means():
    rows = [row(), *(accuracy("alibi", 64, v, seed=s) for s, v in ((1, 0.5), (2, 0.9))), accuracy("t5", 128, None)]
    assert [(v.task, v.metric, v.slug) for v in views(rows)] == [
        ("text", "perplexity", "validation_nonoverlapping"),
        ("copy", "accuracy", "copy_accuracy_validation_items"),
    ]
    alibi, t5 = curves(rows, views(rows)[1])
    assert alibi.value(64) == pytest.approx(0.7) and alibi.ratio(64) is None and alibi.items == {64: 200}
    assert t5.refused == {128: "positions end at 64"} and curves(rows, PLAIN)[0].value(64) == pytest.approx(20.0)


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
    assert [curves(rows, view)[0].value(64) for view in found] == pytest.approx([20.0, 18.0, 19.0, 21.0])


def test_a_baseline_is_no_curve_and_belongs_to_its_split():
    rows = [row(), unigram(500.0)]
    assert len(curves(rows, PLAIN)) == 1
    assert baselines(rows, PLAIN) == {"unigram": pytest.approx(500.0)}
    assert baselines(rows, View("test", "nonoverlapping")) == {}
    assert math.isclose(baselines(rows, View("validation", "sliding", 4))["unigram"], 500.0)


def test_the_effective_context_is_the_shortest_that_is_as_good_as_the_best():
    assert effective_context({64: 3.0, 8: 3.031, 16: 3.029, 128: 3.02}) == 16
    assert effective_context({4: 2.0}) == 4 and effective_context({4: 1.0, 2: 1.0, 8: 1.02}) == 2
