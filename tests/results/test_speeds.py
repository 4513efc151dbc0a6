"""Intervals of medians over pairs of steps cover, and the pairs that settle do settle."""

import numpy as np
import pytest
from scipy import stats

from alibi_lm.results.speeds import medians_half_width, pairs_to_settle

DRAWS = {
    "normal": lambda rng, size: rng.standard_normal(size),
    "heavy": lambda rng, size: rng.standard_t(3, size),
    "skewed": lambda rng, size: rng.lognormal(0, 0.5, size),
    "flat": lambda rng, size: rng.uniform(-1, 1, size),
}


@pytest.mark.parametrize("shape", DRAWS)
@pytest.mark.parametrize("count", [7, 9, 37])
def test_intervals_of_medians_cover(shape, count):
    """Two sides of the same shape, and one side alone around its true median; 3,000 studies."""
    draw, rng = DRAWS[shape], np.random.default_rng(count)
    sides = [np.quantile(draw(rng, (3000, n)), [0.25, 0.5, 0.75], axis=1).T for n in (count, count + 2)]
    truth = 1.0 if shape == "skewed" else 0.0
    both, alone = [], []
    for (low, middle, high), (low2, middle2, high2) in zip(*sides, strict=True):
        spreads = [(high - low, count), (high2 - low2, count + 2)]
        both.append(abs(middle - middle2) <= medians_half_width(spreads))
        alone.append(abs(middle - truth) <= medians_half_width(spreads[:1]))
    assert 0.925 < np.mean(both) < 0.98 and 0.92 < np.mean(alone) < 0.985, (np.mean(both), np.mean(alone))


def test_the_interval_of_a_median_is_that_of_welch():
    errors, df = [0.93 * 2.0 / 3.0, 0.93 * 1.0 / 4.0], [0.37 * 9, 0.37 * 16]
    joined = (errors[0] ** 2 + errors[1] ** 2) ** 2 / (errors[0] ** 4 / df[0] + errors[1] ** 4 / df[1])
    expected = stats.t.ppf(0.995, joined) * np.hypot(*errors)
    assert medians_half_width([(2.0, 9), (1.0, 16)], 0.99) == pytest.approx(expected, rel=1e-12)
    assert medians_half_width([(2.0, 9)], 0.9) == pytest.approx(stats.t.ppf(0.95, 0.37 * 9) * errors[0], rel=1e-12)
    assert medians_half_width([(0.0, 9), (0.0, 9)]) == 0.0


def test_the_pairs_that_settle_do_so_in_four_of_five_simulated_studies():
    gap, rng = 0.5, np.random.default_rng(1)
    distance = 2 * stats.norm.ppf(0.75)
    found = pairs_to_settle(gap, [distance, distance])
    settled = {}
    for count in (found, found // 2):
        low, middle, high = np.quantile(rng.standard_normal((2, 2000, count)), [0.25, 0.5, 0.75], axis=2)
        halves = [medians_half_width([(a, count), (b, count)]) for a, b in (high - low).T]
        settled[count] = np.mean(gap + middle[0] - middle[1] > halves)
    assert 0.74 < settled[found] < 0.86 and settled[found // 2] < 0.65, settled
    assert pairs_to_settle(0.0, [distance]) is None and pairs_to_settle(1e-4, [distance]) is None
    assert pairs_to_settle(gap, [distance]) < found < pairs_to_settle(gap, [distance, distance], 0.99)
