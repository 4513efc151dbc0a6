"""Intervals and verdicts from sums of nats per document and seed.

Documents are a sample of text, seeds a sample of training runs, and every seed scores the same documents:
two crossed random factors. So a mean loss has two errors. More text does not reduce the error from the
seeds, and more seeds do not reduce the error from the documents. The intervals here cover both.

Formula, with a seeds s, D documents d, x_sd nats and t_d tokens:
    R_s  = sum_d x_sd / sum_d t_d            estimate = mean_s R_s
    e_sd = sqrt((D - 1) / D) (x_sd - R_s t_d) / (T (1 - h_d)),  T = sum_d t_d, h_d = t_d / T, e_d = mean_s e_sd
    seed part      = variance of R_s (divisor a - 1) / a, with a - 1 degrees of freedom
    document part  = sum_d e_d^2 - sum_sd (e_sd - e_d)^2 / (a (a - 1)), at least 0,
                     with 1 / sum_d h_d^2 - 1 degrees of freedom
    half width     = critical value(share of the seed part) * sqrt(seed part + document part)
The seed part already holds the interaction of seeds with documents, hence the subtraction.

Source: Behrens (1929) and Fisher (1935) for the critical value. docs/statistics.md explains each term and has the
measured coverage; scripts/coverage.py measures it again.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

POWER, MOST = 0.8, 10_000
"""Of an estimate of how many seeds or pairs settle something: chance that they do, and the largest number."""
ANGLES = np.linspace(0, np.pi / 2, 25)
"""Where the critical value is computed; in between it is interpolated."""


@dataclass(frozen=True)
class Interval:
    """An estimate with the interval around it, in nats per token."""

    estimate: float
    """A mean, or a difference of two."""
    low: float
    high: float
    note: str
    """What was left out; empty otherwise."""
    seed_variance: float
    """Variance between seeds, in nats squared: of their differences if paired, else the sum of that of both sides.
    Divided by the number of seeds it is the seeds' part of the squared error; 0 with one seed."""
    document_variance: float
    """The documents' part of the squared error, which more seeds do not reduce."""
    document_df: float
    """Degrees of freedom of that part."""


class VarianceParts(NamedTuple):
    """An estimate and the parts of its squared error, from nats per token; arrays over the input's leading axes.

    `documents_seen` is the observed scatter of the documents, which still contains `interaction`.
    """

    estimate: np.ndarray
    seed: np.ndarray
    documents_seen: np.ndarray
    interaction: np.ndarray
    document_df: np.ndarray

    @property
    def document(self) -> np.ndarray:
        """The documents' part of the squared error, without the interaction; at least 0."""
        return np.maximum(self.documents_seen - self.interaction, 0)


