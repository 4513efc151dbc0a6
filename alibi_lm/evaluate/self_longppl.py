"""Self-LongPPL: perplexity of the tokens that need a long context, by the judgement of the models themselves.

Source: Fang et al. (2024), "What is wrong with perplexity for long-context language modeling?", arXiv 2410.23771,
section 3, which has a judge of 8 billion parameters. Here each run is a judge, by two passes over the text:

    long     nonoverlapping windows of its training length L
    short    sliding windows of K = L / 2 tokens, a quarter of which are scored: 3K/4 + 1 to K tokens of context
    a key token is more than `key_gain` nats cheaper in the long pass, where it costs less than `key_loss`

The key tokens of a text are those of any of its judges, so that all curves have the same. At L a judge is then
scored on tokens that it has chosen itself by a low loss; at other lengths it is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from alibi_lm.evaluate.views import Group, Point, by_document, change_sums, nothing, point_of_sums


@dataclass
class Gathered:
    """What the passes of one curve gave; it outlives the models."""

    labels: list[str]
    train_length: int
    documents: np.ndarray
    short: int
    """K, tokens."""
    keys: np.ndarray
    """(N,) bool: key tokens of any of its runs."""
    chosen_by: str
    """The thresholds, in words."""
    nats: dict[int, list[np.ndarray]] = field(default_factory=dict)
    """Inference length -> nats of every target, (N,) float32 a run."""
    refused: dict[int, str] = field(default_factory=dict)


def gather(group: Group, lengths: Sequence[int], short: int | None, key_gain: float, key_loss: float) -> Gathered:
    """Judge the tokens and score all lengths; `Group` and its models are not needed after this.

    Args:
        group: seeds of a curve.
        lengths: inference lengths; the training length is added.
        short: K; None: half of the training length.
        key_gain: nats.
        key_loss: nats.
    """
    length = group.train_length
    short = short or max(1, length // 2)
    words = f"{key_gain:g} nats cheaper in windows of {length} than of {short}, and below {key_loss:g} nats there"
    found = Gathered(group.labels, length, group.documents, short, np.zeros(group.num_tokens, bool), words)
    stride = max(1, short // 4)
    for n in sorted({*lengths, length}):
        if reason := group.reason(n):
            found.refused[n] = reason
        else:
            found.nats[n] = [p.nats(n) for p in group.passes]
    if length in found.nats and not group.reason(short, stride=stride):
        for passes, long in zip(group.passes, found.nats[length], strict=True):
            found.keys |= (passes.nats(short, stride) - long > key_gain) & (long < key_loss)
    return found


def finish(series: Sequence[dict[str, Any]]) -> None:
    """Put points in the place of what was gathered, once all curves are: in those of one text on the same tokens.

    A point has the mean nats of the key tokens at an inference length, as those of other views; `targets` is the
    number of key tokens.
    """
    keys: dict[str, np.ndarray] = {}
    for one in series:
        mask = one["points"].keys
        keys[one["corpus"]] = keys.get(one["corpus"], False) | mask
    for one in series:
        one["points"] = _points(one["points"], np.flatnonzero(keys[one["corpus"]]))


def _points(found: Gathered, targets: np.ndarray) -> list[Point]:
    points: list[Point] = []
    tokens = by_document(found.documents, targets, [np.ones(len(targets))])[0].astype(np.int64)
    sums = {
        n: by_document(found.documents, targets, [own[targets] for own in runs]) for n, runs in found.nats.items()
    }
    for n in sorted({*found.nats, *found.refused}):
        at: Point = {"length": n, "short": found.short}
        if n in found.refused:
            points.append(at | nothing(found.refused[n]))
        elif not len(targets):
            points.append(
                at | nothing(f"no token is {found.chosen_by}: use a lower key_gain or a higher key_loss")
            )
        else:
            points.append(at | point_of_sums(found.labels, sums[n], tokens))
            if found.train_length in sums:
                changes = change_sums(sums[n], tokens, sums[found.train_length], tokens)
                change = point_of_sums(found.labels, changes, tokens)
                points[-1]["difference"] = {"from": found.train_length} | {
                    key: change[key] for key in ("nats", "low", "high")
                }
    return points
