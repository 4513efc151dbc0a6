"""Wall: forget gates for each dimension of a head, inside the product of query and key. A reference.

Source: Tilde Research 2026, "Wall Attention", code in fla-org/flash-linear-attention (commit bc3b101),
fla/ops/wall_attn/naive.py; it extends the forgetting transformer (Lin et al. 2025, arXiv 2503.02130).

    scores[h, i, j] = sum_c q_ic k_jc f[j + 1, c] ... f[i, c] / sqrt(head_dim),  f[t] = sigmoid(weight x_t + 8)

x_t is the layer's input; `weight` (model_dim x model_dim) and the bias, which starts at 8 (almost nothing is
forgotten), are trained, separately in each layer. `scalar_gate` adds FoX's sum of logarithms of one gate per head.

This is a reference without a fast path: only `eager` serves it. Products of gates are computed relative to the
first query of each block of 16, so that none overflows.

Past the trained length: defined everywhere.
Differs from the source: 1 / ln 2 is exact here, where the code has 8 digits of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alibi_lm.positions.base import PositionScheme, PositionShape, exact

BLOCK = 16
"""Number of queries that share a reference point."""
START = 8.0


@dataclass
class WallConfig:
    """Forget gates per dimension (a reference without a fast path)."""

    name: str = "wall"
    scalar_gate: bool = False
    """Add the logarithms of one gate per head."""

    def build(self, shape: PositionShape) -> Wall:
        return Wall(self, shape)


class Wall(PositionScheme):
    """Gates of one layer."""

    per_layer = True
    cache_inputs = True

    def __init__(self, config: WallConfig, shape: PositionShape) -> None:
        super().__init__(shape)
        self.width, scalars = shape.num_heads * shape.head_dim, shape.num_heads if config.scalar_gate else 0
        self.weight = nn.Parameter(torch.empty(self.width + scalars, shape.model_dim))
        self.gate_bias = nn.Parameter(torch.empty(self.width + scalars))
        self.initialise()

    def initialise(self) -> None:
        """Normal weights, standard deviation model_dim^-0.5; biases 8."""
        nn.init.normal_(self.weight, std=self.shape.model_dim**-0.5)
        nn.init.constant_(self.gate_bias, START)

    @exact
    def features(self, x: Tensor) -> Tensor:
        """Logarithms of the gates: (B, T, D) -> (B, T, H K), or (B, T, H K + H) with scalar gates."""
        return F.logsigmoid(F.linear(x, self.weight.to(x.dtype), self.gate_bias.to(x.dtype)))

    @exact
    def scores(self, q: Tensor, k: Tensor, x: Tensor | None, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        assert x is not None
        own, heads = torch.searchsorted(k_pos, q_pos), self.shape.num_heads
        total = x.double().cumsum(1)
        of_key = total[..., : self.width].unflatten(-1, (heads, -1)).transpose(1, 2)
        blocks = [
            self._block(q[:, :, n : n + BLOCK], k, of_key, own[n : n + BLOCK]) for n in range(0, len(own), BLOCK)
        ]
        scores = torch.cat(blocks, dim=2) * q.shape[-1] ** -0.5
        if total.shape[-1] > self.width:
            scalar = total[..., self.width :].mT
            scores = scores + (scalar[..., own, None] - scalar[..., None, :]).to(q.dtype)
        return scores

    def _block(self, q: Tensor, k: Tensor, total: Tensor, own: Tensor) -> Tensor:
        """Products of up to BLOCK queries, whose own keys have indices `own`, with all keys; 0 for later keys."""
        first, end = int(own[0]), int(own[-1]) + 1
        of_query, start = total[:, :, own], total[:, :, first, None]
        # Keys up to the first query: both factors are below 1 for any gates.
        faded_q = q * (of_query - start).exp().to(q.dtype)
        faded_k = k[:, :, : first + 1] * (start - total[:, :, : first + 1]).exp().to(q.dtype)
        between = (of_query[..., None, :] - total[:, :, None, first + 1 : end]).clamp_max(0).exp().to(q.dtype)
        near = torch.einsum("bhtc,bhsc,bhtsc->bhts", q, k[:, :, first + 1 : end], between)
        return F.pad(torch.cat([faded_q @ faded_k.mT, near], dim=-1), (0, k.shape[2] - end))
