"""Shaw's relative positions: a trained vector per distance is added to each key and each value.

Source: Shaw, Uszkoreit & Vaswani 2018, "Self-Attention with Relative Position Representations", arXiv 1803.02155,
section 3; checked against evelinehong/Transformer_Relative_Position_PyTorch (commit fd1163e) and transformers.

    scores[h, i, j] = q_i . (k_j + a_K[min(i - j, clip)]) / sqrt(head_dim)
    out_i = sum_j weights[h, i, j] (v_j + a_V[min(i - j, clip)])

a_K and a_V (clip + 1 vectors of head_dim) are trained, separately in each layer and shared by its heads. The part
of the values needs the attention weights themselves, so only `eager` serves it; `values=false` leaves it out,
which later work found to lose nothing, and lets fused kernels serve the rest.

Past the trained length: defined everywhere; all distances from `clip` on share a vector.
Differs from the paper: its tables also have vectors for later keys, which a causal model never uses.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from alibi_lm.positions.base import PositionScheme, PositionShape, distances, exact
from alibi_lm.settings import require


@dataclass
class ShawConfig:
    """Trained vectors per distance."""

    name: str = "shaw"
    clip: int = 16
    """All distances from this one on share a vector, >= 1."""
    values: bool = True
    """Add vectors to the values too."""

    def __post_init__(self) -> None:
        require(self.clip >= 1, f"position.clip = {self.clip}. Use a whole number >= 1 (16 in the paper).")

    def build(self, shape: PositionShape) -> Shaw:
        return (ShawWithValues if self.values else Shaw)(self, shape)


class Shaw(PositionScheme):
    """Vectors added to the keys of one layer."""

    per_layer = True

    def __init__(self, config: ShawConfig, shape: PositionShape) -> None:
        super().__init__(shape)
        self.clip = config.clip
        self.table_k = nn.Parameter(torch.empty(config.clip + 1, shape.head_dim))
        self.initialise()

    def initialise(self) -> None:
        """Xavier uniform for the paper's tables of 2 clip + 1 vectors, as in the code named above."""
        bound = (6 / (2 * self.clip + 1 + self.shape.head_dim)) ** 0.5
        for table in self.parameters():
            nn.init.uniform_(table, -bound, bound)

    @exact
    def content_bias(self, q: Tensor, k: Tensor, x: Tensor | None, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        of_distance = q @ self.table_k.to(q.dtype).T * q.shape[-1] ** -0.5
        distance = distances(q_pos, k_pos).clamp_max(self.clip)
        return of_distance.gather(-1, distance.expand(*q.shape[:2], -1, -1))


class ShawWithValues(Shaw):
    """Vectors added to keys and values."""

    def __init__(self, config: ShawConfig, shape: PositionShape) -> None:
        super().__init__(config, shape)
        self.table_v = nn.Parameter(torch.empty(config.clip + 1, shape.head_dim))
        self.initialise()

    @exact
    def value_bias(self, weights: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        """The weights of all keys that share a vector are added up first."""
        distance = distances(q_pos, k_pos).clamp_max(self.clip).expand_as(weights)
        shares = weights.new_zeros(*weights.shape[:3], self.clip + 1).scatter_add(-1, distance, weights)
        return shares @ self.table_v.to(weights.dtype)
