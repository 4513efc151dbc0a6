"""PoPE, polar positions: magnitudes of queries and keys come from content alone, angles from positions alone.

Source: Gopalakrishnan et al. 2025, "Decoupling the What and Where With Polar Coordinate Positional Embedding",
arXiv 2509.10534, section 3; checked against lucidrains/x-transformers 2.31.10, `PolarEmbedding`.

    scores[h, i, j] = sum_c softplus(q_ic) softplus(k_jc) cos((i - j) w_c - phase[h, c]) / sqrt(head_dim)
    w_c = 10000^(-c / head_dim),  c = 0 .. head_dim - 1

phase is trained, starts at 0, is clamped to [-2 pi, 0] (without a gradient outside), and is added to the angle of
the key. All layers share one set. The cosine is a product of vectors twice as wide, which the kernels get:
queries [softplus(q) cos, softplus(q) sin], and keys likewise.

Past the trained length: defined, at angles never seen in training.
Differs from the paper: nothing from the code named above.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alibi_lm.positions.base import PositionScheme, PositionShape, at_least_float32, wave_frequencies
from alibi_lm.settings import require


@dataclass
class PopeConfig:
    """Angles from positions, magnitudes from content."""

    name: str = "pope"
    theta: float = 10000.0
    """Base of the frequencies, > 1."""

    def __post_init__(self) -> None:
        require(self.theta > 1, f"position.theta = {self.theta}. Use a number above 1 (10000 in the paper).")

    def build(self, shape: PositionShape) -> Pope:
        return Pope(self, shape)


class Pope(PositionScheme):
    """Polar queries and keys, one phase per head and dimension."""

    inv_freq: Tensor

    def __init__(self, config: PopeConfig, shape: PositionShape) -> None:
        super().__init__(shape)
        self.register_exact("inv_freq", wave_frequencies(2 * shape.head_dim, config.theta))
        self.phase = nn.Parameter(torch.empty(shape.num_heads, shape.head_dim))
        self.initialise()

    def initialise(self) -> None:
        """Phases 0."""
        nn.init.zeros_(self.phase)

    def tables(self, positions: Tensor) -> tuple[Tensor, ...]:
        """Cosines and sines, of queries (T, K) and of keys (H, T, K), float32."""
        angles = positions.to(self.inv_freq.dtype)[:, None] * self.inv_freq
        cos, sin = angles.cos().float(), angles.sin().float()
        phase = self.phase.float().clamp(-2 * math.pi, 0)[:, None]
        return cos, sin, cos * phase.cos() - sin * phase.sin(), sin * phase.cos() + cos * phase.sin()

    def transform_qk(self, q: Tensor, k: Tensor, tables: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        # Backends divide by the root of the width, which is twice that of a head.
        cos, sin, cos_k, sin_k = tables
        return polar(q, cos, sin, 2**0.5), polar(k, cos_k, sin_k)


def polar(x: Tensor, cos: Tensor, sin: Tensor, factor: float = 1.0) -> Tensor:
    """Magnitudes softplus(x) at angles: (B, H, T, K), two of (T, K) or (H, T, K) -> (B, H, T, 2 K), dtype of x."""
    magnitude = F.softplus(at_least_float32(x)) * factor
    return torch.cat([magnitude * cos, magnitude * sin], dim=-1).to(x.dtype)
