"""Views of how a model uses its context: a segment read twice, the context it needs, and where heads look.

Each gives points as described in `views.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
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
from alibi_lm.results import curves
from alibi_lm.settings import require
from alibi_lm.tasks.base import Batch

SINK = 0.3
"""A head is a sink if its queries give the first token more than this (Gu et al. 2024, arXiv 2410.10781)."""
FIELD = 0.99
"""Share of the gradient that the receptive field holds."""
FIELD_TARGETS = 128
"""Targets whose gradients are taken."""
SLICE = 128
"""How many queries' weights are held at once."""


def effective_context(
    group: Group, lengths: Sequence[int], contexts: Sequence[int] | None = None, every: int | None = None
) -> list[Point]:
    """The points of `fixed`, with `effective`: the shortest context whose loss is within 1% of the best one.

    `numbers` has the same for each run, and its `receptive_field`: how many of the last tokens hold 99% of the
    gradient of the loss, in windows of the longest context that could be scored. The default contexts are the
    lengths, and powers of 2 up to the longest.

    Source: Khandelwal et al. (2018), arXiv 1805.04623, and the relative effective context length of Dai et al.
    (2019), arXiv 1901.02860, section 3.5; for the gradients Chi et al. (2023), arXiv 2212.10356, section 3.
    """
    powers = (2**k for k in range(max(lengths).bit_length()))
    points = fixed(group, lengths, contexts or [*{*powers, *lengths}], every)
    known = [point for point in points if point["nats"] is not None]
    if not known:
        return [point | {"effective": None} for point in points]

    context = known[-1]["context"]
    targets = np.linspace(context - 1, group.num_tokens - 1, min(FIELD_TARGETS, group.num_tokens - context + 1))
    numbers = {
        "effective": {
            name: curves.effective_context({p["context"]: p["by_run"][name] for p in known})
            for name in group.labels
        },
        "receptive_field": {
            p.model.label: receptive_field(p, context, targets.astype(np.int64)) for p in group.passes
        },
    }
    effective = curves.effective_context({point["context"]: point["nats"] for point in known})
    return [point | {"effective": effective, "numbers": numbers} for point in points]


def receptive_field(passes: Passes, context: int, targets: np.ndarray) -> int | None:
    """How many of the last tokens hold 99% of the gradient of the loss.

    Norms of the gradient of a target's loss with respect to the embedding of the token at distance d are averaged
    over the targets and added up from d = 0 on.

    Args:
        passes: a run's.
        context: input tokens of each target.
        targets: (M,) integers, at least context - 1.

    Returns:
        1 to `context`; None for a model without access to gradients.
    """
    model = passes.model
    if not isinstance(model, TransformerLM) or model.refuses("training"):
        return None
    model.serve(context)
    total, vocabulary = torch.zeros(context, dtype=torch.float64), cast(Any, model.vocabulary)
    embed = vocabulary.embed
    for batch in passes.text.windows(targets - context + 1, context, context - 1, passes.tokens_per_forward):
        leaf = embed(batch.input_ids.to(model.device)).detach().requires_grad_()
        vocabulary.embed = lambda ids, leaf=leaf: leaf  # replaces the vectors, for this pass only
        try:
            hidden = model.hidden(batch.input_ids.to(model.device))[:, -1:]
            loss = model.nats_of(hidden, batch.target_ids[:, -1:].to(model.device)).sum()
            (gradient,) = torch.autograd.grad(loss, leaf)
        finally:
            del vocabulary.embed
        total += gradient.double().norm(dim=-1).sum(dim=0).flip(0).cpu()
    return int(torch.searchsorted(total.cumsum(0) / total.sum(), FIELD)) + 1


