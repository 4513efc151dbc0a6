"""How sure a speed is: intervals of medians over pairs of steps. docs/statistics.md, "Speed", explains them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from alibi_lm.results.statistics import POWER, fewest

PAIRS = 7
"""Smallest number of pairs that can settle a ratio of speeds."""
ERROR, DEGREES = 0.93, 0.37
"""Of a median of normal values: its standard error times the root of the count, in distances of the quartiles;
and the degrees of freedom of such a distance, per value."""


def medians_half_width(spreads: Sequence[tuple[float, int]], level: float = 0.95) -> float:
    """Half width of the interval of a median, or of a difference of two.

    For normal values the standard error of a median is 0.93 times the distance of the quartiles over the root of
    the count (McGill, Tukey and Larsen 1978, "Variations of box plots"). That distance varies as well: by its
    variance for normal values it is worth 0.37 degrees of freedom per value, which Welch's formula joins. For
    values that are not normal, tests/results/test_speeds.py measures the coverage.

    Args:
        spreads: distance between the quartiles, and number of values; one or two.
        level: in (0, 1).
    """
    from scipy import stats

    errors = [(ERROR * distance) ** 2 / count for distance, count in spreads]
    if not any(errors):
        return 0.0
    df = sum(errors) ** 2 / sum(e**2 / (DEGREES * count) for e, (_, count) in zip(errors, spreads, strict=True))
    return float(stats.t.ppf((1 + level) / 2, df)) * math.sqrt(sum(errors))


def pairs_to_settle(gap: float, distances: Sequence[float], level: float = 0.95) -> int | None:
    """An estimate of how many values of each would settle a difference of medians; see `seeds_to_settle`.

    Args:
        gap: distance between the estimate and the bound that it must clear; not negative.
        distances: between the quartiles, one or two.
        level: in (0, 1).
    """
    from scipy import stats

    power = float(stats.norm.ppf(POWER))

    def enough(count: int) -> bool:
        error = ERROR * math.sqrt(sum(distance**2 for distance in distances) / count)
        return gap > 0 and gap >= medians_half_width([(d, count) for d in distances], level) + power * error

    return fewest(enough)
