"""FIRE: a small network maps each distance, relative to the query's position, to a bias per head.

Source: Li et al. 2024, "Functional Interpolation for Relative Positions Improves Long Context Transformers", arXiv
2310.04418, section 3; code in mcleish7/arithmetic (commit 86022a5) and chuanyang-Zheng/DAPE (commit bde344a).

    scores[h, i, j] = q_i . k_j / sqrt(head_dim) + f(psi(i - j) / (psi(max(i, threshold)) + 1e-6))[h]
    psi(x) = ln(1 + |c x|),  threshold = |multiplier start|,  f: linear 1 -> 32, ReLU, linear 32 -> num_heads

c (from 0.1), the multiplier (from 1) and the weights of f are trained, one set for all layers. i counts from 0,
so the bias depends on absolute positions past the threshold. `reading` names the threshold's initial value, in
which the two implementations differ:

    arithmetic  512 tokens (also DAPE's stand-alone file)
    dape        256 tokens, 512 // 2 (DAPE's training code)

Past the trained length: defined everywhere; distances are relative to the query's position, so the inputs of
f stay between 0 and 1. Differs from the paper: nothing from the two implementations.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alibi_lm.positions.base import PositionScheme, PositionShape, distances, exact
from alibi_lm.settings import require_at_least, require_one_of

THRESHOLDS = {"arithmetic": 512, "dape": 256}
EPSILON = 1e-6


@dataclass
class FireConfig:
    """Functional interpolation of distances."""

    name: str = "fire"
    reading: str = "arithmetic"
    """Initial value of the threshold: arithmetic (512 tokens) or dape (256)."""
    hidden: int = 32
    """Width of the network's hidden layer, >= 1."""

    def __post_init__(self) -> None:
        require_one_of("position.reading", self.reading, THRESHOLDS)
        require_at_least("position.hidden", self.hidden, 1)

    def build(self, shape: PositionShape) -> Fire:
        return Fire(self, shape)


class Fire(PositionScheme):
    """One network for all layers."""

    translation_invariant = False

    def __init__(self, config: FireConfig, shape: PositionShape) -> None:
        super().__init__(shape)
        self.start = THRESHOLDS[config.reading]
        self.c = nn.Parameter(torch.empty(()))
        self.multiplier = nn.Parameter(torch.empty(()))
        self.w1, self.b1 = nn.Parameter(torch.empty(config.hidden, 1)), nn.Parameter(torch.empty(config.hidden))
        self.w2 = nn.Parameter(torch.empty(shape.num_heads, config.hidden))
        self.b2 = nn.Parameter(torch.empty(shape.num_heads))
        self.initialise()

    def initialise(self) -> None:
        """Initialise the network as torch does linear layers; c = 0.1 and multiplier 1."""
        nn.init.constant_(self.c, 0.1)
        nn.init.constant_(self.multiplier, 1.0)
        for weights in ((self.w1, self.b1), (self.w2, self.b2)):
            bound = weights[0].shape[1] ** -0.5
            for parameter in weights:
                nn.init.uniform_(parameter, -bound, bound)

    @exact
    def bias(self, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        c = self.c.float()
        threshold = (self.multiplier.float() * self.start).abs()
        distance = distances(q_pos, k_pos).to(c.dtype)
        horizon = torch.maximum(q_pos.to(c.dtype), threshold)[:, None]
        share = torch.log1p((c * distance).abs()) / (torch.log1p((c * horizon).abs()) + EPSILON)
        hidden = F.relu(F.linear(share[..., None], self.w1.to(c.dtype), self.b1.to(c.dtype)))
        return F.linear(hidden, self.w2.to(c.dtype), self.b2.to(c.dtype)).permute(2, 0, 1)
