"""The views of an analysis: from the passes of some runs to plain numbers with intervals.

A view takes the seeds of one curve, all scored on the same text, and gives a list of points. A point is a plain
mapping: its place (`length`, `context`, `offset`, ...), the mean `nats` per token over seeds and documents,
its 95% interval `low` to `high`, and each seed's mean in `by_run`. If a model cannot be scored, or the text
has no such window, `nats` is None and `reason` says why.

The difficulty of the text moves all points of a curve alike. So points also have a `difference` from the point at
the trained length, paired by document, whose interval is far narrower: it says whether the loss has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from alibi_lm.data.windows import positions_in_window
from alibi_lm.evaluate.passes import Passes
from alibi_lm.results.statistics import mean_nats_interval, per_document_sums
from alibi_lm.settings import require

TERMS = ("early_tokens", "positions_beyond", "keys_beyond")
"""The three parts of the decomposition, in the order in which they add up."""
BINS_PER_OCTAVE = 4
"""Ratio of neighbouring bin edges in the smoothed curve: each bin is 19% wide in position."""
ONE_DOCUMENT = "the text is one document, so nothing shows how documents differ: there are no intervals"
"""Why points and rows of some texts have no intervals."""

Point = dict[str, Any]


@dataclass
class Group:
    """Runs that differ only in their seed, ready to be scored, all on the same text."""

    position: str
    train_length: int
    passes: list[Passes]

    def __post_init__(self) -> None:
        text = self.passes[0].text
        self.labels = [p.model.label for p in self.passes]
        self.documents = text.groups(self.train_length)
        """(D,) int64, where documents start."""
        self.num_tokens = text.num_targets(self.train_length)
        self.note = ONE_DOCUMENT if len(self.documents) == 1 else ""
        """What a reader of the points must know; empty if there is nothing."""

    def reason(self, length: int, window: bool = False, stride: int | None = None) -> str:
        """Why windows of this length cannot be scored, or hold no text; empty if they can."""
        text = replace(self.passes[0].text, stride=stride)
        reasons = [text.refuses(length), *(p.refuses(length, window=window) for p in self.passes)]
        return next(filter(None, reasons), "")

    def points(
        self,
        name: str,
        values: Iterable[int],
        measured: Callable[[int], Point],
        refuses: Callable[[int], str] | None = None,
        *,
        base: int | None = None,
        paired: bool = False,
        empty: Sequence[str] = ("nats", "low", "high"),
        **at: Any,
    ) -> list[Point]:
        """A point for each value of the quantity `name`: what is measured there, or why nothing is.

        Args:
            name: length, context, ...
            values: where there are points.
            measured: gives the point at a value, made by `mean` or `over` if others are compared with it.
            refuses: says why there is no point at a value; None: `reason`.
            base: the value to whose point the others' `difference` refers, if there is one.
            paired: whether all points have the same targets, so that differences are those of single targets.
            empty: fields that are None in a point without a value.
            at: further fields of each point.
        """
        points: list[Point] = []
        for value in values:
            reason = (refuses or self.reason)(value)
            nothing: Point = {**dict.fromkeys(empty), "reason": reason}
            points.append({name: value} | at | (nothing if reason else measured(value)))
        made = [(point, point.pop("sums")) for point in points if "sums" in point]
        valued = [(point, sums) for point, sums in made if point["nats"] is not None]
        start = next((sums for point, sums in valued if point[name] == base), None)
        if start is None:
            return points
        for point, (sums, tokens) in valued:
            changed, weights = (sums - start[0], tokens) if paired else change_sums(sums, tokens, *start)
            change = self.point(changed, weights)
            if np.count_nonzero(tokens) < 2:  # one document does not show how documents differ
                change |= {"low": None, "high": None}
            point["difference"] = {"from": base} | {key: change[key] for key in ("nats", "low", "high")}
            if paired:
                point["difference"]["by_document"] = _by_document(changed, tokens)
        return points

    def mean(self, nats: Sequence[np.ndarray], scored: np.ndarray | None = None) -> Point:
        """A point of the mean nats (N,) of each run, over the targets that are `scored`, (N,) bool; None: all."""
        both = [per_document_sums(n, self.documents, scored) for n in nats]
        sums, tokens = np.stack([sums for sums, _ in both]), both[0][1]
        return self.point(sums, tokens) | {"sums": (sums, tokens)}

    def over(self, targets: np.ndarray, values: Sequence[np.ndarray]) -> Point:
        """A point of the mean of each run's values of some targets, both (M,)."""
        owner, count = np.searchsorted(self.documents, targets, side="right") - 1, len(self.documents)
        sums, tokens = (
            np.stack([np.bincount(owner, one, count) for one in values]),
            np.bincount(owner, None, count),
        )
        return self.point(sums, tokens) | {"sums": (sums, tokens)}

    def point(self, sums: np.ndarray, tokens: np.ndarray) -> Point:
        """A point of sums of nats (seeds, documents) and numbers of targets (documents,)."""
        means = sums.sum(axis=1) / tokens.sum()
        if not np.isfinite(means).all():
            return {"nats": None, "low": None, "high": None, "reason": f"the sum of nats is {sums.sum()}"}
        low, high = (None if np.isnan(end) else end for end in interval_ends(sums, tokens))
        return {
            "nats": float(means.mean()),
            "low": low,
            "high": high,
            "targets": int(tokens.sum()),
            "by_run": dict(zip(self.labels, means.tolist(), strict=True)),
        }


