"""The definition of attention, in plain tensor operations; slow, and the reference for every other backend."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from alibi_lm.attention.base import Attend, AttentionBackend, Request, hidden_keys
from alibi_lm.positions.base import PositionScheme, at_least_float32


class EagerAttention(AttentionBackend):
    """Scores, bias, mask, softmax, weighted sum: scores and softmax in float32 or better."""

    name = "eager"

    def prepare(self, scheme: PositionScheme, request: Request) -> Attend:
        q_pos, k_pos = request.q_pos, request.k_pos
        bias, hidden = scheme.bias(q_pos, k_pos), hidden_keys(q_pos, k_pos, request.window)

        def attend(q: Tensor, k: Tensor, v: Tensor, x: Tensor | None) -> Tensor:
            weights = attention_weights(scheme, q, k, x, q_pos, k_pos, bias, hidden)
            weights = F.dropout(weights, request.dropout)
            out, added = weights.to(v.dtype) @ v, scheme.value_bias(weights, q_pos, k_pos)
            return out if added is None else out + added.to(v.dtype)

        return attend


def attention_weights(
    scheme: PositionScheme,
    q: Tensor,
    k: Tensor,
    x: Tensor | None,
    q_pos: Tensor,
    k_pos: Tensor,
    bias: Tensor | None,
    hidden: Tensor,
) -> Tensor:
    """Weights of the keys of each query: (B, H, T, S), float32 or better.

    Args:
        scheme: the layer's scheme.
        q: (B, H, T, K').
        k: (B, H, S, K').
        x: (B, S, F), features of the keys, or None.
        q_pos: (T,) int64.
        k_pos: (S,) int64.
        bias: `scheme.bias` of these positions.
        hidden: (T, S) bool, true where a query must not see a key.
    """
    scores = scheme.scores(q, k, x, q_pos, k_pos)
    if scores is None:
        with torch.autocast(q.device.type, enabled=False):  # fused kernels do not round scores either
            scores = at_least_float32(q) @ at_least_float32(k).mT * q.shape[-1] ** -0.5
    for added in (bias, scheme.content_bias(q, k, x, q_pos, k_pos)):
        if added is not None:
            scores = scores + added
    return scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
