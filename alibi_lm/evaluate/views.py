"""The views of an analysis: from the passes of some runs to plain numbers with intervals.

A view takes the seeds of one curve, all scored on the same text, and gives a list of points. A point is a plain
mapping: what it is at (`length`, `context`, `offset`, ...), the mean `nats` per token over seeds and documents,
its 95% interval `low` to `high`, and the seeds' own means in `by_run`. Where a model cannot be scored, or the text
has no such window, `nats` is None and `reason` says why.

How hard the text is moves all points of a curve alike. So points also have a `difference` from the point at the
trained length, paired by document, whose interval is far narrower: it says whether the loss has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from alibi_lm.data.windows import positions_in_window
from alibi_lm.evaluate.passes import Passes
from alibi_lm.results.statistics import mean_nats_interval, per_document_sums

TERMS = ("early_tokens", "positions_beyond", "keys_beyond")
"""The three parts of the decomposition, in the order in which they add up."""
BINS_PER_OCTAVE = 4
"""Of the smoothed curve: each bin is 19% wide in position."""
ONE_DOCUMENT = "the text is one document, so nothing shows how documents differ: there are no intervals"
"""Why points and rows of some texts have no intervals."""

Point = dict[str, Any]


@dataclass
class Group:
    """Runs that differ in nothing but their seed, ready to be scored, all over the same text."""

    position: str
    train_length: int
    passes: list[Passes]

    @property
    def labels(self) -> list[str]:
        """Names of the runs."""
        return [p.model.label for p in self.passes]

    @property
    def documents(self) -> np.ndarray:
        """(D,) int64, where documents start."""
        return self.passes[0].text.groups(self.train_length)

    @property
    def num_tokens(self) -> int:
        """Targets of the text."""
        return self.passes[0].text.num_targets(self.train_length)

    @property
    def note(self) -> str:
        """What a reader of the points must know; empty where there is nothing."""
        return ONE_DOCUMENT if len(self.documents) == 1 else ""

    def reason(self, length: int, window: bool = False, stride: int | None = None) -> str:
        """Why windows of this length cannot be scored, or hold no text; empty where they can."""
        text = replace(self.passes[0].text, stride=stride)
        reasons = [text.refuses(length), *(p.refuses(length, window=window) for p in self.passes)]
        return next(filter(None, reasons), "")

    def by_document(self, targets: np.ndarray, values: Sequence[np.ndarray]) -> np.ndarray:
        """Sums of some targets' values by run and document: (runs, documents) float64."""
        return by_document(self.documents, targets, values)

    def mean(self, nats: Sequence[np.ndarray], scored: np.ndarray | None = None) -> Point:
        """A point of the mean nats (N,) of each run, over the targets that are `scored`, (N,) bool; None: all."""
        both = [per_document_sums(n, self.documents, scored) for n in nats]
        sums, tokens = np.stack([sums for sums, _ in both]), both[0][1]
        return self.point(sums, tokens) | {"sums": (sums, tokens)}

    def point(self, sums: np.ndarray, tokens: np.ndarray) -> Point:
        """The same from sums of nats (seeds, documents) and numbers of targets (documents,)."""
        return point_of_sums(self.labels, sums, tokens)


def by_document(documents: np.ndarray, targets: np.ndarray, values: Sequence[np.ndarray]) -> np.ndarray:
    """`Group.by_document` from where documents start, (D,) int64."""
    owner = np.searchsorted(documents, targets, side="right") - 1
    return np.stack([np.bincount(owner, one, len(documents)) for one in values])


def point_of_sums(labels: Sequence[str], sums: np.ndarray, tokens: np.ndarray) -> Point:
    """`Group.point` from the names of the runs."""
    means = sums.sum(axis=1) / tokens.sum()
    if not np.isfinite(means).all():
        return nothing(f"the sum of nats is {sums.sum()}")
    low, high = interval_ends(sums, tokens)
    return {
        "nats": float(means.mean()),
        "low": None if np.isnan(low) else low,
        "high": None if np.isnan(high) else high,
        "targets": int(tokens.sum()),
        "by_run": dict(zip(labels, means.tolist(), strict=True)),
    }


