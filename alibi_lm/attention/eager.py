"""The definition of attention, in plain tensor operations; slow, and the reference for every other backend."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from alibi_lm.attention.base import AttentionBackend, hidden_keys
from alibi_lm.positions.base import PositionScheme


class EagerPrepared(NamedTuple):
    """What the layers share: scheme, positions, score bias (H, T, S) or None, hidden keys (T, S) bool."""

    scheme: PositionScheme
    q_pos: Tensor
    k_pos: Tensor
    bias: Tensor | None
    hidden: Tensor


class EagerAttention(AttentionBackend[EagerPrepared]):
    """Scores, bias, mask, softmax, weighted sum: scores and softmax in float32 or better."""

    name = "eager"

    def prepare(
        self,
        scheme: PositionScheme,
        q_pos: Tensor,
        k_pos: Tensor,
        span: int,
        window: int | None,
        dtype: torch.dtype,
    ) -> EagerPrepared:
        return EagerPrepared(scheme, q_pos, k_pos, scheme.bias(q_pos, k_pos), hidden_keys(q_pos, k_pos, window))

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, prepared: EagerPrepared, x: Tensor | None, dropout: float
    ) -> Tensor:
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        if scores.dtype in (torch.bfloat16, torch.float16):
            scores = scores.float()
        content = prepared.scheme.content_bias(q, k, x, prepared.q_pos, prepared.k_pos)
        for bias in (prepared.bias, content):
            if bias is not None:
                scores = scores + bias
        weights = scores.masked_fill(prepared.hidden, float("-inf")).softmax(dim=-1)
        return F.dropout(weights, dropout).to(v.dtype) @ v
