"""Intervals and verdicts from sums of nats per document and seed.

Documents are a sample of text, seeds a sample of training runs, and every seed scores the same documents:
two crossed random factors. A mean loss therefore carries two errors. More text does not shrink the error from
the seeds, and more seeds do not shrink the error from the documents. An interval here covers both.

Formula, with a seeds s, D documents d, x_sd nats and t_d tokens:
    R_s  = sum_d x_sd / sum_d t_d            estimate = mean_s R_s
    e_sd = sqrt((D - 1) / D) (x_sd - R_s t_d) / (T (1 - h_d)),  T = sum_d t_d, h_d = t_d / T, e_d = mean_s e_sd
    seed part      = variance of R_s (divisor a - 1) / a, with a - 1 degrees of freedom
    document part  = sum_d e_d^2 - sum_sd (e_sd - e_d)^2 / (a (a - 1)), at least 0,
                     with 1 / sum_d h_d^2 - 1 degrees of freedom
    half width     = critical value(share of the seed part) * sqrt(seed part + document part)
The seed part already holds the interaction of seeds with documents, hence the subtraction. sum_d e_d^2 is the
delete-one jackknife of a ratio; 1 / sum_d h_d^2 is the number of equally long documents worth the same. With
documents of one length both parts are those of the balanced two-way analysis of variance.

Source: Behrens (1929) and Fisher (1935) for the critical value. docs/statistics.md has the measured coverage,
scripts/coverage.py measures it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np

Kind = Literal["seeds and documents", "one seed: conditional on that seed"]
Verdict = Literal["yes", "no", "not settled"]

BOTH: Kind = "seeds and documents"
ONE_SEED: Kind = "one seed: conditional on that seed"


@dataclass(frozen=True)
class Interval:
    """An estimate with the interval around it.

    Attributes:
        estimate: mean nats per token, or a difference of two; perplexity or a ratio of two after `as_perplexity`.
        low: lower end, in the unit of the estimate.
        high: upper end.
        level: share of such intervals that hold the true value, in (0, 1); of families of `comparisons` intervals.
        kind: what the interval is over. With one seed it says nothing about another training run.
        note: what the reader must know beside it; empty where there is nothing.
        comparisons: number of differences judged together, each interval widened for it.
        unit: of the three numbers.
        seed_variance: variance between seeds (of their differences, where seeds are paired), in nats squared; 0
            with one seed.
        document_variance: the documents' part of the squared error, which more seeds do not shrink.
    """

    estimate: float
    low: float
    high: float
    level: float
    kind: Kind
    note: str = ""
    comparisons: int = 1
    unit: Literal["nats", "perplexity"] = "nats"
    seed_variance: float = 0.0
    document_variance: float = 0.0


class VarianceParts(NamedTuple):
    """An estimate and the parts of its squared error, from nats per token; arrays over the input's leading axes.

    `documents_seen` is how far the documents scatter as observed, which still holds `interaction`.
    """

    estimate: np.ndarray
    seed: np.ndarray
    documents_seen: np.ndarray
    interaction: np.ndarray
    document_df: np.ndarray

    @property
    def document(self) -> np.ndarray:
        """What another sample of documents would change; at least 0."""
        return np.maximum(self.documents_seen - self.interaction, 0)


def per_document_sums(
    nats_per_token: np.ndarray, document_starts: np.ndarray, scored: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Sums of nats and numbers of tokens per document, added in double precision.

    Args:
        nats_per_token: (tokens,) float, of one seed, in stream order.
        document_starts: (documents,) integer, rising, the first 0: index of the first token of each document.
        scored: (tokens,) bool; tokens to count. None: all of them.

    Returns:
        sums (documents,) float64 in nats; counts (documents,) int64, 0 where nothing was scored.

    Raises:
        ValueError: starts that are not rising from 0 within the stream, other shapes, or a scored value that is
            not finite.
    """
    starts, count = np.asarray(document_starts), len(nats_per_token)
    used = np.ones(count, dtype=bool) if scored is None else np.asarray(scored)
    if np.ndim(nats_per_token) != 1 or used.shape != (count,) or used.dtype != bool:
        raise ValueError(
            f"nats_per_token has shape {np.shape(nats_per_token)}, scored has {used.shape} of {used.dtype}; they "
            "are (tokens,), a number and a bool for each."
        )
    if starts.ndim != 1 or not len(starts) or not np.issubdtype(starts.dtype, np.integer):
        raise ValueError(f"document_starts = {starts}; they are (documents,) integers, at least one.")
    starts = starts.astype(np.int64)
    if starts[0] != 0 or (np.diff(starts) <= 0).any() or starts[-1] >= count:
        raise ValueError(
            f"document_starts = {starts[0]} ... {starts[-1]} for {count} tokens; they start at 0, rise, and stay "
            "below the number of tokens. Give what stands before the first title to the first document."
        )
    counts = np.add.reduceat(used, starts, dtype=np.int64)
    sums = np.add.reduceat(np.where(used, nats_per_token, 0), starts, dtype=np.float64)
    if not np.isfinite(sums).all():
        wrong = int(np.flatnonzero(~np.isfinite(sums))[0])
        raise ValueError(
            f"nats_per_token: document {wrong} holds a value that is not finite. Leave it out with `scored`, or "
            "find out why the model gave no probability."
        )
    return sums, counts


