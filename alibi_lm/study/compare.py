"""Whether a difference between two sets of runs is settled: the interval around it, and the answer.

Everything is left minus right: in mean nats per token, whose exp is the ratio of perplexities, or in the metric
itself. If there are sums per document, the interval is over seeds and documents, else over seeds only (a t test,
which is about this text only). Claims and `compare_runs.py` both judge "is A better than B" here.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Any, Literal, NamedTuple

import numpy as np

from alibi_lm.results.curves import View, curves, items_of, point_of, view_of, views
from alibi_lm.results.documents import DocumentSums
from alibi_lm.results.rows import ResultRow, RowKey
from alibi_lm.results.speeds import medians_half_width, pairs_to_settle
from alibi_lm.results.statistics import (
    Interval,
    half_width,
    mean_nats_interval,
    paired_difference,
    seeds_to_settle,
    share_variance,
)
from alibi_lm.study.paper_claims import Relation
from alibi_lm.study.style import label

Verdict = Literal["HOLDS", "FAILS", "NOT SETTLED", "NOT RUN"]
VERDICTS: tuple[Verdict, ...] = ("HOLDS", "FAILS", "NOT SETTLED", "NOT RUN")
LEVEL = 0.95
ONE_SEED_MARGIN = 0.005
"""Nats by which one seed without document sums must clear the bound. The paper's own curves move by 0.05 of 18
(0.003) between neighbouring lengths, from where window borders fall."""


@dataclass(frozen=True)
class Measured:
    """A difference of means and the interval around it; no interval with one seed and no document sums."""

    estimate: float
    low: float | None
    high: float | None
    seeds: int
    """Number of seeds on the side that has fewer, or of pairs of seeds; of a speed, of pairs of steps."""
    over: str
    """What the interval is over, in words, or why there is none."""
    seed_variance: float = 0.0
    document_variance: float = 0.0
    document_df: float = 30.0
    """As in `alibi_lm.results.statistics.Interval`."""
    comparisons: int = 1
    metric: str = "perplexity"
    spreads: tuple[float, ...] | None = None
    """Of a ratio of two speeds: the distance of each one's quartiles, as logarithms; empty if unknown."""

    @property
    def counted(self) -> str:
        """What `seeds` counts."""
        return "seeds" if self.spreads is None else "pairs"

    @property
    def logs(self) -> bool:
        """Whether the values are logarithms of a ratio."""
        return self.metric in ("perplexity", "ratio")

    @property
    def ratio(self) -> str:
        """As text: `1.950 [1.902, 1.999]`, perplexity left over right; for other metrics left minus right."""

        def show(value: float) -> str:
            return f"{_exp(value):.3f}" if self.logs else f"{value:+.3f}"

        if self.low is None or self.high is None:
            return show(self.estimate)
        return f"{show(self.estimate)} [{show(self.low)}, {show(self.high)}]"


@dataclass(frozen=True)
class Sample:
    """What the runs of one side measured, by document if that is known."""

    values: dict[Any, float]
    """Seed (the run, where a seed is unknown or comes twice) -> mean nats per token, or value of the metric."""
    nats: np.ndarray | None = None
    """(seeds, documents), sums of nats, with seeds in the order of `values`."""
    tokens: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """(documents,), numbers of targets; empty if there are no sums."""
    why: str = ""
    """Why there are no sums per document."""
    metric: str = "perplexity"
    """`perplexity` or `ratio`, whose values are logarithms; `accuracy`; or `number`, a view's."""
    items: int = 0
    """For accuracies: the number of items that each is a share of."""

    @property
    def seeds(self) -> list[Any]:
        """The seeds of the runs."""
        return list(self.values)

    def minus(self, other: Sample) -> Sample:
        """The difference within each common seed, such as a scheme against itself at another length."""
        seeds = [seed for seed in self.values if seed in other.values]
        found = replace(self, values={seed: self.values[seed] - other.values[seed] for seed in seeds})
        if self.nats is None or other.nats is None or not np.array_equal(self.tokens, other.tokens):
            return replace(found, nats=None, why=self.why or other.why or OTHER_DOCUMENTS)
        mine, theirs = ([one.seeds.index(seed) for seed in seeds] for one in (self, other))
        return replace(found, nats=self.nats[mine] - other.nats[theirs])


TOO_CLOSE = "too close to the bound for more {} to settle it"
OTHER_DOCUMENTS = "other documents on the two sides"


