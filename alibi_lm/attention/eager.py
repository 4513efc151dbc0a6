"""The definition of attention, in plain tensor operations; slow, and the reference for every other backend."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from alibi_lm.attention.base import Attend, AttentionBackend, Request, hidden_keys
from alibi_lm.positions.base import PositionScheme


class EagerAttention(AttentionBackend):
    """Scores, bias, mask, softmax, weighted sum: scores and softmax in float32 or better."""

    name = "eager"

    def prepare(self, scheme: PositionScheme, request: Request) -> Attend:
        q_pos, k_pos = request.q_pos, request.k_pos
        bias, hidden = scheme.bias(q_pos, k_pos), hidden_keys(q_pos, k_pos, request.window)

        def attend(q: Tensor, k: Tensor, v: Tensor, x: Tensor | None) -> Tensor:
            scores = q @ k.mT * q.shape[-1] ** -0.5
            if scores.dtype in (torch.bfloat16, torch.float16):
                scores = scores.float()
            for added in (bias, scheme.content_bias(q, k, x, q_pos, k_pos)):
                if added is not None:
                    scores = scores + added
            weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
            return F.dropout(weights, request.dropout).to(v.dtype) @ v

        return attend