def variance_parts(nats: np.ndarray, tokens: np.ndarray) -> VarianceParts:
    """Estimate, seed part and document part of its squared error; see the module's formula.

    Args:
        nats: (..., seeds, documents) float64, sums per document; differences of two runs are fine.
        tokens: (..., documents), positive; at least two documents.

    Returns:
        Arrays of shape (...). With one seed, seed part and interaction cannot be seen and are 0.
    """
    seeds = nats.shape[-2]
    total = tokens.sum(-1)
    share = tokens / total[..., None]
    rates = nats.sum(-1) / total[..., None]
    errors = (nats - rates[..., None] * tokens[..., None, :]) / (total[..., None] * (1 - share))[..., None, :]
    errors *= np.sqrt(1 - 1 / tokens.shape[-1])
    of_document = errors.mean(-2)
    seen = (of_document**2).sum(-1)
    seed = interaction = np.zeros_like(seen)
    if seeds > 1:
        interaction = ((errors - of_document[..., None, :]) ** 2).sum((-1, -2)) / (seeds * (seeds - 1))
        seed = rates.var(-1, ddof=1) / seeds
    # Lengths can be so unequal that little more than one document counts; t needs a positive number.
    document_df = np.maximum(1 / (share**2).sum(-1) - 1, 0.5)
    return VarianceParts(rates.mean(-1), seed, seen, interaction, document_df)


def critical_value(share: np.ndarray, seed_df: np.ndarray, document_df: np.ndarray, level: float) -> np.ndarray:
    """What the standard error is multiplied by: the Behrens-Fisher value.

    It is the quantile of sqrt(share) T_seed + sqrt(1 - share) T_document with T independent t variables. For
    normal errors it covered `level` or more, to within the simulation's error, wherever we measured: also far out
    in the tail and with two seeds.

    Args:
        share: seed part / (seed part + document part), in [0, 1]; any shape, as are the next two.
        seed_df: degrees of freedom of the seed part, positive.
        document_df: of the document part.
        level: two-sided, in (0, 1).
    """
    share, seed_df, document_df = np.broadcast_arrays(share, seed_df, document_df)
    # Whole degrees of freedom, rounded down (to the safe side), keep the number of tables small.
    pairs = np.stack([seed_df, document_df], -1)
    pairs = np.where(pairs >= 1, np.floor(pairs), pairs)
    angle = np.arcsin(np.sqrt(share))
    value = np.empty(share.shape)
    for pair in np.unique(pairs.reshape(-1, 2), axis=0):
        chosen = (pairs == pair).all(-1)
        angles, quantiles = _behrens_fisher(float(pair[0]), float(pair[1]), (1 + level) / 2)
        value[chosen] = np.interp(angle[chosen], angles, quantiles)
    return value