def repeat(
    group: Group,
    lengths: Sequence[int],
    distances: Sequence[int] | None = None,
    width: int | None = None,
    every: int | None = None,
) -> list[Point]:
    """What reading a segment a second time gains, by the distance between the two readings.

    A segment of `width` tokens is scored at its own place in the text, after the `distance - width` tokens before
    it. In front of those comes once the segment itself, and once another one (that of the next place). The gain
    is the difference of the two losses, in nats per token; above 0 if the first reading helps. By default
    segments have L / 4 tokens, distances double from there on, and about 128 segments are scored.
    """
    width = width or max(1, group.train_length // 4)
    doubling = [width * 2**k for k in range(16) if width * 2**k + width <= max(lengths)]
    distances, every = sorted(distances or doubling or [width]), every or max(1, group.num_tokens // width // 128)
    longest = max(distances)
    starts = np.arange(longest, group.num_tokens - width + 1, width * every)
    require(
        len(starts) > 1,
        f"width = {width} at a distance of {longest}: the split has {group.num_tokens} tokens. Use smaller ones.",
    )

    def measured(distance: int) -> Point:
        gains = []
        for passes in group.passes:
            same = _second_reading(passes, f"repeat_{every}x", starts, starts, distance, width)
            other = _second_reading(passes, f"repeat_other_{every}x", starts, np.roll(starts, -1), distance, width)
            gains.append(other.astype(np.float64) - same)
        return group.over((starts[:, None] + np.arange(width)).ravel(), gains)

    def refuses(distance: int) -> str:
        short = f"two readings of {width} tokens lie {width} apart or more" if distance < width else ""
        return next(filter(None, (p.refuses(distance + width) for p in group.passes)), short)

    return group.points("distance", distances, measured, refuses, width=width)


def _second_reading(
    passes: Passes, mode: str, starts: np.ndarray, first: np.ndarray, distance: int, width: int
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

    scoring = Scoring(passes.text.split, mode, distance + width, width, first=int(starts[0]))
    return passes.kept(scoring, batches, len(starts) * width).nats


# --- where heads look ----------------------------------------------------------------------------


class Looks(AttentionBackend):
    """Attention by its definition that records where each head looks, in slices of queries.

    Only queries in the second half of the sequence are recorded: all of these have many keys to choose from.

    Args:
        length: tokens of a sequence.
        alone: with queries of zero, so that only a bias decides where a head looks.
    """

    name = "looks"

    def __init__(self, length: int, alone: bool) -> None:
        self.length, self.alone = length, alone
        self.layers: list[dict[str, Tensor]] = []
        """Sums over the queries, (H,) or (H, length) float64 each."""
        self.layer = 0
        """Index of the layer that comes next in a pass."""

    def prepare(self, scheme: PositionScheme, request: Request) -> Attend:
        q_pos, k_pos = request.q_pos, request.k_pos

        def attend(q: Tensor, k: Tensor, v: Tensor, x: Tensor | None) -> Tensor:
            outs = []
            q = torch.zeros_like(q) if self.alone else q
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
                self._note(weights.double(), start)
            self.layer += 1
            return torch.cat(outs, dim=2)

        return attend

    def _note(self, weights: Tensor, start: int) -> None:
        """Add the weights (B, H, rows, keys) of some queries, from number `start` on, to the layer's sums.

        Distances are in tokens: those of positions are others where positions are drawn.
        """
        rows, keys = (torch.arange(n, device=weights.device) for n in weights.shape[2:])
        rows = rows + start
        late = rows >= self.length // 2
        weights, rows = weights[:, :, late], rows[late]
        if self.layer == len(self.layers):
            one = torch.zeros(weights.shape[1], dtype=torch.float64)
            zeros = {name: one.clone() for name in ("distance", "entropy", "first", "queries")}
            self.layers.append(zeros | {"weights": one[:, None].repeat(1, self.length)})
        sums, distance = self.layers[self.layer], (rows[:, None] - keys).clamp_min(0)
        sums["queries"] += weights.shape[0] * len(rows)
        sums["distance"] += (weights * distance).sum(dim=(0, 2, 3)).cpu()
        sums["entropy"] += torch.special.entr(weights).sum(dim=(0, 2, 3)).cpu()
        sums["first"] += weights[..., 0].sum(dim=(0, 2)).cpu()
        sums["weights"].index_add_(1, distance.flatten().cpu(), weights.sum(dim=0).flatten(1).cpu())


def attention(group: Group, lengths: Sequence[int], windows: int) -> list[Point]:
    """Where each head looks, in evenly spaced windows of the text.

    Returns:
        A point for each length. `heads` has for each layer and head of the first seed the mean distance in tokens,
        the entropy in nats, the weight of the first token, and the mean `weights` at distances `nearest` to
        `farthest`; all over queries in the second half of the windows. `sink_rate` is the share of heads, of all
        seeds, that give the first token more than 0.3. `numbers` has means over the heads of each run: the same
        four, the weight of keys `near` (distances below L / 8) and `beyond` (L or more), and `falling`, the share
        of steps from one range of distances to the next at which the mean weight of a key falls. `bias_alone` has
        the same means for queries of zero: what the bias does without what was trained.
    """
    trained = group.train_length

    def measured(length: int) -> Point:
        starts = np.arange(0, group.num_tokens // length, max(1, group.num_tokens // length // windows))
        starts = starts[:windows] * length
        edges = curve_edges(length, trained) - 1  # distances from 0
        found = [_look(passes, starts, length, edges) for passes in group.passes]
        alone = [_means(_look(passes, starts[:1], length, edges, alone=True), trained) for passes in group.passes]
        means = [_means(heads, trained) for heads in found]
        for heads in found:
            del heads["each"]
        columns = {key: values.tolist() for key, values in found[0].items()}
        return {
            "windows": len(starts),
            "nearest": edges[:-1].tolist(),
            "farthest": (edges[1:] - 1).tolist(),
            "heads": [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)],
            "sink_rate": float(np.mean([heads["first"] > SINK for heads in found])),
            "numbers": {
                key: dict(zip(group.labels, (own[key] for own in means), strict=True)) for key in means[0]
            },
            "bias_alone": {key: float(np.mean([own[key] for own in alone])) for key in alone[0]},
        }

    return group.points("length", sorted(lengths), measured, empty=("nats",))


def _means(heads: Mapping[str, np.ndarray], trained: int) -> dict[str, float]:
    """Means over the heads of one model: `numbers` of `attention`."""
    weights, binned = heads["each"], heads["weights"]
    return {key: float(heads[key].mean()) for key in ("distance", "entropy", "first")} | {
        "sink_rate": float((heads["first"] > SINK).mean()),
        "near": float(weights[:, : max(1, trained // 8)].sum(axis=1).mean()),
        "beyond": float(weights[:, trained:].sum(axis=1).mean()),
        "falling": float((np.diff(binned, axis=1) < 0).mean()) if binned.shape[1] > 1 else 0.0,
    }


def _look(
    passes: Passes, starts: np.ndarray, length: int, edges: np.ndarray, alone: bool = False
) -> dict[str, np.ndarray]:
    """What `Looks` records on some windows: means over queries, one row per layer and head.

    `each` has the mean weights by distance, (rows, length); `weights` those of a key in each bin of distances.
    """
    model = passes.model
    require(
        isinstance(model, TransformerLM),
        f"view = attention: {passes.model.label} does not show its attention weights. Use a run of this package.",
    )
    assert isinstance(model, TransformerLM)
    model.serve(length)
    looks, backend = Looks(length, alone), model.backend
    model.backend = cast(Any, looks)  # for these passes only
    try:
        rows = max(1, passes.tokens_per_forward // length)
        with torch.inference_mode():
            for k in range(0, len(starts), rows):
                looks.layer = 0
                ids, _ = cut_windows(passes.text.tokens, passes.text.start_id, starts[k : k + rows], length)
                model.hidden(ids.to(model.device))
    finally:
        model.backend = backend
    sums = {name: torch.cat([layer[name] for layer in looks.layers]).numpy() for name in looks.layers[0]}
    layers, heads = len(looks.layers), len(looks.layers[0]["queries"])
    found = {"layer": np.repeat(np.arange(layers), heads), "head": np.tile(np.arange(heads), layers)}
    found |= {name: sums[name] / sums["queries"] for name in ("distance", "entropy", "first")}
    each = sums["weights"] / sums["queries"][:, None]
    # Share of the queries in the second half that have a key at a distance: all have up to half of the length.
    means = each / np.minimum(1.0, (length - np.arange(length)) / (length - length // 2))
    bins = [[float(f"{row[a:b].mean():.4g}") for a, b in itertools.pairwise(edges)] for row in means]
    return found | {"weights": np.array(bins), "each": each}
