"""Rotary position embeddings: queries and keys are rotated by angles proportional to their positions.

Source: Su et al. 2021, arXiv 2104.09864, section 3.4.2; the ALiBi paper used JunnYu/RoFormer_pytorch: all
dimensions of a head, interleaved pairs, in every layer, values not rotated.

    (x_2i, x_2i+1) -> rotation by p * inv_freq_i,    inv_freq_i = theta^(-2i / head_dim)

so that q_i . k_j depends on positions only through i - j.

Two published variants leave a part of each head without positions (training settings, both fractions of 1):
    rotated_share    only the first dimensions are rotated, with the frequencies of a head of that width;
                     GPT-NeoX's `rotary_pct` (Black et al. 2022, arXiv 2204.06745)
    frequency_share  the slowest frequencies are 0, the others those of the whole width; p-RoPE's p (Barbero et al.
                     2024, arXiv 2410.06205, section 6)
GPT-NeoX pairs dimension k with k + width / 2, while pairs here are neighbours: the same up to the order of the
dimensions in a head, which does not matter with trained projections.

Changes of frequency at test time (`scaling`), each from its source, with s = max(1, context / train length), or
the `factor` that is given:
    linear    inv_freq / s                            Chen et al. 2023, arXiv 2306.15595 (position interpolation)
    ntk       theta * s^(head_dim / (head_dim - 2))   bloc97 2023 ("NTK-aware")
    dynamic   ntk with s = factor * context / train length - (factor - 1), past the trained length; factor is 1
              unless given                            emozilla 2023; transformers, `modeling_rope_utils.py`
    by_parts  per frequency inv_freq, inv_freq / s or between the two      Peng et al. 2023, arXiv 2309.00071
    yarn      by_parts, and an amplitude 0.1 ln s + 1 of queries and keys  the same
    part_ntk  as by_parts, with other bounds, and with ntk in the middle   the same authors' earlier code
    llama3    as by_parts, between 1 and 4 turns                           Llama 3.1; transformers
Between their bounds, by_parts, yarn and part_ntk interpolate linearly in the frequency's index, with bounds at
whole indices, as in the authors' code. `ramp=exact` does not round the bounds (transformers' truncate=false).
`ramp=turns` is linear in the number of turns within the trained length, as in the paper and always in llama3.

Past the trained length: defined, at angles never seen in training (or rescaled ones).
Differs from the paper: nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alibi_lm.positions.base import PositionScheme, PositionShape, wave_frequencies
from alibi_lm.settings import require, require_one_of, setting

SCALINGS = ("none", "linear", "ntk", "dynamic", "by_parts", "yarn", "part_ntk", "llama3")
RAMPS = ("index", "exact", "turns")
RAMPED = ("by_parts", "yarn", "part_ntk")


@dataclass
class RotaryConfig:
    """Rotation of queries and keys."""

    name: str = "rotary"
    theta: float = 10000.0
    """Base of the frequencies, > 1."""
    rotated_share: float = setting(1.0, counts="run", later=True)
    """Share of a head's dimensions that are rotated, in (0, 1] (partial rotary)."""
    frequency_share: float = setting(1.0, counts="run", later=True)
    """Share of the frequencies that are kept, fastest first, in (0, 1]; the rest are 0 (p-RoPE)."""
    scaling: str = "none"
    """none, linear, ntk, dynamic, by_parts, yarn, part_ntk or llama3."""
    factor: float | None = None
    """Scaling factor >= 1; null: max(1, context_length / train_length), for dynamic 1."""
    ramp: str = setting("index", counts="run", later=True)
    """How by_parts, yarn and part_ntk interpolate between their bounds: index, exact or turns."""

    def __post_init__(self) -> None:
        require(self.theta > 1, f"position.theta = {self.theta}. Use a number above 1 (10000 in the paper).")
        for name in ("rotated_share", "frequency_share"):
            require(0 < getattr(self, name) <= 1, f"position.{name} = {getattr(self, name)}. Allowed: (0, 1].")
        require_one_of("position.scaling", self.scaling, SCALINGS)
        require_one_of("position.ramp", self.ramp, RAMPS)
        require(
            self.factor is None or self.factor >= 1,
            f"position.factor = {self.factor}. Use a number >= 1, or null for context / train length.",
        )
        require(
            self.factor is None or self.scaling != "none",
            f"position.factor = {self.factor} with position.scaling = none, which has no factor. Leave it out, or "
            f"choose a scaling: {', '.join(SCALINGS[1:])}.",
        )
        require(
            self.ramp == "index" or self.scaling in RAMPED,
            f"position.ramp = {self.ramp} with position.scaling = {self.scaling}, which has no ramp to choose. "
            f"Leave it out, or use a scaling that has: {', '.join(RAMPED)}.",
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
    scaling: str, head_dim: int, theta: float, factor: float, train_length: int, ramp: str = "index"
) -> tuple[Tensor, float]:
    """Frequencies after a scaling: inv_freq (K/2,) float64, and the amplitude of queries and of keys."""
    index = torch.arange(head_dim / 2, dtype=torch.float64, device="cpu")
    stretched = theta * factor ** (head_dim / (head_dim - 2)) if head_dim > 2 else theta
    plain, ntk = (wave_frequencies(head_dim, base) for base in (theta, stretched))
    if scaling in ("ntk", "dynamic"):
        return ntk, 1.0
    if scaling in ("none", "linear"):
        return plain / factor if scaling == "linear" else plain, 1.0

    def blend(slow: Tensor, fast: Tensor, turns: tuple[float, float], ramp: str = ramp) -> Tensor:
        """`slow` up to turns[0] turns in the trained length, `fast` from turns[1] on, linear in between."""
        if ramp == "turns":
            share = 1 - (train_length * plain / (2 * math.pi) - turns[0]) / (turns[1] - turns[0])
        else:
            high, low = (
                head_dim * math.log(train_length / (n * 2 * math.pi)) / (2 * math.log(theta)) for n in turns
            )
            if ramp == "index":
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, head_dim - 1)
            share = (index - low) / max(high - low, 1e-3)
        share = share.clamp(0, 1)
        return slow * share + fast * (1 - share)

    if scaling == "llama3":
        return blend(plain / factor, plain, (1.0, 4.0), "turns"), 1.0
    if scaling == "part_ntk":
        return blend(blend(plain / factor, ntk, (0.75, 1.25)), plain, (2.0, 16.0)), 1.0
    # 1 and 32: the authors' beta_slow and beta_fast.
    amplitude = 0.1 * math.log(factor) + 1.0 if scaling == "yarn" else 1.0
    return blend(plain / factor, plain, (1.0, 32.0)), amplitude


