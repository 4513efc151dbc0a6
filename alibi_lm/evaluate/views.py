"""The views of an analysis: from the passes of some runs to plain numbers with intervals.

A view takes the seeds of one curve, all scored on the same text, and gives a list of points. A point is a plain
mapping: what it is at (`length`, `context`, `offset`, ...), the mean `nats` per token over seeds and documents,
its 95% interval `low` to `high`, and the seeds' own means in `by_run`. Where a scheme cannot run, `nats` is None
and `reason` says why.

How hard the text is moves all points of a curve alike. So points also have a `difference` from the point at the
trained length, paired by document, whose interval is far narrower: it says whether the loss has changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from alibi_lm.evaluate.decomposition import TERMS, document_sums, largest_early_difference, measure
from alibi_lm.evaluate.passes import Passes, change_sums, interval_ends, position_curve, positions_in_window
from alibi_lm.results.statistics import per_document_sums

Point = dict[str, Any]


@dataclass
class Group:
    """Runs that differ in nothing but their seed, ready to be scored.

    Attributes:
        position: name of the scheme.
        train_length: L.
        labels: names of the runs.
        passes: of each run, over the same tokens.
        documents: (D,) int64, where documents start.
    """

    position: str
    train_length: int
    labels: list[str]
    passes: list[Passes]
    documents: np.ndarray

    @property
    def num_tokens(self) -> int:
        """Targets of the text."""
        return len(self.passes[0].tokens)

    @property
    def max_position(self) -> int | None:
        """Number of positions that the scheme has; None where any is defined."""
        return self.passes[0].model(self.train_length).max_position

    def reason(self, length: int) -> str | None:
        """Why windows of this length cannot be scored, or None."""
        limit = self.max_position
        if limit is not None and length > limit:
            return f"position={self.position} has {limit} positions"
        return None

    def mean(self, nats: Sequence[np.ndarray], scored: np.ndarray | None = None) -> Point:
        """A point of the mean nats per token.

        Args:
            nats: (N,) floats of each run.
            scored: (N,) bool, which targets count; None: all.
        """
        both = [per_document_sums(n, self.documents, scored) for n in nats]
        sums, tokens = np.stack([sums for sums, _ in both]), both[0][1]
        return self.point(sums, tokens) | {"sums": (sums, tokens)}

    def differences(self, points: list[Point], at: str) -> list[Point]:
        """Give each point of `mean` its difference from the one at the trained length, if there is one."""
        base = next((p for p in points if p[at] == self.train_length and p["nats"] is not None), None)
        kept = base["sums"] if base is not None else None
        for p in points:
            own = p.pop("sums", None)
            if own is not None and kept is not None and p["nats"] is not None:
                change = self.point(change_sums(*own, *kept), kept[1])
                if np.count_nonzero(own[1]) < 2:  # one document does not show how documents differ
                    change |= {"low": None, "high": None}
                p["difference"] = {"from": self.train_length} | {k: change[k] for k in ("nats", "low", "high")}
        return points

    def point(self, sums: np.ndarray, tokens: np.ndarray) -> Point:
        """The same from sums of nats (seeds, documents) and numbers of targets (documents,)."""
        means = sums.sum(axis=1) / tokens.sum()
        if not np.isfinite(means).all():
            return _nothing(f"the sum of nats is {sums.sum()}")
        low, high = interval_ends(sums, tokens)
        return {
            "nats": float(means.mean()),
            "low": None if np.isnan(low) else low,
            "high": None if np.isnan(high) else high,
            "targets": int(tokens.sum()),
            "by_run": dict(zip(self.labels, means.tolist(), strict=True)),
        }


def perplexity(group: Group, lengths: Sequence[int], stride: int | None) -> list[Point]:
    """Mean loss by inference length: nonoverlapping, and sliding too where a stride is given."""
    found: list[Point] = []
    for mode in ["nonoverlapping"] + ["sliding"] * (stride is not None):
        points: list[Point] = []
        for length in lengths:
            step = stride if mode == "sliding" else None
            at: Point = {"length": length, "mode": mode, "stride": step}
            reason = group.reason(length)
            if step is not None and step > length:
                reason = f"stride = {step} is longer than the window"
            if reason:
                points.append(at | _nothing(reason))
            else:
                points.append(at | group.mean([p.nats(length, step) for p in group.passes]))
        found += group.differences(points, "length")
    return found


def position(group: Group, lengths: Sequence[int]) -> list[Point]:
    """Mean loss against position in the window, one point a length, with a smoothed `curve` and its band.

    The `curve` has lists `first`, `last` (positions of a bin, counted from 1), `nats`, `low`, `high`; its band is
    that of `position_curve`. Up to the length of a shorter window a longer one has the same curve, from fewer
    targets: a reader takes each part from the shortest window that reaches it. (Not so under automatic scaling.)
    """
    points: list[Point] = []
    for length in lengths:
        if reason := group.reason(length):
            points.append({"length": length} | _nothing(reason))
            continue
        nats = [p.nats(length) for p in group.passes]
        positions = positions_in_window(group.num_tokens, length)
        curve = position_curve(np.stack(nats), group.documents, positions, length, group.train_length)
        curves = {name.removeprefix("curve_"): _numbers(values) for name, values in curve.items()}
        points.append({"length": length} | group.mean(nats) | {"curve": curves})
    return group.differences(points, "length")


def last(group: Group, lengths: Sequence[int], count: int) -> list[Point]:
    """Mean loss of the last `count` targets of every whole window: none of them has a short context."""
    points: list[Point] = []
    for length in lengths:
        at: Point = {"length": length, "last": count}
        reason = group.reason(length)
        if count > length:
            reason = f"last = {count} is longer than the window"
        whole = group.num_tokens // length * length
        if whole == 0:
            reason = f"the split has {group.num_tokens} tokens, less than one window"
        if reason:
            points.append(at | _nothing(reason))
            continue
        scored = positions_in_window(group.num_tokens, length) > length - count
        scored[whole:] = False
        points.append(at | group.mean([p.nats(length) for p in group.passes], scored))
    return group.differences(points, "length")


def fixed(group: Group, contexts: Sequence[int], every: int) -> list[Point]:
    """Mean loss of the same targets, each with exactly `context` tokens of input.

    `difference` is against the context of the trained length (or the longest one below it), paired by target.
    """
    targets = np.arange(max(contexts) - 1, group.num_tokens, every)
    if not len(targets):
        raise ValueError(f"contexts = {max(contexts)}: no target of {group.num_tokens} has so many tokens before.")
    owner = np.searchsorted(group.documents, targets, side="right") - 1
    tokens = np.bincount(owner, minlength=len(group.documents))
    sums: dict[int, np.ndarray] = {}
    for context in contexts:
        if group.reason(context) is None:
            scores = [p.fixed(context, targets, every) for p in group.passes]
            sums[context] = np.stack([np.bincount(owner, s, len(tokens)) for s in scores])
    base = max((c for c in sums if c <= group.train_length), default=None)
    points: list[Point] = []
    for context in contexts:
        at: Point = {"context": context}
        if context not in sums:
            points.append(at | _nothing(str(group.reason(context))))
            continue
        points.append(at | group.point(sums[context], tokens))
        if base is not None:
            difference = group.point(sums[context] - sums[base], tokens)
            points[-1]["difference"] = {"from": base} | {k: difference[k] for k in ("nats", "low", "high")}
    return points


def documents(group: Group, lengths: Sequence[int]) -> list[Point]:
    """Mean loss of each document (over the seeds), in `documents`, beside that of all."""
    points: list[Point] = []
    for length in lengths:
        if reason := group.reason(length):
            points.append({"length": length} | _nothing(reason))
            continue
        nats = [p.nats(length) for p in group.passes]
        both = [per_document_sums(n, group.documents) for n in nats]
        means = np.mean([sums for sums, _ in both], axis=0) / both[0][1]
        points.append({"length": length} | group.mean(nats) | {"documents": _numbers(means)})
    return group.differences(points, "length")


def decomposition(group: Group, lengths: Sequence[int], stride: int) -> list[Point]:
    """The three parts of the change from the trained length, see alibi_lm/evaluate/decomposition.py.

    `total` and each part are in nats per token with an interval.
    """
    tokens = np.diff(group.documents, append=group.num_tokens)
    points: list[Point] = []
    for length in (n for n in lengths if n > group.train_length):
        at: Point = {"length": length, "stride": stride}
        if reason := group.reason(length):
            points.append(at | {name: None for name in (*TERMS, "total")} | {"reason": reason})
            continue
        losses = [measure(p, length, group.train_length, stride) for p in group.passes]
        terms = [one.terms() for one in losses]
        for name in (*TERMS, "total"):
            at[name] = group.point(document_sums([t[name] for t in terms], group.documents), tokens)
        at["largest_early_difference"] = max(
            largest_early_difference(one, length, group.train_length) for one in losses
        )
        points.append(at)
    return points


def offset(group: Group, offsets: Sequence[int], width: int, every: int) -> list[Point]:
    """Change of the mean loss when the same tokens get positions k, k + 1, ... in place of 0, 1, ...

    `largest` is the largest change of a single target, in nats: rounding for a scheme that sees distances only.
    """
    starts = np.arange(0, group.num_tokens - width + 1, width * every)
    if not len(starts):
        raise ValueError(f"width = {width}: the split has only {group.num_tokens} tokens. Use a smaller one.")
    where = (starts[:, None] + np.arange(width)).ravel()
    owner = np.searchsorted(group.documents, where, side="right") - 1
    tokens = np.bincount(owner, minlength=len(group.documents))
    base = [p.shifted(width, starts, 0).astype(np.float64).ravel() for p in group.passes]
    points: list[Point] = []
    for k in offsets:
        at: Point = {"offset": k}
        if reason := group.reason(k + width):
            points.append(at | _nothing(reason))
            continue
        changes = [p.shifted(width, starts, k).ravel() - b for p, b in zip(group.passes, base, strict=True)]
        sums = np.stack([np.bincount(owner, c, len(tokens)) for c in changes])
        points.append(at | group.point(sums, tokens) | {"largest": float(np.abs(changes).max())})
    return points


def _nothing(reason: str) -> Point:
    return {"nats": None, "low": None, "high": None, "reason": reason}


def _numbers(values: np.ndarray) -> list[float | int | None]:
    """As JSON: six decimals (a millionth of a nat), null where there is no value."""
    if np.issubdtype(values.dtype, np.integer):
        return values.tolist()
    return [None if np.isnan(v) else round(float(v), 6) for v in values]
