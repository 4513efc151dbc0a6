"""Views of what a model makes of its context: a segment read twice, the context it needs, and where heads look.

Each gives points as `views.py` has them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from alibi_lm.attention.base import Attend, AttentionBackend, Request, hidden_keys
from alibi_lm.attention.eager import attention_weights
from alibi_lm.data.windows import cut_windows
from alibi_lm.evaluate.passes import Passes
from alibi_lm.evaluate.store import Scoring
from alibi_lm.evaluate.views import Group, Point, curve_edges, fixed
from alibi_lm.model.transformer import TransformerLM
from alibi_lm.positions.base import PositionScheme
from alibi_lm.settings import require
from alibi_lm.tasks.base import Batch

NEAR = 0.01
"""A loss within this share of the best one is as good."""
SINK = 0.3
"""A head is a sink if its queries give the first token more than this (Gu et al. 2024, arXiv 2410.10781)."""
FIELD = 0.99
"""Share of the gradient that the receptive field holds."""
FIELD_TARGETS = 128
"""Targets whose gradients are taken."""
SLICE = 128
"""Queries whose weights are held at once."""


def effective_context(group: Group, contexts: Sequence[int], every: int) -> list[Point]:
    """`fixed`, and as `effective` the least context whose loss is within 1% of the best one.

    `numbers` has the same for each run, and its `receptive_field`: how many of the last tokens hold 99% of the
    gradient of the loss, in windows of the longest context that could be scored.

    Source: Khandelwal et al. (2018), arXiv 1805.04623, and the relative effective context length of Dai et al.
    (2019), arXiv 1901.02860, section 3.5; of the gradients Chi et al. (2023), arXiv 2212.10356, section 3.
    """
    points = fixed(group, contexts, every)
    known = [point for point in points if point["nats"] is not None]
    if not known:
        return [point | {"effective": None} for point in points]
    losses = {name: [point["by_run"][name] for point in known] for name in group.labels}
    numbers: dict[str, dict[str, int | None]] = {
        "effective": {name: known[_as_good(values)]["context"] for name, values in losses.items()}
    }
    context = known[-1]["context"]
    targets = np.linspace(context - 1, group.num_tokens - 1, min(FIELD_TARGETS, group.num_tokens - context + 1))
    fields = {p.model.label: receptive_field(p, context, targets.astype(np.int64)) for p in group.passes}
    numbers["receptive_field"] = fields
    effective = known[_as_good([point["nats"] for point in known])]["context"]
    return [point | {"effective": effective, "numbers": numbers} for point in points]


def _as_good(losses: Sequence[float]) -> int:
    """Index of the first loss that is within 1% of the least."""
    return next(k for k, loss in enumerate(losses) if loss <= min(losses) * (1 + NEAR))


def receptive_field(passes: Passes, context: int, targets: np.ndarray) -> int | None:
    """How many of the last tokens hold 99% of the gradient of the loss.

    The gradient of a target's loss by the embedding of a token at distance d has a norm; the norms are averaged
    over the targets and added up from d = 0 on.

    Args:
        passes: of a run.
        context: tokens of input of each target.
        targets: (M,) integers, from context - 1.

    Returns:
        1 to `context`; None for a model that gives no gradients.
    """
    model = passes.model
    if not isinstance(model, TransformerLM) or model.refuses("training"):
        return None
    model.serve(context)
    total, vocabulary = torch.zeros(context, dtype=torch.float64), cast(Any, model.vocabulary)
    embed = vocabulary.embed
    for batch in passes.text.windows(targets - context + 1, context, context - 1, passes.tokens_per_forward):
        leaf = embed(batch.input_ids.to(model.device)).detach().requires_grad_()
        vocabulary.embed = lambda ids, leaf=leaf: leaf  # in place of the vectors, for this pass alone
        try:
            hidden = model.hidden(batch.input_ids.to(model.device))[:, -1:]
            loss = model.nats_of(hidden, batch.target_ids[:, -1:].to(model.device)).sum()
            (gradient,) = torch.autograd.grad(loss, leaf)
        finally:
            del vocabulary.embed
        total += gradient.double().norm(dim=-1).sum(dim=0).flip(0).cpu()
    return int(torch.searchsorted(total.cumsum(0) / total.sum(), FIELD)) + 1


def repeat(group: Group, distances: Sequence[int], width: int, every: int) -> list[Point]:
    """What reading a segment a second time gains, by the distance between the two readings.

    A segment of `width` tokens is scored at its own place in the text, after the `distance - width` tokens before
    it. In front of those stands once the segment itself, and once another one (that of the next place). The gain
    is the difference of the losses, in nats per token; above 0 where the first reading helps.
    """
    longest = max(distances)
    starts = np.arange(longest, group.num_tokens - width + 1, width * every)
    require(
        len(starts) > 1,
        f"width = {width} at a distance of {longest}: the split has {group.num_tokens} tokens. Use smaller ones.",
    )
    targets = (starts[:, None] + np.arange(width)).ravel()
    tokens = group.by_document(targets, [np.ones(len(targets))])[0].astype(np.int64)
    points: list[Point] = []
    for distance in distances:
        at: Point = {"distance": distance, "width": width}
        reason = next(filter(None, (p.refuses(distance + width) for p in group.passes)), "")
        reason = reason or (
            f"two readings of {width} tokens lie {width} apart or more" if distance < width else ""
        )
        if reason:
            points.append(at | {"nats": None, "low": None, "high": None, "reason": reason})
            continue
        losses = [
            [_second_reading(p, starts, first, distance, width) for p in group.passes]
            for first in (starts, np.roll(starts, -1))
        ]
        gains = [other.astype(np.float64) - same for same, other in zip(*losses, strict=True)]
        points.append(at | group.point(group.by_document(targets, gains), tokens))
    return points


def _second_reading(
    passes: Passes, starts: np.ndarray, first: np.ndarray, distance: int, width: int
) -> np.ndarray:
    """Nats of segments after `first` ones at a distance: (segments * width,) float32."""
    tokens, start_id = passes.text.tokens, passes.text.start_id

    def batches() -> Iterator[Batch]:
        rows = max(1, passes.tokens_per_forward // (distance + width))
        for k in range(0, len(starts), rows):
            front = tokens[first[k : k + rows, None] + np.arange(width)]
            rest = tokens[starts[k : k + rows, None] + np.arange(width - distance, width)]
            both = np.concatenate([np.full((len(front), 1), start_id), front, rest], axis=1).astype(np.int64)
            ids = torch.from_numpy(both)
            numbers = np.arange(k, k + len(front))[:, None] * width + np.arange(width)
            yield Batch(ids[:, :-1], ids[:, 1:], numbers)

    mode = "repeat" if first is starts else "repeat_other"
    scoring = Scoring(passes.text.split, mode, distance + width, width, first=int(starts[0]))
    return passes.kept(scoring, batches, len(starts) * width).nats


# --- where heads look ----------------------------------------------------------------------------


class Looks(AttentionBackend):
    """Attention by its definition that notes where each head looks, in slices of queries.

    Only queries in the second half of the sequence are noted: all of these have many keys to choose from.
    """

    name = "looks"

    def __init__(self, length: int) -> None:
        self.length = length
        self.layers: list[dict[str, Tensor]] = []
        self._layer = 0

    def begin(self) -> None:
        """Begin a forward pass."""
        self._layer = 0

    def prepare(self, scheme: PositionScheme, request: Request) -> Attend:
        q_pos, k_pos = request.q_pos, request.k_pos

        def attend(q: Tensor, k: Tensor, v: Tensor, x: Tensor | None) -> Tensor:
            outs = []
            for start in range(0, len(q_pos), SLICE):
                end = min(start + SLICE, len(q_pos))
                rows, keys = q_pos[start:end], k_pos[:end]
                seen = None if x is None else x[:, :end]
                bias, hidden = scheme.bias(rows, keys), hidden_keys(rows, keys, None)
                weights = attention_weights(
                    scheme, q[:, :, start:end], k[:, :, :end], seen, rows, keys, bias, hidden
                )
                out, added = weights.to(v.dtype) @ v[:, :, :end], scheme.value_bias(weights, rows, keys)
                outs.append(out if added is None else out + added.to(v.dtype))
                self._note(weights.double(), rows, keys)
            self._layer += 1
            return torch.cat(outs, dim=2)

        return attend

    def _note(self, weights: Tensor, rows: Tensor, keys: Tensor) -> None:
        """Add the weights (B, H, rows, keys) of some queries to the layer's sums."""
        late = rows >= self.length // 2
        weights, rows = weights[:, :, late], rows[late]
        heads = weights.shape[1]
        if self._layer == len(self.layers):
            zeros = {
                name: torch.zeros(heads, dtype=torch.float64)
                for name in ("queries", "distance", "entropy", "first")
            }
            self.layers.append(zeros | {"weights": torch.zeros(heads, self.length, dtype=torch.float64)})
        sums, distance = self.layers[self._layer], (rows[:, None] - keys).clamp_min(0)
        sums["queries"] += weights.shape[0] * len(rows)
        sums["distance"] += (weights * distance).sum(dim=(0, 2, 3)).cpu()
        sums["entropy"] += torch.special.entr(weights).sum(dim=(0, 2, 3)).cpu()
        sums["first"] += weights[..., 0].sum(dim=(0, 2)).cpu()
        sums["weights"].index_add_(1, distance.flatten().cpu(), weights.sum(dim=0).flatten(1).cpu())