def _by_length(group: Group, lengths: Sequence[int], measured: Callable[[int], Point], **at: Any) -> list[Point]:
    """A point for each length: what is measured there, by `Group.mean`, or why nothing is.

    Where there is one at the trained length, the others have their `difference` from it.
    """
    points: list[Point] = []
    for length in lengths:
        reason = group.reason(length, stride=at.get("stride"))
        points.append({"length": length} | at | (nothing(reason) if reason else measured(length)))
    sums: list[Any] = [point.pop("sums", None) for point in points]
    valued = [k for k, point in enumerate(points) if point["nats"] is not None]
    base = [k for k in valued if points[k]["length"] == group.train_length]
    for k in valued if base else []:
        change = group.point(change_sums(*sums[k], *sums[base[0]]), sums[base[0]][1])
        if np.count_nonzero(sums[k][1]) < 2:  # one document does not show how documents differ
            change |= {"low": None, "high": None}
        points[k]["difference"] = {"from": group.train_length} | {n: change[n] for n in ("nats", "low", "high")}
    return points


def perplexity(group: Group, lengths: Sequence[int], stride: int | None) -> list[Point]:
    """Mean loss by inference length: nonoverlapping, and sliding too where a stride is given."""

    def measured(length: int, stride: int | None = None) -> Point:
        return group.mean([p.nats(length, stride) for p in group.passes])

    points = _by_length(group, lengths, measured, mode="nonoverlapping", stride=None)
    if stride is not None:
        points += _by_length(group, lengths, lambda n: measured(n, stride), mode="sliding", stride=stride)
    return points


def position(group: Group, lengths: Sequence[int]) -> list[Point]:
    """Mean loss against position in the window, one point a length, with a smoothed `curve` and its band.

    The `curve` is that of `position_curve`, in lists. Up to the length of a shorter window a longer one has the
    same curve, from fewer targets: a reader takes each part from the shortest window that reaches it. (Not so
    under automatic scaling.)
    """

    def measured(length: int) -> Point:
        nats = [p.nats(length) for p in group.passes]
        positions = positions_in_window(group.num_tokens, length)
        curve = position_curve(np.stack(nats), group.documents, positions, length, group.train_length)
        return group.mean(nats) | {"curve": {name: _numbers(values) for name, values in curve.items()}}

    return _by_length(group, lengths, measured)


