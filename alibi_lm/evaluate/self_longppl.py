"""Self-LongPPL: perplexity of the tokens that need a long context, as judged by the evaluated models themselves.

Source: Fang et al. (2024), "What is wrong with perplexity for long-context language modeling?", arXiv 2410.23771,
section 3, which uses a judge of 8 billion parameters. Here each run is a judge, by two passes over the text:

    long     nonoverlapping windows of its training length L
    short    sliding windows of K = L / 2 tokens, a quarter of which are scored: 3K/4 + 1 to K tokens of context
    a key token's loss is more than `key_gain` nats lower in the long pass, and below `key_loss` there

The key tokens of a text are those of any of its judges, so that all curves share them. At L a judge is then
scored on tokens that it chose itself by their low loss; at other lengths it is not.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from alibi_lm.evaluate.views import Group, Point


@dataclass
class Gathered:
    """The results of one curve's passes, which are kept when the models are freed."""

    keys: np.ndarray
    """(N,) bool: key tokens of any of its runs."""
    points: Callable[[np.ndarray], list[Point]]
    """Indices of the key tokens of all curves -> the points of this one."""


def self_longppl(
    group: Group, lengths: Sequence[int], short: int | None = None, key_gain: float = 2.0, key_loss: float = 2.0
) -> Gathered:
    """Judge the tokens and score all lengths; the models of the group are not needed after this.

    Args:
        group: seeds of a curve.
        lengths: inference lengths; the training length is added.
        short: K; None: half of the training length.
        key_gain: how much the long pass must lower the loss, in nats.
        key_loss: the highest loss in the long pass, in nats.
    """
    trained, short = group.train_length, short or max(1, group.train_length // 2)
    reasons = {n: group.reason(n) for n in sorted({*lengths, trained})}
    # Copies: what is kept until all curves are there would hold an open file for each pass that was on the disk.
    nats = {n: [np.array(p.nats(n)) for p in group.passes] for n, reason in reasons.items() if not reason}
    keys, stride = np.zeros(group.num_tokens, bool), max(1, short // 4)
    if trained in nats and not group.reason(short, stride=stride):
        for passes, long in zip(group.passes, nats[trained], strict=True):
            keys |= (passes.nats(short, stride) - long > key_gain) & (long < key_loss)
    rest = copy.copy(group)
    rest.passes = []  # frees the models
    none = (
        f"no token is {key_gain:g} nats cheaper in windows of {trained} than of {short}, and below {key_loss:g} "
    )
    none += "nats there: use a lower key_gain or a higher key_loss"

    def points(targets: np.ndarray) -> list[Point]:
        return rest.points(
            "length",
            reasons,
            lambda n: rest.over(targets, [own[targets] for own in nats[n]]),
            lambda n: reasons[n] or ("" if len(targets) else none),
            base=trained,
            short=short,
        )

    return Gathered(keys, points)


def finish(series: Sequence[dict[str, Any]]) -> None:
    """Replace the gathered results of all curves by points; curves of one text have the same key tokens.

    A point has the mean nats of the key tokens at an inference length, like points of other views; `targets` is
    the number of key tokens.
    """
    keys: dict[str, np.ndarray] = {}
    for one in series:
        keys[one["corpus"]] = keys.get(one["corpus"], False) | one["points"].keys
    for one in series:
        one["points"] = one["points"].points(np.flatnonzero(keys[one["corpus"]]))