def perplexity(group: Group, lengths: Sequence[int], stride: int | None = None) -> list[Point]:
    """Mean loss by inference length, in nonoverlapping windows, and in sliding ones too if a stride is given."""

    def points(mode: str, stride: int | None) -> list[Point]:
        return group.points(
            "length",
            lengths,
            lambda n: group.mean([p.nats(n, stride) for p in group.passes]),
            lambda n: group.reason(n, stride=stride),
            base=group.train_length,
            mode=mode,
            stride=stride,
        )

    return points("nonoverlapping", None) + ([] if stride is None else points("sliding", stride))


def position(group: Group, lengths: Sequence[int]) -> list[Point]:
    """Mean loss against position in the window, one point per length, with a smoothed `curve` and its band.

    The `curve` is that of `position_curve`, in lists. Up to the length of a shorter window a longer one has the
    same curve from fewer targets, so a reader takes each part from the shortest window that reaches it. (This does
    not hold under automatic scaling.)
    """

    def measured(length: int) -> Point:
        nats = [p.nats(length) for p in group.passes]
        positions = positions_in_window(group.num_tokens, length)
        curve = position_curve(np.stack(nats), group.documents, positions, length, group.train_length)
        return group.mean(nats) | {"curve": {name: _numbers(values) for name, values in curve.items()}}

    return group.points("length", sorted(lengths), measured, base=group.train_length)


