"""Sinusoidal position embeddings: a fixed wave vector is added to each (scaled) token embedding.

Source: Vaswani et al. 2017, arXiv 1706.03762, section 3.5; the `fairseq` variant is the one that the ALiBi
paper's baseline used (Baevski & Auli 2018; fairseq/modules/sinusoidal_positional_embedding.py).

    vaswani: x_p += [sin(p f_0), cos(p f_0), sin(p f_1), ...]           f_i = 10000^(-i / half)
    fairseq: x_p += [sin(p f_0), ..., sin(p f_last), cos(p f_0), ...]   f_i = 10000^(-i / (half - 1))

with half = model_dim / 2; p counts from 0, in the fairseq variant from 2.

Past the trained length: defined, with values never seen in training; measured, not refused.
Differs from the paper: nothing in the `fairseq` variant, the default, which also keeps its float32 arithmetic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from alibi_lm.positions.base import PositionScheme, PositionShape
from alibi_lm.settings import require, require_one_of

VARIANTS = ("fairseq", "vaswani")


@dataclass
class SinusoidalConfig:
    """Fixed wave vectors added to the embeddings."""

    name: str = "sinusoidal"
    variant: str = "fairseq"
    """`fairseq` (halves, from position 2, divisor half - 1; the paper's) or `vaswani` (interleaved, from 0)."""

    def __post_init__(self) -> None:
        require_one_of("position.variant", self.variant, VARIANTS)

    def build(self, shape: PositionShape) -> Sinusoidal:
        return Sinusoidal(self, shape)


class Sinusoidal(PositionScheme):
    """Absolute wave vectors, computed for any position."""

    translation_invariant = False
    frequencies: Tensor

    def __init__(self, config: SinusoidalConfig, shape: PositionShape) -> None:
        super().__init__(shape)
        dim = shape.model_dim
        require(
            dim % 2 == 0 and dim >= 4,
            f"model.model_dim = {dim} with position=sinusoidal. Waves come in pairs: use an even number >= 4.",
        )
        self.fairseq = config.variant == "fairseq"
        half = dim // 2
        if self.fairseq:
            # float32 throughout, as in fairseq: a float64 table differs by up to 1e-3 at long lengths.
            index = torch.arange(half, dtype=torch.float32, device="cpu")
            frequencies = torch.exp(index * -(math.log(10000.0) / (half - 1)))
        else:
            index = torch.arange(half, dtype=torch.float64, device="cpu")
            frequencies = torch.exp(index * -(math.log(10000.0) / half))
        self.register_exact("frequencies", frequencies)

    def vectors(self, positions: Tensor) -> Tensor:
        """The position vectors: (T,) int64 -> (T, D) float32."""
        if self.fairseq:
            angles = (positions + 2).to(self.frequencies.dtype)[:, None] * self.frequencies
            return torch.cat([angles.sin(), angles.cos()], dim=1)
        angles = positions.to(self.frequencies.dtype)[:, None] * self.frequencies
        return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1).float()

    def add_to_embeddings(self, x: Tensor, positions: Tensor) -> Tensor:
        return x + self.vectors(positions).to(x.dtype)