def scaling_factor(scaling: str, factor: float | None, context_length: int, train_length: int) -> float:
    """The s of a scaling for sequences of context_length tokens: >= 1."""
    if scaling == "dynamic":
        factor = factor or 1.0
        return max(1.0, factor * context_length / train_length - (factor - 1))
    return factor or max(1.0, context_length / train_length)


class Rotary(PositionScheme):
    """Rotation of interleaved pairs over the first dimensions of a head, by default all of them."""

    inv_freq: Tensor

    def __init__(self, config: RotaryConfig, shape: PositionShape) -> None:
        super().__init__(shape)
        require(
            shape.head_dim % 2 == 0,
            f"model_dim / num_heads = {shape.head_dim} with position=rotary. Pairs are rotated: it must be even.",
        )
        self.width = int(shape.head_dim * config.rotated_share)
        require(
            self.width >= 2 and self.width % 2 == 0,
            f"position.rotated_share = {config.rotated_share} rotates {self.width} of {shape.head_dim} "
            "dimensions. Pairs are rotated: choose a share that gives an even number >= 2.",
        )
        factor = scaling_factor(config.scaling, config.factor, shape.context_length, shape.train_length)
        inv_freq, self.amplitude = frequencies(
            config.scaling, self.width, config.theta, factor, shape.train_length, config.ramp
        )
        kept = int(config.frequency_share * self.width // 2)
        require(
            kept > 0,
            f"position.frequency_share = {config.frequency_share} keeps none of {self.width // 2} frequencies. "
            "Use a larger share, or position=none.",
        )
        inv_freq[kept:] = 0
        self.register_exact("inv_freq", inv_freq)

    def tables(self, positions: Tensor) -> tuple[Tensor, ...]:
        """Cosines and sines, each (T, width / 2) float32; the angles are float64, so exact at any length."""
        angles = positions.to(self.inv_freq.dtype)[:, None] * self.inv_freq
        return (angles.cos() * self.amplitude).float(), (angles.sin() * self.amplitude).float()

    def transform_qk(self, q: Tensor, k: Tensor, tables: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        if self.width == q.shape[-1]:
            return rotate_pairs(q, *tables), rotate_pairs(k, *tables)
        q, k = (
            torch.cat([rotate_pairs(x[..., : self.width], *tables), x[..., self.width :]], dim=-1) for x in (q, k)
        )
        return q, k


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate interleaved pairs (x_2i, x_2i+1): (B, H, T, K), (T, K/2), (T, K/2) -> (B, H, T, K), same dtype.

    The arithmetic is at least float32.
    """
    if x.dtype in (torch.float32, torch.float64) and not torch.compiler.is_compiling():
        # One pass over x; the real form takes six. Compilers fuse the real form but cannot handle complex numbers.
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)
