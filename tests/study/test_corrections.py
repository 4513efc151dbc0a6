"""Corrections for several questions, rules of pairing, and signs: what a statistic must not lose on its way."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from study_rows import accuracy, row, scored

from alibi_lm.results.statistics import (
    accuracy_interval,
    critical_value,
    half_width,
    paired_difference,
    seeds_to_settle,
    share_variance,
    variance_parts,
)
from alibi_lm.study.change_table import change_tables
from alibi_lm.study.claims import judge_claim
from alibi_lm.study.compare import Measured, measure, power_note, sample
from alibi_lm.study.evidence import Evidence
from alibi_lm.study.paper_claims import Claim, Side


def test_one_common_seed_of_three_is_no_pair():
    draw = np.random.default_rng(0)
    tokens = np.full(12, 100.0)
    a, b = 3 * tokens + draw.normal(0, 9, (2, 3, 12))
    assert "not paired" in paired_difference(a, b, tokens, [1, 2, 3], [3, 4, 5]).note
    one = paired_difference(a[:1], b, tokens, [1], [1, 2, 3])
    assert "2 runs left out" in one.note and one.estimate == pytest.approx((a[0] - b[0]).sum() / tokens.sum())


def test_degrees_of_freedom_are_rounded_to_the_safe_side_and_never_vanish():
    values = [float(critical_value(np.array(0.5), np.array(2.0), np.array(df), 0.95)) for df in (3.0, 3.9, 4.0)]
    assert values[0] == values[1] > values[2]
    tokens = np.array([1e6, 1, 1])
    assert variance_parts(np.ones((2, 3)) * tokens, tokens).document_df == 0.5


@pytest.mark.parametrize(("gap", "of_seeds", "of_documents"), [(0.5, 1, 0.001), (0.3, 1, 0.005), (0.9, 1, 0.0)])
def test_the_seeds_that_settle_are_the_fewest(gap, of_seeds, of_documents):
    def settles(n):
        half = half_width(of_seeds / n, of_documents, n, 30.0, 0.95)
        return gap >= half + stats.norm.ppf(0.8) * math.sqrt(of_seeds / n + of_documents)

    found = seeds_to_settle(gap, of_seeds, of_documents)
    assert settles(found) and not settles(found - 1)
    least = (stats.t.ppf(0.975, 30) + stats.norm.ppf(0.8)) * 0.1  # with any number of seeds, at a variance of 0.01
    assert seeds_to_settle(least * 0.99, 1e-9, 0.01) is None and seeds_to_settle(least * 1.01, 1e-9, 0.01) == 2


def test_equal_accuracies_have_the_interval_of_few_items():
    half = stats.t.ppf(0.975, 7) * math.sqrt(share_variance(0.5, 8))
    assert accuracy_interval([0.5, 0.5, 0.5], 8) == pytest.approx((0.5 - half, 0.5 + half))


def seeds(position, offsets, first=1):
    return sample([row(position, seed=s, perplexity=math.exp(3 + d)) for s, d in enumerate(offsets, first)], {})


def test_several_questions_widen_the_interval_over_seeds_too():
    alibi, t5 = seeds("alibi", (0, 0.1, 0.2)), seeds("t5", (0, 0, 0))
    one, six = (measure(alibi, t5, n) for n in (1, 6))
    wider = stats.t.ppf(1 - 0.05 / 12, 2) / stats.t.ppf(0.975, 2)
    assert six.high - six.estimate == pytest.approx(wider * (one.high - one.estimate))
    rows, sums = scored("alibi", {64: 3.0})
    one, six = (measure(sample(rows, sums), None, n) for n in (1, 6))
    assert six.high - six.estimate > 1.3 * (one.high - one.estimate)
    notes = [power_note(Measured(-0.05, -0.1, 0.1, 3, "", 0.01, comparisons=n), "below", 1.0) for n in (1, 6)]
    assert len(set(notes)) == 2


def test_unpaired_seeds_have_welchs_interval():
    few, many = (0.0, 0.3), (0.0, 0.01, 0.02, 0.03, 0.04)
    found = measure(seeds("alibi", few), seeds("t5", many, first=2))  # one seed in common is no pair
    welch = stats.ttest_ind(3 + np.array(few), 3 + np.array(many), equal_var=False).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx(tuple(welch)) and found.over.startswith("2 and 5 seeds")


def test_the_fewest_items_of_a_side_count():
    rows = [accuracy("alibi", 64, 0.5, items=n, seed=s) for s, n in ((1, 2000), (2, 100), (3, 2000))]
    assert sample(rows, {}).items == 100


def test_a_claim_about_several_lengths_widens_each():
    claim = Claim("x", "s", "t", Side("alibi"), Side("sinusoidal"), "below")
    numbers = []
    for lengths in ((64,), (64, 128)):
        rows, sums = [], {}
        for position, loss in (("alibi", 3.0), ("sinusoidal", 3.01)):
            for n in lengths:
                made, own = scored(position, {n: loss}, train=n)
                rows, sums = rows + made, sums | own
        numbers.append(judge_claim(claim, Evidence(rows, documents=sums)).instances[0].numbers)
    assert numbers[0] != numbers[1]


@pytest.mark.parametrize(("loss", "sign"), [(2.9, "<"), (3.1, ">"), (3.0, "")])
def test_a_sign_says_which_is_better(loss, sign):
    rows, sums = [], {}
    for change, value, changes in (("crop to L", 3.0, {"crop": 64}), ("unchanged", loss, {})):
        made, own = scored("alibi", {128: value}, changes=changes, extra={"change": change})
        rows, sums = rows + made, sums | own
    lines = change_tables(rows, sums).splitlines()
    cell = next(line.split("|")[2] for line in lines if line.startswith("| unchanged"))
    assert re.search(r"\d", cell)
    assert re.sub(r"[^<>]", "", cell) == sign


def test_sums_that_are_not_of_the_rows_evaluation_are_left_out():
    """A process may die between writing rows and writing their sums."""
    rows, sums = scored("alibi", {64: 3.0})
    assert sample(rows, sums).nats is not None
    key = rows[1].key
    stale = replace(sums[key], nats=sums[key].nats * 1.001)
    found = sample(rows, sums | {key: stale})
    assert found.nats is None and "of another evaluation" in measure(found, None).over
    assert measure(found, None).estimate == measure(sample(rows, sums), None).estimate
