"""How many keys each head must keep: by the bound from the weights, and as measured on a text.

The bound is that of `model/bound.py`. The measurement finds the shortest window that loses no more than the share
for any query of the first tokens of the text, in the full pass.

Shape letters: B batch, T queries, S keys, H heads, K head dim.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from alibi_lm.evaluate.views import Group, Point
from alibi_lm.model.bound import LOST_SHARE
from alibi_lm.model.cache import KeyValueCache, LayerPositions
from alibi_lm.model.hub_bounds import alibi_slopes, head_bounds, lost_shares
from alibi_lm.model.huggingface import HuggingFaceLM
from alibi_lm.model.streaming import beyond_scheme, bias_tails, weight_excess
from alibi_lm.model.transformer import TransformerLM
from alibi_lm.settings import require

SHARES = {"2^-25": LOST_SHARE, "1e-3": 1e-3, "1e-2": 1e-2}
"""The lost shares that the view uses, by their names in tables."""
TOKENS = 4096
"""Number of tokens on which the view measures."""
ROWS = 128
"""How many queries' weights are held at once."""


class _Needed(KeyValueCache):
    """A full cache that also computes the attention weights of every layer."""

    def __init__(self) -> None:
        super().__init__()
        self.lost: list[Tensor] = []
        """For each layer (H, S) float64: the largest share of any query on keys at each distance and beyond."""

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        x: Tensor | None,
        raw_k: Tensor,
        position: LayerPositions,
    ) -> Tensor:
        distances = torch.arange(q.shape[2], device=q.device)
        self.lost.append(largest_lost(q[0], k[0], position.scheme.distance_bias(distances)))
        return super().attend(layer, q, k, v, x, raw_k, position)


def largest_lost(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    """The largest share of any query's attention that goes to keys at each distance and beyond.

    Args:
        q: (H, T, K).
        k: (H, T, K).
        bias: (H, T) by distance.

    Returns:
        (H, T) float64, falling.
    """
    tokens = q.shape[1]
    found = torch.zeros(q.shape[:2], dtype=torch.float64, device=q.device)
    for start in range(0, tokens, ROWS):
        rows = torch.arange(start, min(start + ROWS, tokens), device=q.device)
        distance = rows[:, None] - torch.arange(tokens, device=q.device)
        scores = q[:, rows].double() @ k.double().mT * q.shape[-1] ** -0.5
        if bias is not None:
            scores = scores + bias.double()[:, distance.clamp_min(0)]
        weights = scores.masked_fill(distance < 0, -torch.inf).softmax(-1)
        # For query i, the keys at distances >= d are the first i - d + 1.
        shares = weights.cumsum(-1).gather(2, distance.clamp_min(0).expand(len(q), -1, -1))
        found = torch.maximum(found, shares.masked_fill(distance < 0, 0.0).amax(1))
    return found


@torch.inference_mode()
def windows(group: Group, lengths: Sequence[int]) -> list[Point]:
    """A point for each layer and head of a model, or one with the `reason` why there is no bound.

    Each has `layer` and `head` (from 1), `slope` (how much the bias falls from the query's own key to the next),
    `excess` (the bound on a key's score over that of the query's own key), `windows` and `needed` (keys, by lost
    share; a `needed` that is as long as the measured text may be longer). A model of transformers that does not
    return its attention weights has no `needed`. Only the first seed is used: other seeds have other weights, but
    similar windows.
    """
    passes = group.passes[0]
    model = passes.model
    try:
        if isinstance(model, HuggingFaceLM):
            measured, length = TOKENS // 4, len(passes.text.tokens)
            bounds = {name: head_bounds(model, length, share) for name, share in SHARES.items()}
            kept = {name: [layer.windows for layer in each] for name, each in bounds.items()}
            excess = [layer.excess for layer in bounds["2^-25"]]
            slopes = [alibi_slopes(model)] * len(excess)
        elif isinstance(model, TransformerLM):
            require(not (reason := beyond_scheme(model)), reason)
            measured, tails, excess = TOKENS, bias_tails(model), weight_excess(model)
            slopes = [tail.line[:, 0] - tail.line[:, 1] for tail in tails]
            kept = {
                name: [tail.windows(b, share) for tail, b in zip(tails, excess, strict=True)]
                for name, share in SHARES.items()
            }
        else:
            raise ValueError("its layers are not known here")
    except ValueError as error:
        return [{"reason": str(error)}]
    tokens = torch.from_numpy(passes.text.tokens[:measured].astype("int64"))
    inputs = torch.cat([torch.tensor([passes.text.start_id]), tokens[:-1]])[None].to(model.device)
    if isinstance(model, HuggingFaceLM):
        model.serve(len(tokens))
        lost = lost_shares(model, inputs)
    else:
        cache = _Needed()
        model.hidden(inputs, cache=cache)
        lost = cache.lost
    points = []
    for layer, head in itertools.product(range(len(excess)), range(len(excess[0]))):
        point: Point = {"layer": layer + 1, "head": head + 1, "slope": float(slopes[layer][head])}
        point["excess"] = float(excess[layer][head])
        point["windows"] = {name: int(each[layer][head]) for name, each in kept.items()}
        if lost is not None:
            needed = {name: max(1, int((lost[layer][head] > share).sum())) for name, share in SHARES.items()}
            point |= {"needed": needed, "measured_on": len(tokens)}
        points.append(point)
    return points