def per_document_sums(
    nats_per_token: np.ndarray, document_starts: np.ndarray, scored: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Sums of nats and numbers of tokens per document, summed in float64.

    Args:
        nats_per_token: (tokens,) float, of one seed, in stream order.
        document_starts: (documents,) integer, rising, the first 0: index of the first token of each document.
        scored: (tokens,) bool; tokens to count. None: all of them.

    Returns:
        sums (documents,) float64 in nats; counts (documents,) int64, 0 where nothing was scored.

    Raises:
        ValueError: a scored value that is not finite.
    """
    starts = np.asarray(document_starts, dtype=np.int64)
    used = np.ones(len(nats_per_token), dtype=bool) if scored is None else scored
    assert len(starts) and starts[0] == 0 and (np.diff(starts) > 0).all() and starts[-1] < len(nats_per_token)
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
        Arrays of shape (...). With one seed, seed part and interaction cannot be estimated and are 0.
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
    # With very unequal lengths there is hardly more than one effective document; t needs a positive number.
    document_df = np.maximum(1 / (share**2).sum(-1) - 1, 0.5)
    return VarianceParts(rates.mean(-1), seed, seen, interaction, document_df)


def critical_value(share: np.ndarray, seed_df: np.ndarray, document_df: np.ndarray, level: float) -> np.ndarray:
    """The factor of the standard error in a half width: the Behrens-Fisher value.

    It is the quantile of sqrt(share) T_seed + sqrt(1 - share) T_document with T independent t variables.

    Args:
        share: seed part / (seed part + document part), in [0, 1]; any shape, as are the next two.
        seed_df: degrees of freedom of the seed part, positive.
        document_df: degrees of freedom of the document part.
        level: two-sided level, in (0, 1).
    """
    share, seed_df, document_df = np.broadcast_arrays(share, seed_df, document_df)
    angle = np.arcsin(np.sqrt(share))
    below = np.clip(np.searchsorted(ANGLES, angle, side="right") - 1, 0, len(ANGLES) - 2)
    # Degrees of freedom are rounded down (to the safe side), so that few quantiles are needed.
    cases = np.stack([below, *(np.where(df >= 1, np.floor(df), df) for df in (seed_df, document_df))], -1)
    value = np.empty(share.shape)
    for case in np.unique(cases.reshape(-1, 3), axis=0):
        k, chosen = int(case[0]), (cases == case).all(-1)
        ends = [_behrens_fisher(n, float(case[1]), float(case[2]), (1 + level) / 2) for n in (k, k + 1)]
        value[chosen] = np.interp(angle[chosen], ANGLES[k : k + 2], ends)
    return value


def _behrens_fisher(number: int, seed_df: float, document_df: float, upper: float) -> float:
    """The quantile of sin(angle) T_seed + cos(angle) T_document at an angle, given by its number in ANGLES."""
    from scipy import stats

    if seed_df > document_df:
        return _behrens_fisher(len(ANGLES) - 1 - number, document_df, seed_df, upper)
    if number == 0:
        return float(stats.t.ppf(upper, document_df))
    block, place = divmod(number - 1, 4)
    return float(_four_quantiles(1 + 4 * block, seed_df, document_df, upper)[place])


@lru_cache(maxsize=1 << 12)
def _four_quantiles(first: int, seed_df: float, document_df: float, upper: float) -> np.ndarray:
    """The quantiles at four neighbouring angles, (4,); seed_df <= document_df."""
    from scipy import special, stats

    # Probability of a sum by quadrature over the part with the lighter tail, with the exact cdf of the other.
    lighter, weights = _quadrature(document_df)
    angles = ANGLES[first : first + 4, None]
    sine, cosine = np.sin(angles), np.cos(angles)
    low, high = np.zeros(4), np.full(4, 2 * stats.t.ppf(upper, seed_df))
    for _ in range(45):
        middle = (low + high) / 2
        below = special.stdtr(seed_df, (middle[:, None] - cosine * lighter) / sine) @ weights / 2
        low, high = np.where(below < upper, middle, low), np.where(below < upper, high, middle)
    return (low + high) / 2


@lru_cache(maxsize=512)
def _quadrature(df: float) -> tuple[np.ndarray, np.ndarray]:
    """Values (200,) of a t variable and their weights (200,), which add up to 2."""
    from scipy import stats

    nodes, weights = np.polynomial.legendre.leggauss(200)
    return stats.t.ppf((nodes + 1) / 2, df), weights


def half_width(
    of_seeds: np.ndarray | float,
    of_rest: np.ndarray | float,
    seeds: int,
    rest_df: np.ndarray | float,
    level: float,
) -> np.ndarray:
    """Half width of the interval of a mean or a difference, from the parts of its squared error; any shape.

    Args:
        of_seeds: the seeds' part; 0 with one seed.
        of_rest: the part of documents, or of items (`share_variance`); for a difference of shares the sum of both.
        seeds: 1 or more; of a difference the smaller number on either side.
        rest_df: degrees of freedom of that part.
        level: in (0, 1).
    """
    from scipy import stats

    variance = np.asarray(of_seeds + of_rest)
    if seeds < 2:
        return stats.t.ppf((1 + level) / 2, rest_df) * np.sqrt(variance)
    share = np.divide(of_seeds, variance, out=np.ones_like(variance), where=variance > 0)
    return critical_value(share, np.asarray(seeds - 1.0), np.asarray(rest_df), level) * np.sqrt(variance)


def mean_nats_interval(nats: np.ndarray, tokens: np.ndarray, level: float = 0.95) -> Interval:
    """Mean nats per token over documents and seeds, each token with the same weight.

    Args:
        nats: (seeds, documents), sums of nats of the same documents under each seed.
        tokens: (documents,), tokens in each sum. Documents without tokens are left out; the note says so.
        level: in (0, 1).

    Raises:
        ValueError: fewer than two documents, other shapes, values that are not finite, negative tokens, or two
            seeds that scored every document identically.
    """
    scores, counts, note = _checked(nats, tokens, "nats")
    parts = variance_parts(scores, counts)
    return _interval(parts, len(scores), float(parts.seed) * len(scores), level, 1, note)


def paired_difference(
    nats_a: np.ndarray,
    nats_b: np.ndarray,
    tokens: np.ndarray,
    seeds_a: Sequence[int],
    seeds_b: Sequence[int],
    level: float = 0.95,
    comparisons: int = 1,
) -> Interval:
    """A minus B in mean nats per token, paired by document and, if possible, by seed. Negative: A is better.

    If there are two or more common seeds, they are paired and the others left out: runs of one seed share their
    data order, so pairing cannot mislead and mostly helps. Otherwise the seeds of A and of B are two independent
    samples. Documents are always paired.

    Args:
        nats_a: (seeds of A, documents), sums of nats per document.
        nats_b: (seeds of B, documents), of the same documents.
        tokens: (documents,), the same for both.
        seeds_a: seed of each row of nats_a, all different.
        seeds_b: seed of each row of nats_b.
        level: in (0, 1), level of the whole family of `comparisons`.
        comparisons: how many differences are judged together, usually the number of lengths; each interval is then
            at level 1 - (1 - level) / comparisons (Bonferroni).

    Raises:
        ValueError: as `mean_nats_interval`; or A and B have different documents.
    """
    a, counts, note = _checked(nats_a, tokens, "nats_a")
    b, _, _ = _checked(nats_b, tokens, "nats_b")
    rows_a, rows_b = dict(zip(seeds_a, a, strict=True)), dict(zip(seeds_b, b, strict=True))
    assert len(rows_a) == len(a) and len(rows_b) == len(b)
    common = [seed for seed in rows_a if seed in rows_b]
    if len(common) >= min(2, len(a), len(b)):
        if left := len(a) + len(b) - 2 * len(common):
            note += f"; {left} runs left out: their seed is not in both"
        parts = variance_parts(np.stack([rows_a[seed] - rows_b[seed] for seed in common]), counts)
        return _interval(parts, len(common), float(parts.seed) * len(common), level, comparisons, note)
    note += "; seeds not paired: fewer than two in common"
    part_a, part_b = variance_parts(a, counts), variance_parts(b, counts)
    # Documents: the mean over the seeds of each side, then the difference, so that common effects cancel.
    both = variance_parts((a.mean(0) - b.mean(0))[None], counts)
    parts = both._replace(seed=part_a.seed + part_b.seed, interaction=part_a.interaction + part_b.interaction)
    spread = float(part_a.seed) * len(a) + float(part_b.seed) * len(b)
    return _interval(parts, min(len(a), len(b)), spread, level, comparisons, note)


def seeds_to_settle(
    gap: float, seed_variance: float, document_variance: float, level: float = 0.95, document_df: float = 30.0
) -> int | None:
    """An estimate of how many seeds would settle a difference, if it and the scatter stay as observed.

    With that many seeds about four of five such experiments have an interval that leaves out the bound: the
    smallest a >= 2 with gap >= (critical value + z) * sqrt(seed_variance / a + document_variance), z the normal
    quantile of 0.8. Few seeds say little about their variance, so take it as an order of magnitude.

    Source: the usual sample size for a power of 0.8, as in Cohen (1988), "Statistical Power Analysis for the
    Behavioral Sciences", section 2.4, with the critical value of these intervals instead of Student's.

    Args:
        gap: distance between the estimate and the bound that it must clear, in nats; not negative.
        seed_variance: variance between seeds, in nats squared.
        document_variance: the documents' part of the squared error, which more seeds do not reduce.
        level: level of each interval, in (0, 1).
        document_df: degrees of freedom of the documents' part, positive.

    Returns:
        Number of seeds, 2 to 10,000; None if that many are not enough.
    """
    from scipy import stats

    power = float(stats.norm.ppf(POWER))
    # With many seeds only the documents' part is left.
    if gap < (float(stats.t.ppf((1 + level) / 2, document_df)) + power) * np.sqrt(document_variance):
        return None

    def enough(seeds: int) -> bool:
        variance = seed_variance / seeds + document_variance
        half = half_width(seed_variance / seeds, document_variance, seeds, document_df, level)
        return bool(gap > 0 and gap >= half + power * np.sqrt(variance))

    return fewest(enough)


def fewest(enough: Callable[[int], bool]) -> int | None:
    """The smallest number from 2 to 10,000 that is enough, if any is; all larger ones are, too."""
    high = 2
    while not enough(min(high, MOST)):
        if high >= MOST:
            return None
        high *= 2
    between = range(max(2, high // 2), min(high, MOST))
    return between.start + bisect.bisect_left(between, True, key=enough)


def wilson_interval(share: float, trials: int) -> tuple[float, float]:
    """The 95% interval of a share such as an accuracy, from independent trials.

    Source: Wilson (1927), "Probable inference, the law of succession, and statistical inference".

    Args:
        share: successes over trials, in [0, 1].
        trials: 1 or more.
    """
    from scipy import stats

    z2 = float(stats.norm.ppf(0.975)) ** 2
    center = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = np.sqrt(z2 * (share * (1 - share) + z2 / (4 * trials)) / trials) / (1 + z2 / trials)
    return max(0.0, float(center - half)), min(1.0, float(center + half))


def accuracy_interval(shares: Sequence[float], items: int) -> tuple[float, float]:
    """The 95% interval of a mean accuracy over seeds that were all tested on the same items.

    One seed: Wilson's, which says nothing about another training run. Several: the variance of the seeds' mean
    plus that of a share of `items` independent ones, the most that the choice of items can add. For the latter two
    successes and two failures are added (Agresti and Coull 1998). The critical value is `critical_value`.

    Args:
        shares: accuracy of each seed, in [0, 1].
        items: number of items, 2 or more; not of questions, as the answers in an item are not independent.
    """
    mean = float(np.mean(shares))
    if len(shares) == 1:
        return wilson_interval(mean, items)
    of_seeds = float(np.var(shares, ddof=1)) / len(shares)
    half = float(half_width(of_seeds, share_variance(mean, items), len(shares), items - 1.0, 0.95))
    return max(0.0, mean - half), min(1.0, mean + half)


def share_variance(share: float, items: int) -> float:
    """Squared error of a share of independent items, with two successes and two failures added."""
    share = (share * items + 2) / (items + 4)
    return share * (1 - share) / (items + 4)


def _interval(
    parts: VarianceParts, seeds: int, seed_variance: float, level: float, comparisons: int, note: str
) -> Interval:
    """The interval of parts of shape (); `seeds` is the smaller number on either side."""
    assert 0 < level < 1 and comparisons >= 1
    one = seeds < 2  # the interval is then of this training run alone
    of_seeds, of_documents = (0.0, parts.documents_seen) if one else (parts.seed, parts.document)
    each = 1 - (1 - level) / comparisons
    half = float(half_width(of_seeds, of_documents, seeds, parts.document_df, each))
    estimate = float(parts.estimate)
    return Interval(
        estimate,
        estimate - half,
        estimate + half,
        note.removeprefix("; "),
        seed_variance=seed_variance,
        document_variance=float(of_documents),
        document_df=float(parts.document_df),
    )


def _checked(nats: np.ndarray, tokens: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray, str]:
    scores, counts = np.asarray(nats, dtype=np.float64), np.asarray(tokens, dtype=np.float64)
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
