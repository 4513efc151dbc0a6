"""GRAPE-AP: forget gates that depend on the query too, scaled by ALiBi's slopes. A reference.

Source: Zhang et al. 2025, "Group Representational Position Encoding", arXiv 2512.07805; the authors' code is
model-architectures/GRAPE (commit f5b539f).

    scores[h, i, j] = q_i . k_j / sqrt(head_dim) + m_h sum_{l = j+1 .. i} ln sigmoid(p_i . R_l^T n(p_l) / width)

p = weight x_t is a projection of the layer's input to `width` dimensions per head, n the RMS norm without
weights, R_l a rotation of pairs (c, c + width / 2) by l radians, and m ALiBi's slopes. Only the key's side is
normed and rotated, by its absolute position, so the bias depends on absolute positions. Each layer has its own
weight.

This is a reference without a fast path: each query sums a row of gates, and fused kernels get a dense mask.

Past the trained length: defined everywhere.
Differs from the source: nothing in the bias; the code's norms and shifts of queries and keys are not part of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alibi_lm.positions.alibi import alibi_slopes
from alibi_lm.positions.base import PositionScheme, PositionShape, exact
from alibi_lm.settings import require


@dataclass
class GrapeApConfig:
    """Gates between query and key (a reference without a fast path)."""

    name: str = "grape_ap"
    width: int | None = None
    """Dimensions of the gates' vectors per head, even; null: head_dim."""

    def __post_init__(self) -> None:
        require(
            self.width is None or (self.width >= 2 and self.width % 2 == 0),
            f"position.width = {self.width}. Pairs are rotated: use an even number >= 2, or null.",
        )

    def build(self, shape: PositionShape) -> GrapeAp:
        return GrapeAp(self, shape)


class GrapeAp(PositionScheme):
    """Gates of one layer."""

    translation_invariant = False
    per_layer = True
    cache_inputs = True
    slopes: Tensor

    def __init__(self, config: GrapeApConfig, shape: PositionShape) -> None:
        super().__init__(shape)
        self.width = config.width or shape.head_dim
        require(
            self.width % 2 == 0,
            f"model_dim / num_heads = {self.width} with position=grape_ap. Pairs are rotated: set position.width.",
        )
        self.weight = nn.Parameter(torch.empty(shape.num_heads * self.width, shape.model_dim))
        self.register_exact(
            "slopes", torch.tensor(alibi_slopes(shape.num_heads), dtype=torch.float64, device="cpu")
        )
        self.initialise()

    def initialise(self) -> None:
        """Normal, standard deviation model_dim^-0.5."""
        nn.init.normal_(self.weight, std=self.shape.model_dim**-0.5)

    @exact
    def features(self, x: Tensor) -> Tensor:
        """The vectors p: (B, T, D) -> (B, T, H width)."""
        return F.linear(x, self.weight.to(x.dtype))

    @exact
    def content_bias(self, q: Tensor, k: Tensor, x: Tensor | None, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        assert x is not None
        p = x.unflatten(-1, (self.shape.num_heads, self.width)).transpose(1, 2)
        cos, sin = (turn(k_pos.double())[:, None].to(p.dtype) for turn in (torch.cos, torch.sin))
        first, second = F.rms_norm(p, (self.width,), eps=torch.finfo(p.dtype).eps).chunk(2, dim=-1)
        turned = torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1)
        queries = p[:, :, torch.searchsorted(k_pos, q_pos)]
        gates = F.logsigmoid(queries @ turned.mT / self.width).masked_fill(k_pos > q_pos[:, None], 0.0)
        summed = gates.flip(-1).cumsum(-1).flip(-1) - gates
        return self.slopes.to(p.dtype)[:, None, None] * summed