@lru_cache(maxsize=512)
def _behrens_fisher(seed_df: float, document_df: float, upper: float) -> tuple[np.ndarray, np.ndarray]:
    """Angles (25,) from 0 to pi / 2 and the quantile of sin(angle) T_seed + cos(angle) T_document at each."""
    from scipy import stats

    angles = np.linspace(0, np.pi / 2, 25)
    if seed_df > document_df:
        swapped = _behrens_fisher(document_df, seed_df, upper)[1]
        return angles, swapped[::-1]
    # Probability of a sum by quadrature over the part with the lighter tail, given the other's exact cdf.
    nodes, weights = np.polynomial.legendre.leggauss(200)
    lighter = stats.t.ppf((nodes + 1) / 2, document_df)
    sine, cosine = np.sin(angles[1:, None]), np.cos(angles[1:, None])
    low = np.zeros(len(angles) - 1)
    high = np.full_like(low, 2 * stats.t.ppf(upper, seed_df))
    for _ in range(45):
        middle = (low + high) / 2
        below = stats.t.cdf((middle[:, None] - cosine * lighter) / sine, seed_df) @ weights / 2
        low, high = np.where(below < upper, middle, low), np.where(below < upper, high, middle)
    return angles, np.concatenate([[stats.t.ppf(upper, document_df)], (low + high) / 2])


def mean_nats_interval(nats: np.ndarray, tokens: np.ndarray, level: float = 0.95) -> Interval:
    """Mean nats per token over documents and seeds, each token with the same weight.

    Args:
        nats: (seeds, documents), sums of nats of the same documents under each seed. (documents,) is one seed.
        tokens: (documents,), tokens in each sum. Documents without tokens are left out, which the note says.
        level: in (0, 1).

    Returns:
        The interval, over seeds and documents with two or more seeds; else conditional on the one seed.

    Raises:
        ValueError: fewer than two documents, other shapes, values that are not finite, negative tokens, or two
            seeds that scored every document identically.
    """
    scores, counts, note = _checked(nats, tokens, "nats")
    parts = variance_parts(scores, counts)
    return _interval(parts, len(scores), level, 1, note)


def paired_difference(
    nats_a: np.ndarray,
    nats_b: np.ndarray,
    tokens: np.ndarray,
    level: float = 0.95,
    comparisons: int = 1,
    seeds_a: Sequence[int] | None = None,
    seeds_b: Sequence[int] | None = None,
) -> Interval:
    """A minus B in mean nats per token, paired by document and, where it can be, by seed. Negative: A is better.

    Seeds in common are paired when there are two or more, and the others left out: runs of one seed share their
    data order, so pairing cannot mislead and mostly helps. Without two in common the seeds of A and of B are two
    samples of their own. Documents are always paired.

    Args:
        nats_a: (seeds of A, documents), sums of nats per document; (documents,) is one seed.
        nats_b: (seeds of B, documents), of the same documents.
        tokens: (documents,), the same for both.
        level: in (0, 1), of the whole family of `comparisons`.
        comparisons: how many differences are judged together, usually the number of lengths asked; each interval
            is then at level 1 - (1 - level) / comparisons (Bonferroni).
        seeds_a: seed of each row of nats_a. None for both: rows are the same seeds when there are equally many.
        seeds_b: of nats_b.

    Raises:
        ValueError: as `mean_nats_interval`; other documents in A and B; seeds given for one side only, or twice.
    """
    a, counts, note = _checked(nats_a, tokens, "nats_a")
    b, _, _ = _checked(nats_b, tokens, "nats_b")
    names_a, names_b = _seed_names(seeds_a, seeds_b, len(a), len(b))
    common = [name for name in names_a if name in set(names_b)]
    if len(common) >= min(2, len(a), len(b)) and common:
        if left := len(a) + len(b) - 2 * len(common):
            note += f"; {left} runs left out: their seed is not in both"
        pairs = [a[names_a.index(name)] - b[names_b.index(name)] for name in common]
        parts = variance_parts(np.stack(pairs), counts)
        return _interval(parts, len(common), level, comparisons, note)
    note += "; seeds not paired: fewer than two in common"
    part_a, part_b = variance_parts(a, counts), variance_parts(b, counts)
    # Documents: the mean over the seeds of each side, then the difference, so that what they share cancels.
    both = variance_parts((a.mean(0) - b.mean(0))[None], counts)
    parts = both._replace(seed=part_a.seed + part_b.seed, interaction=part_a.interaction + part_b.interaction)
    return _interval(parts, min(len(a), len(b)), level, comparisons, note)