def sample(rows: Sequence[ResultRow], documents: Mapping[RowKey, DocumentSums]) -> Sample:
    """What these rows measured.

    Args:
        rows: with values, one per seed, of one metric and length.
        documents: sums by row key, if there are any.
    """
    seeds = [row.seed for row in rows]
    unique = None not in seeds and len(set(seeds)) == len(seeds)
    points = ((row, point_of(row)) for row in rows)
    values = {row.seed if unique else row.run: value for row, value in points if value is not None}
    found = Sample(values, metric=rows[0].metric, items=min(items_of(row) for row in rows))
    if any(row.key not in documents for row in rows):
        return replace(found, why="no sums per document")
    if not all(_adds_up(row, documents[row.key]) for row in rows):
        return replace(found, why="sums per document are of another evaluation: evaluate again")
    if not unique:
        return replace(found, why="seeds are unknown or come twice")
    tokens = documents[rows[0].key].tokens
    if any(not np.array_equal(tokens, documents[row.key].tokens) for row in rows):
        return replace(found, why=OTHER_DOCUMENTS)
    if np.count_nonzero(tokens) < 2:
        return replace(found, why="the text is one document, which does not show how documents differ")
    return replace(found, nats=np.stack([documents[row.key].nats for row in rows]), tokens=tokens)


def _adds_up(row: ResultRow, sums: DocumentSums) -> bool:
    """Whether the documents of a row have its loss; a process may have died between writing one and the other."""
    return row.nats is None or math.isclose(row.nats, float(sums.nats.sum()), rel_tol=1e-6)


def measure(left: Sample, right: Sample | None, comparisons: int = 1) -> Measured:
    """Left minus right (None: minus 0), in mean nats per token (for other metrics: in the metric).

    Args:
        left: values by seed.
        right: likewise; runs of the same seed are paired.
        comparisons: how many differences are judged together (each interval is widened accordingly).
    """
    if left.metric == "accuracy":
        return _over_seeds(left, right, comparisons)
    found = _over_documents(left, right, comparisons)
    return found if isinstance(found, Measured) else _over_seeds(left, right, comparisons, found)


class Speed(NamedTuple):
    """Speed relative to a third model, over pairs of steps."""

    median: float
    quartiles: Sequence[float] | None
    pairs: int


def measure_speeds(left: Speed, right: Speed, comparisons: int = 1) -> Measured:
    """The ratio of two speeds, with the interval that the scatter of the pairs gives.

    Args:
        left: numerator.
        right: denominator.
        comparisons: how many ratios are judged together.
    """
    estimate, pairs = math.log(left.median / right.median), min(left.pairs, right.pairs)
    found = Measured(estimate, None, None, pairs, "", comparisons=comparisons, metric="ratio")
    if left.quartiles is None or right.quartiles is None or not pairs:
        return replace(found, seeds=0, over="spread unknown", spreads=())
    distances = [math.log(high / low) for low, high in (left.quartiles, right.quartiles)]
    spreads = [(distances[0], left.pairs), (distances[1], right.pairs)]
    half = medians_half_width(spreads, 1 - (1 - LEVEL) / comparisons)
    over = f"{pairs} pairs"
    return replace(found, low=estimate - half, high=estimate + half, over=over, spreads=tuple(distances))


def judge(measured: Measured, relation: Relation, bound: float, min_seeds: int) -> Verdict:
    """The verdict on "left over right (for other metrics left minus right) is `relation` `bound`".

    Args:
        measured: the difference, in nats or in the metric.
        relation: `below`, `above` or `within` (between 1 / bound and bound; for a difference, -bound and bound).
        bound: bound on the ratio, positive, and above 1 for `within`; for other metrics, on the difference.
        min_seeds: with fewer seeds nothing is settled.
    """
    if measured.seeds < min_seeds:
        return "NOT SETTLED"
    low, high = measured.low, measured.high
    if low is None or high is None:
        low, high = measured.estimate - ONE_SEED_MARGIN, measured.estimate + ONE_SEED_MARGIN
    bound = math.log(bound) if measured.logs else bound
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


def power_note(measured: Measured, relation: Relation, bound: float) -> str:
    """How many seeds would settle it, in words; an estimate from the scatter of the available seeds.

    If the documents alone leave it open, no number of seeds settles it: then it also says how much text is needed.
    """
    if measured.seeds < 2 or measured.low is None:
        return "needs 2 seeds or more to see how seeds differ"
    bound = math.log(bound) if measured.logs else bound
    bounds = [-bound, bound] if relation == "within" else [bound]
    gap = min(abs(measured.estimate - b) for b in bounds)
    level = 1 - (1 - LEVEL) / measured.comparisons
    if measured.spreads is not None:
        pairs = pairs_to_settle(gap, measured.spreads, level)
        return f"about {pairs} pairs would settle it" if pairs else TOO_CLOSE.format("pairs")
    for text in (1, 2, 5, 10, 20, 50, 100) if measured.document_variance else (1,):
        of_documents = measured.document_variance / text, level, measured.document_df * text
        seeds = seeds_to_settle(gap, measured.seed_variance, *of_documents)
        if seeds is not None:
            # An estimate of no more than the present seeds would say that it is settled already.
            seeds = max(seeds, measured.seeds + (text == 1))
            more = (
                f" and {text} times the {'items' if measured.metric == 'accuracy' else 'text'}" if text > 1 else ""
            )
            return f"about {seeds} seeds{more} would settle it"
    return TOO_CLOSE.format("seeds")


