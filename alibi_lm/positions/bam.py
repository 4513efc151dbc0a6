"""BAM: the bias is the logarithm of a generalised Gaussian over positions; each head trains its own.

Source: Bianchessi et al. 2025, "Bayesian Attention Mechanism", arXiv 2505.22842 (ICLR 2026); the authors' code is
ArthurSBianchessi/BAM (commit 5a6579d), models/bam.py, `AttentionPrior`.

    scores[h, i, j] = q_i . k_j / sqrt(head_dim) - exp(alpha[h]) (|i - j + 2 sinh(mu[h])| + 1e-5)^beta[h]

alpha, beta and, if `trained_centre`, mu are trained, the same in every layer; without mu the centre is the query's
own position. beta is not bounded: below 0 the bias rises with the distance. beta starts at 1, mu at 0.
The authors' work has two initial values of alpha (`start`):

    code    the logarithm of ALiBi's slopes, so that the scheme starts as ALiBi (the repository's models)
    readme  the slopes themselves (the class printed in its README of 2026): scales start at 1.0 to 1.6

The sum over all distances of exp(bias) converges where beta > 0.

Past the trained length: defined everywhere; the bias continues along its curve.
Differs from the paper: the paper's models also multiply scores and bias by s ln(n) (scalable softmax), which is a
separate setting here (`query_scale`).

Their training code until May 2025, and to date their evaluation of models without that factor
(inference_models/bam.py), have the scale inside the power, -(|i - j + 2 sinh(mu)| exp(alpha) + 1e-5)^beta,
which is another function unless beta = 1: `scale_inside`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from alibi_lm.positions.alibi import alibi_slopes
from alibi_lm.positions.base import PositionScheme, PositionShape, per_head
from alibi_lm.settings import require_one_of, setting

STARTS = ("code", "readme")


@dataclass
class BamConfig:
    """A generalised Gaussian prior over positions."""

    name: str = "bam"
    start: str = "code"
    """Initial value of alpha: code (as ALiBi) or readme."""
    trained_centre: bool = False
    """Train mu, the position of the centre."""
    scale_inside: bool = setting(False, counts="run", later=True)
    """The older form of the authors' code: the scale is raised to the power too."""

    starts: ClassVar[tuple[str, ...]] = ("start",)
    """Settings that a trained run no longer depends on."""

    def __post_init__(self) -> None:
        require_one_of("position.start", self.start, STARTS)

    def build(self, shape: PositionShape) -> Bam:
        return Bam(self, shape)


class Bam(PositionScheme):
    """Biases with a trained scale, exponent and, optionally, centre per head."""

    def __init__(self, config: BamConfig, shape: PositionShape) -> None:
        super().__init__(shape)
        self.from_logarithm, self.scale_inside = config.start == "code", config.scale_inside
        self.alpha = nn.Parameter(torch.empty(shape.num_heads))
        self.beta = nn.Parameter(torch.empty(shape.num_heads))
        self.mu = nn.Parameter(torch.empty(shape.num_heads)) if config.trained_centre else None
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Exponent 1, centre 0, and scales as `start` says."""
        slopes = torch.tensor(alibi_slopes(self.shape.num_heads))
        self.alpha.copy_(slopes.log() if self.from_logarithm else slopes)
        nn.init.ones_(self.beta)
        if self.mu is not None:
            nn.init.zeros_(self.mu)

    def distance_bias(self, distance: Tensor) -> Tensor:
        far = distance.float()
        if self.mu is not None:
            far = (far + 2 * per_head(self.mu.float().sinh(), distance)).abs()
        scale, beta = (per_head(x, distance) for x in (self.alpha.float().exp(), self.beta.float()))
        return -((far * scale + 1e-5) ** beta) if self.scale_inside else -scale * (far + 1e-5) ** beta