def verdict(difference: Interval) -> Verdict:
    """Whether A is better than B, from `paired_difference`.

    Returns:
        "yes": the whole interval of A minus B is below 0. "no": above 0, B is better. "not settled": 0 is inside,
        or there is one seed only, which says nothing about schemes.

    Raises:
        ValueError: an interval that is not in nats.
    """
    if difference.unit != "nats":
        raise ValueError(f"unit = {difference.unit}: a verdict takes the difference in nats.")
    if difference.kind == ONE_SEED:
        return "not settled"
    if difference.high < 0:
        return "yes"
    return "no" if difference.low > 0 else "not settled"


def seeds_to_settle(
    gap: float,
    seed_variance: float,
    document_variance: float,
    level: float = 0.95,
    power: float = 0.8,
    document_df: float = 30.0,
) -> int | None:
    """An estimate of how many seeds would settle a difference, if it and the scatter are as seen so far.

    With that many seeds about `power` of repeated experiments would have an interval that leaves out the bound.
    Formula: the least a >= 2 with gap >= (critical value + z_power) * sqrt(seed_variance / a + document_variance),
    z the normal quantile. What was seen of few seeds is itself uncertain, so take it as an order of magnitude.

    Args:
        gap: distance between the estimate and the bound that it must clear, in nats; not negative.
        seed_variance: between seeds, in nats squared.
        document_variance: of the documents' part of the error, which more seeds do not shrink.
        level: of each interval, in (0, 1).
        power: share of such experiments that would be settled, in (0, 1).
        document_df: degrees of freedom of the documents' part.

    Returns:
        Seeds, 2 to 10,000; None where that many would not do.
    """
    from scipy import stats

    def enough(seeds: int) -> bool:
        variance = seed_variance / seeds + document_variance
        if variance == 0:
            return gap > 0
        share = np.asarray(seed_variance / seeds / variance)
        critical = float(critical_value(share, np.asarray(seeds - 1.0), np.asarray(document_df), level))
        return gap >= (critical + float(stats.norm.ppf(power))) * np.sqrt(variance)

    low, high = 1, 2
    while not enough(high):
        low, high = high, 2 * high
        if high > 10_000:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def wilson_interval(share: float, trials: int, level: float = 0.95) -> tuple[float, float]:
    """Interval of a share such as an accuracy, from independent trials.

    Source: Wilson (1927), "Probable inference, the law of succession, and statistical inference".

    Args:
        share: successes over trials, in [0, 1].
        trials: 1 or more.
        level: two-sided, in (0, 1).
    """
    from scipy import stats

    z2 = float(stats.norm.ppf((1 + level) / 2)) ** 2
    center = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = np.sqrt(z2 * (share * (1 - share) + z2 / (4 * trials)) / trials) / (1 + z2 / trials)
    return max(0.0, float(center - half)), min(1.0, float(center + half))