def last(group: Group, lengths: Sequence[int], last: int) -> list[Point]:
    """Mean loss of the `last` targets of every whole window: none of them has a short context."""

    def measured(length: int) -> Point:
        scored = positions_in_window(group.num_tokens, length) > length - last
        scored[group.num_tokens // length * length :] = False
        return group.mean([p.nats(length) for p in group.passes], scored)

    def refuses(length: int) -> str:
        return group.reason(length) or (f"last = {last} is longer than the window" if last > length else "")

    return group.points("length", lengths, measured, refuses, base=group.train_length, last=last)


def documents(group: Group, lengths: Sequence[int]) -> list[Point]:
    """Mean loss of each document (over the seeds), in `documents`, beside that of all."""

    def measured(length: int) -> Point:
        point = group.mean([p.nats(length) for p in group.passes])
        sums, tokens = point["sums"]
        return point | {"documents": _numbers(sums.mean(axis=0) / tokens)}

    return group.points("length", lengths, measured, base=group.train_length)


def fixed(
    group: Group, lengths: Sequence[int], contexts: Sequence[int] | None = None, every: int | None = None
) -> list[Point]:
    """Mean loss of the same targets, each with exactly `context` tokens of input; without contexts, the lengths.

    `difference` is against the context of the trained length (or the longest one below it), paired by target.
    """
    contexts, every = sorted(contexts or lengths), every or max(1, group.num_tokens // 1000)
    # The same targets for every scheme: they depend on all contexts, not only on those that this scheme can use.
    longest = max((c for c in contexts if c <= group.num_tokens), default=1)
    targets = np.arange(longest - 1, group.num_tokens, every)
    return group.points(
        "context",
        contexts,
        lambda c: group.over(targets, [p.fixed(c, targets, every) for p in group.passes]),
        base=max((c for c in contexts if c <= group.train_length and not group.reason(c)), default=None),
        paired=True,
    )


def decomposition(group: Group, lengths: Sequence[int], stride: int | None = None) -> list[Point]:
    """Why the loss at a longer window differs from the loss at the trained length: three measured parts.

    Source: Press, Smith and Lewis (2022), arXiv 2108.12409, Appendix B, which shows one of the parts (the "early
    token curse") by comparing two kinds of evaluation; here each part comes from a change to the model's input.

    A model trained at L is scored in nonoverlapping windows of n > L tokens. Each target has three losses:
        full       as it is
        windowed   the same pass, each layer's attention limited to the last L keys
        reset      only the last L tokens of the window as input, positions from 0
    and their means add up exactly:
        full at n - full at L = (reset - full at L)     early tokens: fewer targets have a short context
                              + (windowed - reset)      positions beyond L, with no key further than L
                              + (full - windowed)       keys further than L: negative is use, positive is harm
    At positions up to L all three are the same pass. Limited attention reaches further than L through several
    layers; the effect of that is in the second part.

    With a stride s, a reset target beyond L has between L - s + 1 and L tokens of input. Its loss is then a little
    too high, which moves the same amount from the second part to the first; the third part, the sum and the
    targets up to L are not affected. Stride 1 is exact; the default is L / 8.

    Returns:
        A point for each length beyond L: each part and `total`, with intervals, and `largest_early_difference`, in
        nats, between the three losses of any target up to L. It shows how far the parts can be trusted: it is only
        rounding, except for a scheme whose parameters depend on the window's length (automatic scaling).
    """
    # Elsewhere the same setting is for sliding windows, so with view=all it may be too long for a short L.
    trained = group.train_length
    stride = stride or max(1, trained // 8)
    require(stride <= trained, f"stride = {stride}. Allowed: 1 to train_length = {trained}.")
    tokens = np.diff(group.documents, append=group.num_tokens)

    def measured(length: int) -> Point:
        # By part, run and target. Only sums of the differences have a meaning, never the signs of single ones.
        steps = np.stack([losses(p, length, trained, stride) for p in group.passes], axis=1)
        point: Point = {}
        for name, part in zip((*TERMS, "total"), [*np.diff(steps, axis=0), steps[-1] - steps[0]], strict=True):
            by_document = np.add.reduceat(part, group.documents, axis=1)
            point[name] = group.point(by_document, tokens) | {"by_document": _by_document(by_document, tokens)}
        early = positions_in_window(group.num_tokens, length) <= trained
        return point | {"largest_early_difference": float(np.ptp(steps[1:, :, early], axis=0).max())}

    return group.points(
        "length",
        [n for n in sorted(lengths) if n > trained],
        measured,
        lambda n: group.reason(n, window=True),
        empty=(*TERMS, "total"),
        stride=stride,
    )


def offset(
    group: Group,
    lengths: Sequence[int],
    offsets: Sequence[int] | None = None,
    width: int | None = None,
    every: int | None = None,
) -> list[Point]:
    """Change of the mean loss when the same tokens get positions k, k + 1, ... instead of 0, 1, ...

    By default about 256 windows of L / 2 tokens are scored. `largest` is the largest change of a single target, in
    nats: only rounding for a scheme that depends on distances only.
    """
    trained = group.train_length
    width = width or max(1, trained // 2)
    every = every or max(1, group.num_tokens // width // 256)
    powers = [0, *(trained * 2**k // 8 for k in range(3)), *(n for n in lengths if n >= trained)]
    starts = np.arange(0, group.num_tokens - width + 1, width * every)
    require(len(starts) > 0, f"width = {width}: the split has only {group.num_tokens} tokens. Use a smaller one.")
    targets = (starts[:, None] + np.arange(width)).ravel()
    base = [p.shifted(width, starts, 0).astype(np.float64).ravel() for p in group.passes]

    def measured(k: int) -> Point:
        changes = [p.shifted(width, starts, k).ravel() - b for p, b in zip(group.passes, base, strict=True)]
        return group.over(targets, changes) | {"largest": float(np.abs(changes).max())}

    def refuses(k: int) -> str:
        return next(filter(None, (p.refuses(k + width, positions=k > 0) for p in group.passes)), "")

    return group.points("offset", sorted(set(offsets or powers)), measured, refuses)


def _by_document(sums: np.ndarray, tokens: np.ndarray) -> dict[str, Any]:
    """Sums (runs, documents) and targets (documents,) as JSON: all that an interval needs."""
    return {"nats": [_numbers(row) for row in sums], "tokens": tokens.tolist()}


def _numbers(values: np.ndarray) -> list[float | int | None]:
    """As JSON: six decimals (a millionth of a nat), null where there is no value."""
    if np.issubdtype(values.dtype, np.integer):
        return values.tolist()
    return [None if np.isnan(v) else round(float(v), 6) for v in values]


def losses(passes: Passes, length: int, train_length: int, stride: int = 1) -> np.ndarray:
    """The losses from which the parts are computed: (4, N) float64, nats of the same targets.

    Rows: full in windows of L; then reset, windowed and full in windows of n > L (`length`). The reset shares a
    pass between `stride` targets, from 1 to L.
    """
    return np.stack(
        [
            passes.nats(train_length),
            passes.reset(length, train_length, stride),
            passes.nats(length, window=train_length),
            passes.nats(length),
        ]
    ).astype(np.float64)


def curve_edges(length: int, train_length: int) -> np.ndarray:
    """First positions of the bins of a smoothed curve, and length + 1: (bins + 1,) int64.

    Bins grow with the position, and one ends exactly at the trained length, so that no bin mixes positions up to
    the trained length with later ones.
    """
    octaves = int(np.ceil(np.log2(max(train_length, length / train_length, 2)))) + 1
    steps = np.arange(-octaves * BINS_PER_OCTAVE, octaves * BINS_PER_OCTAVE + 1)
    last = np.unique(np.round(train_length * 2.0 ** (steps / BINS_PER_OCTAVE)).astype(np.int64))
    last = last[(last >= 1) & (last < length)]
    return np.concatenate([[1], last + 1, [length + 1]])


def position_curve(
    nats: np.ndarray, documents: np.ndarray, positions: np.ndarray, length: int, train_length: int
) -> dict[str, np.ndarray]:
    """Mean nats against position in the window, smoothed, with a band.

    The band is the 95% interval, over documents (and seeds), of the *difference* from the mean up to the trained
    length (all positions of a shorter window), drawn around the curve. It leaves out the difficulty of the text,
    which moves the whole curve, and so says how well the shape is known.

    Args:
        nats: (N,) floats, or (seeds, N) of several runs on the same text.
        documents: (D,) integers, where documents start.
        positions: (N,) int64, from 1 to length.
        length: tokens of a window.
        train_length: where a bin must end.

    Returns:
        first, last (int64, positions of a bin, counted from 1), nats, low, high (float64), each (points,); bins
        without a target are left out.
    """
    seeds = np.atleast_2d(nats)
    edges = curve_edges(length, train_length)
    cells = (np.searchsorted(documents, np.arange(len(positions)), side="right") - 1) * (len(edges) - 1)
    cells += np.searchsorted(edges, positions, side="right") - 1
    shape = (len(documents), len(edges) - 1)
    tokens = np.bincount(cells, minlength=shape[0] * shape[1]).reshape(shape)
    sums = np.stack([np.bincount(cells, s, shape[0] * shape[1]).reshape(shape) for s in seeds])
    points = np.flatnonzero(tokens.sum(axis=0))
    means = (sums.sum(axis=1)[:, points] / tokens.sum(axis=0)[points]).mean(axis=0)
    early = edges[:-1] <= train_length
    base = sums[:, :, early].sum(axis=2), tokens[:, early].sum(axis=1)
    ends = np.full((2, len(points)), np.nan)
    for index, k in enumerate(points):
        if np.count_nonzero(tokens[:, k]) < 2:
            continue  # one document does not show how documents differ
        changes, weights = change_sums(sums[:, :, k], tokens[:, k], *base)
        difference = changes.sum(axis=1).mean() / weights.sum()
        ends[:, index] = np.array(interval_ends(changes, weights)) - difference
    return {
        "first": edges[points],
        "last": edges[points + 1] - 1,
        "nats": means,
        "low": means + ends[0],
        "high": means + ends[1],
    }


def change_sums(
    sums: np.ndarray, tokens: np.ndarray, base_sums: np.ndarray, base_tokens: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Sums whose mean and interval are those of a difference between two means of the same documents.

    The means may be over different targets, so that a document may have different numbers of them, also none in
    one of the means; with the same targets the result is `sums - base_sums`. The difference of two ratios is
    linearised around both.

    Args:
        sums: (seeds, documents), nats.
        tokens: (documents,), targets in them.
        base_sums: (seeds, documents), of the mean that is subtracted.
        base_tokens: (documents,).

    Returns:
        (seeds, documents) float64, and the numbers of targets to be used with them, (documents,) float64: the mean
        of both numbers, so that no document that contributes to the difference is left out.
    """
    total, base_total = tokens.sum(), base_tokens.sum()
    mean, base_mean = sums.sum(axis=1, keepdims=True) / total, base_sums.sum(axis=1, keepdims=True) / base_total
    errors = (sums - mean * tokens) / total - (base_sums - base_mean * base_tokens) / base_total
    weights = (tokens + base_tokens) / 2
    return weights.sum() * errors + (mean - base_mean) * weights, weights


def interval_ends(sums: np.ndarray, tokens: np.ndarray) -> tuple[float, float]:
    """95% interval of the mean nats per token over documents (and seeds); NaN if there is none.

    Args:
        sums: (seeds, documents) or (documents,), nats.
        tokens: (documents,).
    """
    sums = np.unique(np.atleast_2d(sums), axis=0)  # seeds that agree exactly count as one observation
    if np.count_nonzero(tokens) < 2 or not np.isfinite(sums).all():
        return float("nan"), float("nan")
    interval = mean_nats_interval(sums, tokens)
    return interval.low, interval.high
