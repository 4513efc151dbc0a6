"""KERPLE: each head lowers a score by a trained logarithm, or power, of the distance.

Source: Chi, Fan, Ramadge & Rudnicky 2022, "KERPLE: Kernelized Relative Positional Embedding for Length
Extrapolation", arXiv 2205.09921, section 4; the authors' code is chijames/KERPLE (commit 25be3d7),
megatron/mpu/layers.py, `ParallelKerpleLog` and `ParallelKerplePower`.

    kerple_log    scores[h, i, j] = q_i . k_j / sqrt(head_dim) - r1[h] ln(1 + r2[h] (i - j))
    kerple_power  scores[h, i, j] = q_i . k_j / sqrt(head_dim) - a[h] (i - j)^p[h]

r1, r2, a and p are trained, two numbers per head, the same in every layer. They start at random: r1, p uniform in
(0, 2), r2, a uniform in (0, 1). Before use r1, r2 and a are clamped to at least 0.01, and p to [0.01, 2]; a number
outside still receives its full gradient, as in the authors' code, which overwrites it. p = 1 is ALiBi with
trained slopes. The sum over all distances of exp(bias) converges for `kerple_power`, for `kerple_log` if r1 > 1.

With `weighted`, kerple_power also multiplies q_i . k_j / sqrt(head_dim) by exp(-wei_a[h] (i - j)^wei_p[h]); these
numbers are initialised and clamped like a and p (the code's `kerple_power_ap_ap`).

Past the trained length: defined everywhere; the bias keeps falling along its curve.
Differs from the paper: nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from alibi_lm.positions.base import PositionScheme, PositionShape, distances, exact, per_head
from alibi_lm.settings import setting

LEAST = 0.01
"""Parameters are clamped to at least this value."""


@dataclass
class KerpleLogConfig:
    """Trained logarithmic biases."""

    name: str = "kerple_log"

    def build(self, shape: PositionShape) -> KerpleLog:
        return KerpleLog(shape)


@dataclass
class KerplePowerConfig:
    """Trained biases that are powers of the distance."""

    name: str = "kerple_power"
    weighted: bool = setting(False, counts="run", later=True)
    """Also multiply scores by a weight that falls with distance; this form has no fast path."""

    def build(self, shape: PositionShape) -> KerplePower:
        return (WeightedKerplePower if self.weighted else KerplePower)(shape)


def held(parameter: Tensor, most: float | None = None) -> Tensor:
    """The parameter clamped to [LEAST, most], with the gradient of the unclamped one: (H,) -> (H,) float32."""
    value = parameter.float()
    return value.detach().clamp(LEAST, most) + (value - value.detach())


def power(a: Tensor, p: Tensor, distance: Tensor) -> Tensor:
    """-a distance^p for each head: (H,), (H,), (...) -> (H, ...) float32."""
    a, p = per_head(held(a), distance), per_head(held(p, most=2.0), distance)
    return -a * distance.to(p.dtype) ** p


class KerpleLog(PositionScheme):
    """Logarithmic biases with two trained numbers per head."""

    def __init__(self, shape: PositionShape) -> None:
        super().__init__(shape)
        self.r1 = nn.Parameter(torch.empty(shape.num_heads))
        self.r2 = nn.Parameter(torch.empty(shape.num_heads))
        self.initialise()

    def initialise(self) -> None:
        """Uniform, as the authors start."""
        nn.init.uniform_(self.r1, 0, 2)
        nn.init.uniform_(self.r2, 0, 1)

    def distance_bias(self, distance: Tensor) -> Tensor:
        r1, r2 = per_head(held(self.r1), distance), per_head(held(self.r2), distance)
        return -r1 * torch.log1p(r2 * distance)


class KerplePower(PositionScheme):
    """Biases that are powers of the distance, with two trained numbers per head."""

    def __init__(self, shape: PositionShape) -> None:
        super().__init__(shape)
        self.a = nn.Parameter(torch.empty(shape.num_heads))
        self.p = nn.Parameter(torch.empty(shape.num_heads))
        self.initialise()

    def initialise(self) -> None:
        """Uniform, as the authors start."""
        for name, parameter in self.named_parameters():
            nn.init.uniform_(parameter, 0, 2 if name.endswith("p") else 1)

    def distance_bias(self, distance: Tensor) -> Tensor:
        return power(self.a, self.p, distance)


class WeightedKerplePower(KerplePower):
    """The same, and a weight between 0 and 1 that multiplies each score."""

    def __init__(self, shape: PositionShape) -> None:
        super().__init__(shape)
        self.wei_a = nn.Parameter(torch.empty(shape.num_heads))
        self.wei_p = nn.Parameter(torch.empty(shape.num_heads))
        self.initialise()

    @exact
    def content_bias(self, q: Tensor, k: Tensor, x: Tensor | None, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        """The change of each score by the weight."""
        scores = q @ k.mT * q.shape[-1] ** -0.5
        return scores * power(self.wei_a, self.wei_p, distances(q_pos, k_pos)).expm1().to(q.dtype)