def attention(group: Group, lengths: Sequence[int], windows: int) -> list[Point]:
    """Where each head looks, on some windows of the text that lie at equal distances.

    Returns:
        A point for each length. `heads` has for each layer and head of the first seed the mean distance in tokens,
        the entropy in nats, the weight of the first token, and the mean `weights` at distances `nearest` to
        `farthest`; all over queries in the second half of the windows. `sink_rate` is the share of heads, of all
        seeds, that give the first token more than 0.3. `numbers` has means over the heads of each run: the same
        four, the weight of keys `near` (distances below L / 8) and `beyond` (L or more), and `falling`, the share
        of steps from one range of distances to the next at which the mean weight of a key falls.
    """
    points: list[Point] = []
    for length in lengths:
        at: Point = {"length": length}
        if reason := group.reason(length):
            points.append(at | {"nats": None, "reason": reason})
            continue
        whole = group.num_tokens // length
        starts = np.arange(0, whole, max(1, whole // windows))[:windows] * length
        found = [_look(passes, starts, length) for passes in group.passes]
        sinks = [head["first"] > SINK for heads in found for head in heads]
        edges = curve_edges(length, group.train_length) - 1  # distances from 0
        points.append(
            at
            | {
                "windows": len(starts),
                "nearest": edges[:-1].tolist(),
                "farthest": (edges[1:] - 1).tolist(),
                "heads": [head | {"weights": _binned(head["weights"], edges, length)} for head in found[0]],
                "sink_rate": float(np.mean(sinks)),
                "numbers": _over_heads(group, found, edges, length),
            }
        )
    return points


def _look(passes: Passes, starts: np.ndarray, length: int) -> list[dict[str, Any]]:
    """What `Looks` notes of some windows, by head: means over queries."""
    model = passes.model
    require(
        isinstance(model, TransformerLM),
        f"view = attention: {passes.model.label} does not show its attention weights. Use a run of this package.",
    )
    assert isinstance(model, TransformerLM)
    model.serve(length)
    looks, backend = Looks(length), model.backend
    model.backend = cast(Any, looks)  # a backend for these passes alone
    try:
        rows = max(1, passes.tokens_per_forward // length)
        with torch.inference_mode():
            for k in range(0, len(starts), rows):
                looks.begin()
                ids, _ = cut_windows(passes.text.tokens, passes.text.start_id, starts[k : k + rows], length)
                model.hidden(ids.to(model.device))
    finally:
        model.backend = backend
    return [
        {
            "layer": layer,
            "head": head,
            **{name: float(sums[name][head] / sums["queries"][head]) for name in ("distance", "entropy", "first")},
            "weights": (sums["weights"][head] / sums["queries"][head]).numpy(),
        }
        for layer, sums in enumerate(looks.layers)
        for head in range(len(sums["queries"]))
    ]


def _over_heads(
    group: Group, found: Sequence[Sequence[dict[str, Any]]], edges: np.ndarray, length: int
) -> dict[str, dict[str, float]]:
    """Means over the heads of each run, by name and run."""
    numbers: dict[str, dict[str, float]] = {}
    for name, heads in zip(group.labels, found, strict=True):
        weights = np.stack([head["weights"] for head in heads])
        binned = np.array([_binned(own, edges, length) for own in weights])
        means = {key: np.mean([head[key] for head in heads]) for key in ("distance", "entropy", "first")} | {
            "sink_rate": np.mean([head["first"] > SINK for head in heads]),
            "near": weights[:, : max(1, group.train_length // 8)].sum(axis=1).mean(),
            "beyond": weights[:, group.train_length :].sum(axis=1).mean(),
            "falling": (np.diff(binned, axis=1) < 0).mean() if binned.shape[1] > 1 else 0.0,
        }
        for key, value in means.items():
            numbers.setdefault(key, {})[name] = float(value)
    return numbers


def _binned(weights: np.ndarray, edges: np.ndarray, length: int) -> list[float]:
    """Mean weight of a key at the distances of each bin, where a query of the second half has such a key."""
    late = np.arange(length // 2, length)
    # How many of these queries have a key at a distance, as a share: all have up to half of the length.
    reach = np.minimum(1.0, (length - np.arange(length)) / len(late))
    means = weights / reach
    return [float(f"{means[a:b].mean():.4g}") for a, b in itertools.pairwise(edges)]