def as_perplexity(interval: Interval) -> Interval:
    """Exp of the estimate and of both ends: a mean becomes a perplexity, a difference a ratio A / B of two.

    Ends too large for a float become infinite. Coverage is unchanged, as exp is rising.
    """
    if interval.unit != "nats":
        raise ValueError(f"unit = {interval.unit}; it is in perplexity already.")
    with np.errstate(over="ignore"):
        estimate, low, high = (float(np.exp(v)) for v in (interval.estimate, interval.low, interval.high))
    return replace(interval, estimate=estimate, low=low, high=high, unit="perplexity")


def _interval(parts: VarianceParts, seeds: int, level: float, comparisons: int, note: str) -> Interval:
    """The interval of parts of shape (); `seeds` is the smaller number on either side."""
    from scipy import stats

    if not 0 < level < 1:
        raise ValueError(f"level = {level}; it is between 0 and 1, for example 0.95.")
    if comparisons < 1:
        raise ValueError(
            f"comparisons = {comparisons}; it is the number of differences judged together, 1 or more."
        )
    each = 1 - (1 - level) / comparisons
    if seeds < 2:
        document = parts.documents_seen
        variance = document
        critical = float(stats.t.ppf((1 + each) / 2, parts.document_df))
    else:
        document = parts.document
        variance = parts.seed + document
        share = parts.seed / variance if variance > 0 else np.ones(())
        critical = float(critical_value(share, np.asarray(seeds - 1.0), parts.document_df, each))
    half, estimate = critical * float(np.sqrt(variance)), float(parts.estimate)
    return Interval(
        estimate,
        estimate - half,
        estimate + half,
        level,
        ONE_SEED if seeds < 2 else BOTH,
        note.removeprefix("; "),
        comparisons,
        seed_variance=float(parts.seed) * seeds,
        document_variance=float(document),
    )


def _seed_names(
    seeds_a: Sequence[int] | None, seeds_b: Sequence[int] | None, count_a: int, count_b: int
) -> tuple[list[int], list[int]]:
    if seeds_a is None and seeds_b is None:
        if count_a == count_b:
            return list(range(count_a)), list(range(count_b))
        return list(range(count_a)), list(range(-count_b, 0))
    if seeds_a is None or seeds_b is None:
        raise ValueError("Give seeds_a and seeds_b, or neither.")
    for name, seeds, count in (("seeds_a", seeds_a, count_a), ("seeds_b", seeds_b, count_b)):
        if len(seeds) != count or len(set(seeds)) != count:
            raise ValueError(f"{name} = {list(seeds)}; it names each of {count} rows with a seed of its own.")
    return list(seeds_a), list(seeds_b)


def _checked(nats: np.ndarray, tokens: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray, str]:
    scores, counts = np.asarray(nats, dtype=np.float64), np.asarray(tokens, dtype=np.float64)
    if scores.ndim == 1:
        scores = scores[None]
    if counts.ndim != 1 or scores.ndim != 2 or scores.shape[1] != len(counts) or not len(scores):
        raise ValueError(
            f"{name} has shape {np.shape(nats)} and tokens {np.shape(tokens)}; they are (seeds, documents) and "
            "(documents,), of the same documents."
        )
    if not (np.isfinite(scores).all() and np.isfinite(counts).all() and (counts >= 0).all()):
        raise ValueError(f"{name} and tokens are finite sums and counts of 0 or more; a run may have diverged.")
    kept = counts > 0
    note = "" if kept.all() else f"{int((~kept).sum())} documents without tokens left out"
    if kept.sum() < 2:
        raise ValueError(
            f"documents = {int(kept.sum())} with tokens; an interval needs 2 or more, as its error comes from how "
            "documents differ. Score more text, or report the mean alone."
        )
    scores, counts = scores[:, kept], counts[kept]
    if len(np.unique(scores, axis=0)) < len(scores):
        raise ValueError(
            f"{name}: two seeds gave every document the same sum. They are the same run twice, which is no "
            "evidence of seed noise; give each run once."
        )
    return scores, counts, note
