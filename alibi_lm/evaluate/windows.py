"""How many keys each head must keep: by the bound from the weights, and truly, on a text.

The bound is that of `model/bound.py`. What is truly needed is measured: the least window that loses no more than
the share for any query of the first tokens of the text, in the full pass.

Shape letters: B batch, T queries, S keys, H heads, K head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from alibi_lm.evaluate.passes import Passes
from alibi_lm.model.bound import LOST_SHARE
from alibi_lm.model.cache import KeyValueCache, LayerPositions
from alibi_lm.model.hub_bounds import alibi_slopes, head_bounds, lost_shares
from alibi_lm.model.huggingface import HuggingFaceLM
from alibi_lm.model.streaming import beyond_scheme, bias_tails, weight_excess
from alibi_lm.model.transformer import TransformerLM

SHARES = {"2^-25": LOST_SHARE, "1e-3": 1e-3, "1e-2": 1e-2}
"""Lost shares of the view, by the name that tables give them."""
TOKENS = 4096
"""Tokens on which the view measures."""
ROWS = 128
"""Queries whose weights exist at a time."""


class _Needed(KeyValueCache):
    """A full cache that looks at the attention weights of every layer on their way."""

    def __init__(self) -> None:
        super().__init__()
        self.lost: list[Tensor] = []
        """Of each layer (H, S) float64: the largest share of any query at distances from each on."""

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
        self.lost.append(largest_lost(q[0], k[0], position.scheme.distance_bias(torch.arange(q.shape[2]))))
        return super().attend(layer, q, k, v, x, raw_k, position)


def largest_lost(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    """The largest share that keys from each distance on have of any query's attention.

    Args:
        q: (H, T, K).
        k: (H, T, K).
        bias: (H, T) by distance.

    Returns:
        (H, T) float64, falling.
    """
    tokens = q.shape[1]
    found = torch.zeros(q.shape[:2], dtype=torch.float64)
    for start in range(0, tokens, ROWS):
        rows = torch.arange(start, min(start + ROWS, tokens))
        distance = rows[:, None] - torch.arange(tokens)
        scores = q[:, rows].double() @ k.double().mT * q.shape[-1] ** -0.5
        if bias is not None:
            scores = scores + bias.double()[:, distance.clamp_min(0)]
        weights = scores.masked_fill(distance < 0, -torch.inf).softmax(-1)
        # Of query i, keys at distances >= d are the first i - d + 1.
        shares = weights.cumsum(-1)
        last = rows[:, None] - torch.arange(tokens)
        by_distance = shares.gather(2, last.clamp_min(0).expand(len(q), -1, -1)).masked_fill(last < 0, 0.0)
        found = torch.maximum(found, by_distance.amax(1))
    return found


def hub_windows(model: HuggingFaceLM, passes: Passes) -> list[dict[str, Any]]:
    """`head_windows` of a model of transformers, without `needed` where its attention weights are not told."""
    try:
        bounds = {name: head_bounds(model, len(passes.text.tokens), share) for name, share in SHARES.items()}
    except ValueError as error:
        return [{"reason": str(error)}]
    slopes = alibi_slopes(model)
    tokens = torch.from_numpy(passes.text.tokens[: TOKENS // 4].astype("int64"))
    inputs = torch.cat([torch.tensor([passes.text.start_id]), tokens[:-1]])[None].to(model.device)
    model.serve(len(tokens))
    measured = lost_shares(model, inputs)
    points = []
    for layer, found in enumerate(bounds["2^-25"]):
        for head, excess in enumerate(found.excess.tolist()):
            point = {"layer": layer + 1, "head": head + 1, "slope": float(slopes[head]), "excess": excess}
            point["windows"] = {name: int(each[layer].windows[head]) for name, each in bounds.items()}
            if measured is not None:
                lost = measured[layer][head]
                point["needed"] = {name: max(1, int((lost > share).sum())) for name, share in SHARES.items()}
                point["measured_on"] = len(tokens)
            points.append(point)
    return points


@torch.inference_mode()
def head_windows(passes: Passes) -> list[dict[str, Any]]:
    """A point for each layer and head of a model, or one with the `reason` why there is no bound.

    Each has `layer` and `head` (from 1 on), `slope` (how much the bias falls from the own key to the next),
    `excess` (the bound on a key's score over that of the query's own key), `windows` and `needed` (keys, by lost
    share; a `needed` that is as long as the measured text may be longer).
    """
    model = passes.model
    if isinstance(model, HuggingFaceLM):
        return hub_windows(model, passes)
    if not isinstance(model, TransformerLM):
        return [{"reason": "its layers are not known here"}]
    if reason := beyond_scheme(model):
        return [{"reason": reason}]
    try:
        tails, excess = bias_tails(model), weight_excess(model)
        windows = {
            name: [tail.windows(b, share) for tail, b in zip(tails, excess, strict=True)]
            for name, share in SHARES.items()
        }
    except ValueError as error:
        return [{"reason": str(error)}]
    tokens = torch.from_numpy(passes.text.tokens[:TOKENS].astype("int64"))
    inputs = torch.cat([torch.tensor([passes.text.start_id]), tokens[:-1]])[None]
    cache = _Needed()
    model.to("cpu").hidden(inputs, cache=cache)
    points = []
    for layer, (tail, b, lost) in enumerate(zip(tails, excess, cache.lost, strict=True)):
        for head in range(len(b)):
            needed = {name: int((lost[head] > share).sum()) for name, share in SHARES.items()}
            points.append(
                {
                    "layer": layer + 1,
                    "head": head + 1,
                    "slope": float(tail.line[head, 0] - tail.line[head, 1]),
                    "excess": float(b[head]),
                    "windows": {name: int(found[layer][head]) for name, found in windows.items()},
                    "needed": {name: max(1, count) for name, count in needed.items()},
                    "measured_on": len(tokens),
                }
            )
    return points