def is_better(
    a: Sequence[ResultRow],
    b: Sequence[ResultRow],
    documents: Mapping[RowKey, DocumentSums],
    lengths: Sequence[int],
) -> list[str]:
    """Whether A is better than B at each inference length, all judged together (intervals are widened for that).

    Args:
        a: rows of A's runs, from `select`.
        b: rows of B's.
        documents: document sums by row key.
        lengths: inference lengths.

    Returns:
        Lines with YES (A is better), NO (B is), NOT SETTLED, or NOT RUN. One seed settles nothing about schemes.

    Raises:
        ValueError: A and B were scored on different texts.
    """
    lines = []
    for length in lengths:
        answer, measured, note = answer_at(a, b, documents, length, len(lengths))
        if measured is None:
            lines.append(f"{length:>8}  {answer:<11}  {note}")
            continue
        note += f"; {power_note(measured, *_better(measured))}" if answer == "NOT SETTLED" else ""
        ends = f" [{measured.low:+.4f}, {measured.high:+.4f}]" if measured.low is not None else ""
        text = a[0].metric == "perplexity"
        unit = f"nats, perplexity x {measured.ratio}" if text else a[0].metric
        lines.append(f"{length:>8}  {answer:<11}  {measured.estimate:+.4f}{ends} {unit}  ({note})")
    return lines


def answer_at(
    a: Sequence[ResultRow],
    b: Sequence[ResultRow],
    documents: Mapping[RowKey, DocumentSums],
    length: int,
    comparisons: int,
) -> tuple[str, Measured | None, str]:
    """The answer at one length, the difference A minus B, and a note for the reader."""
    sides = [[row for row in side if row.inference_length == length] for side in (a, b)]
    for side, name in zip(sides, "AB", strict=True):
        refused = [row.reason for row in side if point_of(row) is None] if side else ["not evaluated there"]
        if refused:
            return "NOT RUN", None, f"{name} has no value: {refused[0]}"
    texts = {row.corpus for side in sides for row in side}
    if len(texts) > 1:
        hashes = ", ".join(sorted(text or "unknown" for text in texts))
        raise ValueError(
            f"A and B were scored on different texts at length {length} ({hashes}); evaluate both on the same one"
        )
    measured = measure(sample(sides[0], documents), sample(sides[1], documents), comparisons)
    verdict = judge(measured, *_better(measured), 2)
    return {"HOLDS": "YES", "FAILS": "NO"}.get(verdict, verdict), measured, measured.over


def _better(measured: Measured) -> tuple[Relation, float]:
    """The relation and bound that mean "left is better": a lower perplexity, or a higher share."""
    return ("below", 1.0) if measured.logs else ("above", 0.0)


def select(
    rows: Sequence[ResultRow], pattern: str, view: View, name: str, words: Mapping[str, str] | None = None
) -> list[ResultRow]:
    """Rows of the runs that a pattern means, which must be seeds of each other.

    Args:
        rows: of one experiment.
        pattern: a run's name or a glob of names (`alibi_L64_s*`); only the last part of a path counts.
        view: selects among the rows.
        name: name of the setting, for messages.
        words: recipes of the runs.

    Raises:
        ValueError: no such run, or runs that differ in more than their seed.
    """
    glob = PurePath(pattern).name
    named = {row.run for row in rows if row.run is not None}
    wanted = {run for run in named if run == glob or fnmatch.fnmatchcase(PurePath(run).name, glob)}
    found = [row for row in rows if row.run in wanted and view_of(row) == view]
    if not found:
        known = "; ".join(known_view.title for known_view in views([r for r in rows if r.run in wanted]))
        reason = f"its runs have {known} only" if known else f"runs here: {', '.join(sorted(named)) or 'none'}"
        raise ValueError(f"{name} = {pattern} has no results for {view.title}; {reason}")
    groups = curves(found, view, words)
    if len(groups) > 1:
        kinds = ", ".join(f"{c.position} L={c.train_length} {c.variant}".strip() for c in groups)
        raise ValueError(
            f"{name} = {pattern} means runs that are not seeds of each other ({kinds}); name one kind"
        )
    return found


