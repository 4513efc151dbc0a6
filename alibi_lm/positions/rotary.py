"""Rotary position embeddings: queries and keys are rotated by angles proportional to their positions.

Source: Su et al. 2021, arXiv 2104.09864, section 3.4.2; the ALiBi paper used JunnYu/RoFormer_pytorch: all of
the head dimension, interleaved pairs, in every layer, values not rotated.

    (x_2i, x_2i+1) -> rotation by p * inv_freq_i,    inv_freq_i = theta^(-2i / head_dim)

so that q_i . k_j depends on positions only through i - j.

Changes of frequency at test time (`scaling`), each from its source, with s = max(1, context / train length), or
the `factor` that is given:
    linear    inv_freq / s                            Chen et al. 2023, arXiv 2306.15595 (position interpolation)
    ntk       theta * s^(head_dim / (head_dim - 2))   bloc97 2023 ("NTK-aware")
    dynamic   ntk with s = factor * context / train length - (factor - 1), past the trained length; factor is 1
              unless given                            emozilla 2023; transformers, `modeling_rope_utils.py`
    by_parts  per frequency inv_freq, inv_freq / s or between the two      Peng et al. 2023, arXiv 2309.00071
    yarn      by_parts, and an amplitude 0.1 ln s + 1 of queries and keys  the same

Past the trained length: defined, at angles never seen in training (or rescaled ones).
Differs from the paper: nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alibi_lm.positions.base import PositionScheme, PositionShape
from alibi_lm.settings import require

SCALINGS = ("none", "linear", "ntk", "dynamic", "by_parts", "yarn")


@dataclass
class RotaryConfig:
    """Rotation of queries and keys."""

    name: str = "rotary"
    theta: float = 10000.0
    """Base of the frequencies, > 1."""
    scaling: str = "none"
    """none, linear, ntk, dynamic, by_parts or yarn."""
    factor: float | None = None
    """Scaling factor >= 1; null: max(1, context_length / train_length), for dynamic 1."""

    def __post_init__(self) -> None:
        require(self.theta > 1, f"position.theta = {self.theta}. Use a number above 1 (10000 in the paper).")
        require(
            self.scaling in SCALINGS,
            f"position.scaling = {self.scaling!r}. Allowed: {', '.join(SCALINGS)}.",
        )
        require(
            self.factor is None or self.factor >= 1,
            f"position.factor = {self.factor}. Use a number >= 1, or null for context / train length.",
        )

    def build(self, shape: PositionShape) -> Rotary:
        return Rotary(self, shape)

    def test_changes(self, stretch: float) -> dict[str, list[dict[str, Any]]]:
        """Changes to try at `stretch` times the training length, by name: settings, with several factors each."""
        names = {"linear": "position interpolation", "ntk": "NTK", "dynamic": "dynamic NTK"}
        names |= {"by_parts": "NTK by parts", "yarn": "YaRN"}
        common = sorted({max(1.0, stretch * part) for part in (0.5, 1, 2)})
        return {
            name: [{"scaling": how, "factor": f} for f in ((1.0, 1.5, 2.0) if how == "dynamic" else common)]
            for how, name in names.items()
        }


def frequencies(
    scaling: str, head_dim: int, theta: float, factor: float, train_length: int
) -> tuple[Tensor, float]:
    """Frequencies after a scaling: inv_freq (K/2,) float64, and the amplitude of queries and of keys."""
    if scaling in ("ntk", "dynamic") and head_dim > 2:
        theta *= factor ** (head_dim / (head_dim - 2))
    inv_freq = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim)
    if scaling == "linear":
        return inv_freq / factor, 1.0
    if scaling not in ("by_parts", "yarn"):
        return inv_freq, 1.0

    # Dimensions with over 32 turns in the trained length stay, those with under one are interpolated. Between the
    # two a linear ramp over the dimension index, as in the authors' code (beta_fast 32, beta_slow 1).
    def dimension_of(turns: float) -> float:
        return head_dim * math.log(train_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(dimension_of(32.0)), 0)
    high = min(math.ceil(dimension_of(1.0)), head_dim - 1)
    index = torch.arange(head_dim // 2, dtype=torch.float64, device="cpu")
    ramp = ((index - low) / max(high - low, 1e-3)).clamp(0, 1)
    amplitude = 0.1 * math.log(factor) + 1.0 if scaling == "yarn" else 1.0
    return inv_freq / factor * ramp + inv_freq * (1 - ramp), amplitude


def scaling_factor(scaling: str, factor: float | None, context_length: int, train_length: int) -> float:
    """The s of a scaling for sequences of context_length tokens: >= 1."""
    if scaling == "dynamic":
        factor = factor or 1.0
        return max(1.0, factor * context_length / train_length - (factor - 1))
    return factor or max(1.0, context_length / train_length)


class Rotary(PositionScheme):
    """Rotation of interleaved pairs over the whole head dimension."""

    inv_freq: Tensor

    def __init__(self, config: RotaryConfig, shape: PositionShape) -> None:
        super().__init__(shape)
        require(
            shape.head_dim % 2 == 0,
            f"model_dim / num_heads = {shape.head_dim} with position=rotary. Pairs are rotated: it must be even.",
        )
        factor = scaling_factor(config.scaling, config.factor, shape.context_length, shape.train_length)
        inv_freq, self.amplitude = frequencies(
            config.scaling, shape.head_dim, config.theta, factor, shape.train_length
        )
        self.register_exact("inv_freq", inv_freq)

    def tables(self, positions: Tensor) -> tuple[Tensor, ...]:
        """Cosines and sines, each (T, K/2) float32; the angles are float64, so exact at any length."""
        angles = positions.to(self.inv_freq.dtype)[:, None] * self.inv_freq
        return (angles.cos() * self.amplitude).float(), (angles.sin() * self.amplitude).float()

    def transform_qk(self, q: Tensor, k: Tensor, tables: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        cos, sin = tables
        return rotate_pairs(q, cos, sin), rotate_pairs(k, cos, sin)


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate interleaved pairs (x_2i, x_2i+1): (B, H, T, K), (T, K/2), (T, K/2) -> (B, H, T, K), same dtype.

    The arithmetic is at least float32.
    """
    if x.dtype in (torch.float32, torch.float64) and not torch.compiler.is_compiling():
        # One pass over x, where the real form takes six; compilers fuse the real form and know no complex numbers.
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)