def last(group: Group, lengths: Sequence[int], count: int) -> list[Point]:
    """Mean loss of the last `count` targets of every whole window: none of them has a short context."""

    def measured(length: int) -> Point:
        if count > length:
            return nothing(f"last = {count} is longer than the window")
        scored = positions_in_window(group.num_tokens, length) > length - count
        scored[group.num_tokens // length * length :] = False
        return group.mean([p.nats(length) for p in group.passes], scored)

    return _by_length(group, lengths, measured, last=count)


def documents(group: Group, lengths: Sequence[int]) -> list[Point]:
    """Mean loss of each document (over the seeds), in `documents`, beside that of all."""

    def measured(length: int) -> Point:
        point = group.mean([p.nats(length) for p in group.passes])
        sums, tokens = point["sums"]
        return point | {"documents": _numbers(sums.mean(axis=0) / tokens)}

    return _by_length(group, lengths, measured)


def fixed(group: Group, contexts: Sequence[int], every: int) -> list[Point]:
    """Mean loss of the same targets, each with exactly `context` tokens of input.

    `difference` is against the context of the trained length (or the longest one below it), paired by target.
    """
    # The same targets for every scheme: of all contexts that the text has, not only those that this one can use.
    targets = np.arange(
        max((c for c in contexts if c <= group.num_tokens), default=1) - 1, group.num_tokens, every
    )
    tokens = group.by_document(targets, [np.ones(len(targets))])[0].astype(np.int64)
    sums: dict[int, np.ndarray] = {}
    for context in contexts:
        if not group.reason(context):
            sums[context] = group.by_document(targets, [p.fixed(context, targets, every) for p in group.passes])
    base = max((c for c in sums if c <= group.train_length), default=None)
    points: list[Point] = []
    for context in contexts:
        at: Point = {"context": context}
        if context not in sums:
            points.append(at | nothing(group.reason(context)))
            continue
        points.append(at | group.point(sums[context], tokens))
        if base is not None:
            difference = group.point(sums[context] - sums[base], tokens)
            points[-1]["difference"] = {"from": base} | {k: difference[k] for k in ("nats", "low", "high")}
            points[-1]["difference"]["by_document"] = _by_document(sums[context] - sums[base], tokens)
    return points


def decomposition(group: Group, lengths: Sequence[int], stride: int) -> list[Point]:
    """Why the loss at a longer window differs from the loss at the trained length: three measured parts.

    Source: Press, Smith and Lewis (2022), arXiv 2108.12409, Appendix B, which shows one of the parts (the "early
    token curse") by comparing two kinds of evaluation; here each part is an intervention on the model's input.

    A model trained at L is scored in nonoverlapping windows of n > L tokens. Each target has three losses:
        full       as it is
        windowed   the same pass, each layer's attention limited to the last L keys
        reset      only the last L tokens of the window as input, positions from 0
    and their means add up exactly:
        full at n - full at L = (reset - full at L)     early tokens: fewer targets have a short context
                              + (windowed - reset)      positions beyond L, with no key further than L
                              + (full - windowed)       keys further than L: negative is use, positive is harm
    At positions up to L all three are the same pass. Limited attention reaches further than L through several
    layers: the second part holds what the model makes of that, too.

    With a stride s, a reset target beyond L has between L - s + 1 and L tokens of input. Its loss is then a little
    too high, which moves the same amount from the second part to the first; the third part and the sum are not
    touched, and neither are the targets up to L. Stride 1 is exact.

    Returns:
        A point for each length beyond L: each part and `total`, with intervals, and `largest_early_difference`, in
        nats, between the three losses of any target up to L. That is rounding, but for a scheme whose parameters
        depend on the window's length (automatic scaling), and shows how far the parts can be trusted.
    """
    tokens = np.diff(group.documents, append=group.num_tokens)
    points: list[Point] = []
    for length in (n for n in lengths if n > group.train_length):
        at: Point = {"length": length, "stride": stride}
        if reason := group.reason(length, window=True):
            points.append(at | {name: None for name in (*TERMS, "total")} | {"reason": reason})
            continue
        # By step of the ladder, run and target. Only sums of differences mean something, never their signs.
        steps = np.stack([losses(p, length, group.train_length, stride) for p in group.passes], axis=1)
        parts = dict(zip(TERMS, np.diff(steps, axis=0), strict=True)) | {"total": steps[-1] - steps[0]}
        for name, part in parts.items():
            by_document = np.add.reduceat(part, group.documents, axis=1)
            at[name] = group.point(by_document, tokens) | {"by_document": _by_document(by_document, tokens)}
        early = positions_in_window(group.num_tokens, length) <= group.train_length
        at["largest_early_difference"] = float(np.ptp(steps[1:, :, early], axis=0).max())
        points.append(at)
    return points


def offset(group: Group, offsets: Sequence[int], width: int, every: int) -> list[Point]:
    """Change of the mean loss when the same tokens get positions k, k + 1, ... in place of 0, 1, ...

    `largest` is the largest change of a single target, in nats: rounding for a scheme that sees distances only.
    """
    starts = np.arange(0, group.num_tokens - width + 1, width * every)
    if not len(starts):
        raise ValueError(f"width = {width}: the split has only {group.num_tokens} tokens. Use a smaller one.")
    targets = (starts[:, None] + np.arange(width)).ravel()
    tokens = group.by_document(targets, [np.ones(len(targets))])[0].astype(np.int64)
    base = [p.shifted(width, starts, 0).astype(np.float64).ravel() for p in group.passes]
    points: list[Point] = []
    for k in offsets:
        at: Point = {"offset": k}
        reasons = (p.refuses(k + width, positions=k > 0) for p in group.passes)
        if reason := next(filter(None, reasons), ""):
            points.append(at | nothing(reason))
            continue
        changes = [p.shifted(width, starts, k).ravel() - b for p, b in zip(group.passes, base, strict=True)]
        points.append(
            at
            | group.point(group.by_document(targets, changes), tokens)
            | {"largest": float(np.abs(changes).max())}
        )
    return points


def nothing(reason: str) -> Point:
    """A point without a value, and why."""
    return {"nats": None, "low": None, "high": None, "reason": reason}


def _by_document(sums: np.ndarray, tokens: np.ndarray) -> dict[str, Any]:
    """Sums (runs, documents) and targets (documents,) as JSON: enough for any interval."""
    return {"nats": [_numbers(row) for row in sums], "tokens": tokens.tolist()}


def _numbers(values: np.ndarray) -> list[float | int | None]:
    """As JSON: six decimals (a millionth of a nat), null where there is no value."""
    if np.issubdtype(values.dtype, np.integer):
        return values.tolist()
    return [None if np.isnan(v) else round(float(v), 6) for v in values]


def losses(passes: Passes, length: int, train_length: int, stride: int = 1) -> np.ndarray:
    """What the parts are differences of: (4, N) float64, nats of the same targets.

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

    Bins grow with the position, and one ends exactly at the trained length: what a scheme does past its trained
    length is then never mixed with what it does before.
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
    length (all positions of a shorter window), drawn around the curve. How hard the text is moves the whole curve
    and is left out: it says how well the shape is known.

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
        changes = change_sums(sums[:, :, k], tokens[:, k], *base)
        difference = changes.sum(axis=1).mean() / base[1].sum()
        ends[:, index] = np.array(interval_ends(changes, base[1])) - difference
    return {
        "first": edges[points],
        "last": edges[points + 1] - 1,
        "nats": means,
        "low": means + ends[0],
        "high": means + ends[1],
    }


def change_sums(
    sums: np.ndarray, tokens: np.ndarray, base_sums: np.ndarray, base_tokens: np.ndarray
) -> np.ndarray:
    """Sums whose mean and interval are those of a difference between two means of the same documents.

    The means may be over different targets, so that a document has other numbers of them; with the same targets
    it is `sums - base_sums`. The difference of two ratios is linearised around both.

    Args:
        sums: (seeds, documents), nats.
        tokens: (documents,), targets in them.
        base_sums: (seeds, documents), of the mean that is subtracted.
        base_tokens: (documents,).

    Returns:
        (seeds, documents) float64, to be taken with `base_tokens`. A document with no target in the base has
        none here.
    """
    total, base_total = tokens.sum(), base_tokens.sum()
    mean, base_mean = sums.sum(axis=1, keepdims=True) / total, base_sums.sum(axis=1, keepdims=True) / base_total
    errors = (sums - mean * tokens) / total - (base_sums - base_mean * base_tokens) / base_total
    return np.where(base_tokens > 0, base_total * errors + (mean - base_mean) * base_tokens, 0.0)


def interval_ends(sums: np.ndarray, tokens: np.ndarray) -> tuple[float, float]:
    """95% interval of the mean nats per token over documents (and seeds); NaN where one cannot be had.

    Args:
        sums: (seeds, documents) or (documents,), nats.
        tokens: (documents,).
    """
    sums = np.unique(np.atleast_2d(sums), axis=0)  # seeds that agree exactly are one observation
    if np.count_nonzero(tokens) < 2 or not np.isfinite(sums).all():
        return float("nan"), float("nan")
    interval = mean_nats_interval(sums, tokens)
    return interval.low, interval.high
