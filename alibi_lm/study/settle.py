"""Whether a difference between two sets of runs is settled: the interval around it, and the verdict.

Everything is in nats per token, left minus right; the factor of perplexity is its exp. With document sums at hand
the interval is over seeds and documents, else over seeds alone, as a t interval (and then for this text only).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from alibi_lm.results.rows import ResultRow, RowKey

Verdict = Literal["HOLDS", "FAILS", "NOT SETTLED", "NOT RUN"]
VERDICTS: tuple[Verdict, ...] = ("HOLDS", "FAILS", "NOT SETTLED", "NOT RUN")
LEVEL = 0.95
ONE_SEED_MARGIN = 0.005
"""Nats by which one seed without document sums must clear the bound. The paper's own curves move by 0.05 of 18
(0.003) between neighbouring lengths, from where window borders fall."""


@dataclass(frozen=True)
class Measured:
    """A difference of mean nats and the interval around it; no interval with one seed and no document sums."""

    estimate: float
    low: float | None
    high: float | None
    seeds: int
    """Seeds on the side that has fewer."""
    over: str
    """What the interval is over, in words."""

    @property
    def ratio(self) -> str:
        """For people: `1.950 [1.902, 1.999]`, perplexity left over right."""
        text = f"{math.exp(self.estimate):.3f}"
        if self.low is None or self.high is None:
            return text
        return f"{text} [{_exp(self.low)}, {_exp(self.high)}]"


def measure(
    left: Sequence[ResultRow],
    right: Sequence[ResultRow],
    summaries: Mapping[RowKey, Any],
    comparisons: int,
) -> Measured:
    """Left minus right, in mean nats per token.

    Args:
        left: rows with values, one a seed.
        right: likewise; runs of the same seed are paired.
        summaries: document sums by row key, where there are any.
        comparisons: how many differences are judged together (each interval is widened for it).
    """
    by_documents = _over_documents(left, right, summaries, comparisons)
    if by_documents is not None:
        return by_documents
    a, b = _by_seed(left), _by_seed(right)
    common = [seed for seed in a if seed in b]
    alpha = (1 - LEVEL) / comparisons
    if len(common) >= 2:
        pairs = [a[seed] - b[seed] for seed in common]
        half = _t_quantile(alpha, len(pairs) - 1) * math.sqrt(_variance(pairs) / len(pairs))
        center = _mean(pairs)
        return Measured(center, center - half, center + half, len(pairs), f"{len(pairs)} seeds, paired")
    if min(len(a), len(b)) >= 2:
        center = _mean(list(a.values())) - _mean(list(b.values()))
        parts = [_variance(list(side.values())) / len(side) for side in (a, b)]
        total = sum(parts)
        # Welch's degrees of freedom; with no spread at all there is nothing to divide.
        df = total**2 / sum(p**2 / (len(s) - 1) for p, s in zip(parts, (a, b), strict=True)) if total else 1.0
        half = _t_quantile(alpha, df) * math.sqrt(total)
        return Measured(center, center - half, center + half, min(len(a), len(b)), f"{len(a)} and {len(b)} seeds")
    if common:
        return Measured(a[common[0]] - b[common[0]], None, None, 1, f"seed {common[0]} alone")
    return Measured(_mean(list(a.values())) - _mean(list(b.values())), None, None, 1, "one seed")


def judge(measured: Measured, relation: str, factor: float, min_seeds: int) -> Verdict:
    """The verdict on "left over right is `relation` `factor`".

    Args:
        measured: the difference.
        relation: `below`, `above` or `within` (between 1 / factor and factor).
        factor: of perplexity, positive; above 1 for `within`.
        min_seeds: with fewer nothing is settled.
    """
    if measured.seeds < min_seeds:
        return "NOT SETTLED"
    low, high = measured.low, measured.high
    if low is None or high is None:
        low, high = measured.estimate - ONE_SEED_MARGIN, measured.estimate + ONE_SEED_MARGIN
    bound = math.log(factor)
    if relation == "within":
        inside, outside = -bound <= low and high <= bound, high < -bound or low > bound
    elif relation == "below":
        inside, outside = high < bound, low > bound
    else:
        inside, outside = low > bound, high < bound
    return "HOLDS" if inside else "FAILS" if outside else "NOT SETTLED"


def overall(verdicts: Sequence[Verdict]) -> Verdict:
    """A claim over several lengths fails where one fails, and holds where all that were run do."""
    for verdict in ("FAILS", "NOT SETTLED", "HOLDS"):
        if verdict in verdicts:
            return verdict
    return "NOT RUN"


def _over_documents(
    left: Sequence[ResultRow], right: Sequence[ResultRow], summaries: Mapping[RowKey, Any], comparisons: int
) -> Measured | None:
    if not summaries or any(row.key not in summaries for row in (*left, *right)):
        return None
    seeds = [[row.seed for row in side] for side in (left, right)]
    if any(None in side or len(set(side)) < len(side) for side in seeds):
        return None
    import numpy as np

    from alibi_lm.results.statistics import ONE_SEED, paired_difference

    parts = [[summaries[row.key] for row in side] for side in (left, right)]
    tokens = parts[0][0].document_tokens
    if any(not np.array_equal(tokens, part.document_tokens) for side in parts for part in side):
        return None  # other texts: documents cannot be paired
    try:
        found = paired_difference(
            np.stack([part.document_nats for part in parts[0]]),
            np.stack([part.document_nats for part in parts[1]]),
            tokens,
            LEVEL,
            comparisons,
            [seed for seed in seeds[0] if seed is not None],
            [seed for seed in seeds[1] if seed is not None],
        )
    except ValueError:  # fewer than two documents, or seeds that agree exactly
        return None
    common = set(seeds[0]) & set(seeds[1])
    count = len(common) if len(common) >= 2 else min(len(side) for side in seeds)
    count = 1 if found.kind == ONE_SEED else count
    over = f"{count} seeds and {len(tokens)} documents" if count > 1 else f"{len(tokens)} documents, one seed"
    return Measured(found.estimate, found.low, found.high, count, over)


def _by_seed(rows: Sequence[ResultRow]) -> dict[int | str | None, float]:
    """Loss by seed; by run, where a seed is unknown or comes twice."""
    seeds = [row.seed for row in rows]
    unique = None not in seeds and len(set(seeds)) == len(seeds)
    return {row.seed if unique else row.run: row.loss for row in rows if row.loss is not None}


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _variance(values: Sequence[float]) -> float:
    center = _mean(values)
    return math.fsum((value - center) ** 2 for value in values) / (len(values) - 1)


def _t_quantile(alpha: float, df: float) -> float:
    from scipy import stats

    return float(stats.t.ppf(1 - alpha / 2, df))


def _exp(value: float) -> str:
    return f"{math.exp(value):.3f}" if value < 50 else "inf"