def common_lengths(a: Sequence[ResultRow], b: Sequence[ResultRow]) -> list[int]:
    """Inference lengths at which both have rows, rising."""
    sides = [{row.inference_length for row in side if row.inference_length is not None} for side in (a, b)]
    return sorted(sides[0] & sides[1])


def title(rows: Sequence[ResultRow]) -> str:
    """Name of one side: scheme, training length, seeds."""
    seeds = sorted({"?" if row.seed is None else str(row.seed) for row in rows})
    named = f"seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)}"
    return f"{label(rows[0].position)} trained at {rows[0].train_length} ({named})"


def _over_documents(left: Sample, right: Sample | None, comparisons: int) -> Measured | str:
    """The difference over seeds and documents, or why there is none over documents."""
    if left.nats is None or (right and right.nats is None):
        return left.why or (right.why if right else "")
    if right and not np.array_equal(left.tokens, right.tokens):
        return OTHER_DOCUMENTS
    try:
        if right is None:
            level = 1 - (1 - LEVEL) / comparisons
            found: Interval = mean_nats_interval(left.nats, left.tokens, level)
        else:
            assert right.nats is not None
            seeds = left.seeds, right.seeds
            found = paired_difference(left.nats, right.nats, left.tokens, *seeds, LEVEL, comparisons)
    except ValueError as error:  # seeds that agree exactly
        return str(error).partition(".")[0]
    common = left.seeds if right is None else [seed for seed in left.values if seed in right.values]
    count = len(common) if right is None or len(common) >= 2 else min(len(left.seeds), len(right.seeds))
    documents = f"{np.count_nonzero(left.tokens)} documents"
    over = f"{count} seeds and {documents}" if count > 1 else f"{documents}, one seed"
    over += f"; {found.note}" if found.note else ""
    spread = found.seed_variance, found.document_variance, found.document_df
    return Measured(found.estimate, found.low, found.high, count, over, *spread, comparisons, left.metric)


def _over_seeds(left: Sample, right: Sample | None, comparisons: int, why: str = "") -> Measured:
    """The difference over seeds, paired if two or more are common to both sides: a t test, Welch's without pairs.

    For accuracies it is over items too. The sides are assumed to answer independently, which is the most that
    items can add, unless one side is right where the other is wrong.
    """
    from scipy import stats

    sides = [left] if right is None else [left, right]
    common = [seed for seed in left.values if all(seed in side.values for side in sides)]
    paired = len(common) >= min(2, *(len(side.values) for side in sides))
    x = [np.array([side.values[seed] for seed in (common if paired else side.values)]) for side in sides]
    groups = [x[0] - sum(x[1:])] if paired else x
    center, count = float(x[0].mean() - sum(y.mean() for y in x[1:])), min(map(len, x))
    one = f"seed {common[0]} alone" if common else "one seed"
    level = 1 - (1 - LEVEL) / comparisons
    variance = sum(float(y.var(ddof=1)) for y in groups) if count > 1 else 0.0
    if left.metric == "accuracy":
        of_seeds = sum(float(y.var(ddof=1)) / len(y) for y in groups) if count > 1 else 0.0
        of_items = sum(share_variance(float(y.mean()), side.items) for y, side in zip(x, sides, strict=True))
        items = min(side.items for side in sides)
        half = float(half_width(of_seeds, of_items, count, items - 1.0, level))
        over = f"{count} seeds{', paired' if paired and right else ''}" if count > 1 else one
        spread = variance, of_items, math.inf
        least = 0.0 if right is None else -1.0  # a share; a difference of two
        ends = max(least, center - half), min(1.0, center + half)
        return Measured(center, *ends, count, f"{over} and {items} items", *spread, comparisons, left.metric)
    if count < 2:
        words = f"{one}; {why}" if why else one
        return Measured(center, None, None, 1, words, comparisons=comparisons, metric=left.metric)
    over = f"{count} seeds, paired" if paired else f"{len(x[0])} and {len(x[1])} seeds"
    low, high = center, center
    if variance > 1e-24:  # else no spread at all
        test = stats.ttest_1samp(groups[0], 0) if paired else stats.ttest_ind(*x, equal_var=False)
        low, high = map(float, test.confidence_interval(level))
    words = f"{over}; {why}" if why else over
    return Measured(center, low, high, count, words, variance, comparisons=comparisons, metric=left.metric)


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 50 else math.inf
