"""The definition of attention, in plain tensor operations; slow, and the reference for every other backend."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from alibi_lm.attention.base import AttentionBackend, hidden_keys
from alibi_lm.positions.base import PositionScheme


class EagerPrepared(NamedTuple):
    """Score bias (H, T, S) float32 or None, and hidden keys (T, S) bool."""

    bias: Tensor | None
    hidden: Tensor


class EagerAttention(AttentionBackend):
    """Scores, bias, mask, softmax, weighted sum: scores and softmax in float32 or better."""

    name = "eager"

    def prepare(
        self, scheme: PositionScheme, q_pos: Tensor, k_pos: Tensor, window: int | None, dtype: torch.dtype
    ) -> EagerPrepared:
        """See the base class."""
        return EagerPrepared(scheme.bias(q_pos, k_pos), hidden_keys(q_pos, k_pos, window))

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, prepared: EagerPrepared, dropout: float) -> Tensor:
        """See the base class."""
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        if scores.dtype in (torch.bfloat16, torch.float16):
            scores = scores.float()
        if prepared.bias is not None:
            scores = scores + prepared.bias
        weights = scores.masked_fill(prepared.hidden, float("-inf")).softmax(dim=-1)
        return F.dropout(weights, dropout).to(v.dtype) @ v
