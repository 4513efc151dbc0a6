"""xPos: rotary position embeddings whose products also decay with the distance, faster at high frequencies.

Source: Sun et al. 2023, "A Length-Extrapolatable Transformer", arXiv 2212.10554, section 3.2; the authors' code is
microsoft/torchscale (commit 4d1e0e8), torchscale/component/xpos_relative_position.py.

    q_p -> rotation of q_p by p * inv_freq, times zeta^((p - centre) / scale_base)
    k_p -> rotation of k_p by p * inv_freq, times zeta^((centre - p) / scale_base)
    inv_freq_k = 10000^(-2k / head_dim),  zeta_k = (2k / head_dim + 0.4) / 1.4,  pairs k = 0 .. head_dim / 2 - 1

The product of a pair then has the factor zeta^((i - j) / scale_base), and the centre cancels. The centre keeps the
powers within the range of floats: it is half the longest sequence to be served (`context_length`), so that cached
keys never change; the authors' code takes half of the current sequence. Sequences of more than about 32,000 tokens
(64 times scale_base) are refused: no centre keeps their powers within that range.

Past the trained length: defined, at angles never seen in training, with products that decay further. Differs from
the paper: the paper also evaluates with blockwise attention, a window of half the trained length; this is the
position scheme alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from alibi_lm.positions.base import PositionScheme, PositionShape, wave_frequencies
from alibi_lm.positions.rotary import rotate_pairs
from alibi_lm.settings import require

LARGEST_POWER = 40.0
"""Natural logarithm of the largest factor of a query or key. The product of two must be within float32, which
ends at e^88, also for hidden keys: a mask of -inf cannot hide an infinite score."""


@dataclass
class XposConfig:
    """Rotation of queries and keys, with a decay."""

    name: str = "xpos"
    scale_base: float = 512.0
    """Number of tokens in which a product decays by its zeta, > 0."""

    def __post_init__(self) -> None:
        require(self.scale_base > 0, f"position.scale_base = {self.scale_base}. Use a number above 0.")

    def build(self, shape: PositionShape) -> Xpos:
        return Xpos(self, shape)


class Xpos(PositionScheme):
    """Rotation and decay of interleaved pairs."""

    inv_freq: Tensor
    zeta: Tensor

    def __init__(self, config: XposConfig, shape: PositionShape) -> None:
        super().__init__(shape)
        dim = shape.head_dim
        require(
            dim % 2 == 0,
            f"model_dim / num_heads = {dim} with position=xpos. Pairs are rotated: it must be even.",
        )
        self.scale_base, self.centre = config.scale_base, -(-shape.context_length // 2)
        longest = int(2 * LARGEST_POWER * config.scale_base / math.log(1.4 / 0.4))
        require(
            shape.context_length <= longest,
            f"position=xpos with scale_base = {config.scale_base:g} and a sequence of {shape.context_length} "
            f"tokens: its factors leave the range of floats beyond {longest} tokens. Use shorter sequences.",
        )
        self.register_exact("inv_freq", wave_frequencies(dim))
        self.register_exact(
            "zeta", (torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") + 0.4 * dim) / (1.4 * dim)
        )

    def tables(self, positions: Tensor) -> tuple[Tensor, ...]:
        """Cosines and sines, and the factors of queries, each (T, K/2) float32; the arithmetic is float64."""
        angles = positions.to(self.inv_freq.dtype)[:, None] * self.inv_freq
        power = (positions.to(self.zeta.dtype) - self.centre)[:, None] / self.scale_base
        return angles.cos().float(), angles.sin().float(), (self.zeta**power).float()

    def transform_qk(self, q: Tensor, k: Tensor, tables: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        cos, sin, factor = tables
        return rotate_pairs(q, cos * factor, sin * factor), rotate_pairs(k, cos / factor, sin / factor)
