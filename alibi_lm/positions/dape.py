"""DAPE: a network across heads computes from each score and a bias a number that is added. A reference.

Source: Zheng et al. 2024, "DAPE: Data-Adaptive Positional Encoding for Length Extrapolation", arXiv 2405.14722,
section 3; the authors' code is chuanyang-Zheng/DAPE (commit bde344a).

    z[h, i, j] = q_i . k_j / sqrt(head_dim)
    scores[:, i, j] = z[:, i, j] + b[:, i, j] + f([z[:, i, j], b[:, i, j]])

b is the bias of another scheme (`base`), f a network 2 num_heads -> 32 -> num_heads with a leaky ReLU, the same
for all pairs. Each layer has its own f and b.

This is a reference without a fast path: every pair passes through the network, so fused kernels get a dense mask.

Past the trained length: defined where the base is.
Differs from the paper: nothing; its second version also convolves over keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alibi_lm.positions.alibi import AlibiConfig
from alibi_lm.positions.base import PositionScheme, PositionShape, exact
from alibi_lm.positions.kerple import KerpleLogConfig
from alibi_lm.settings import require_one_of

BASES: dict[str, type] = {"kerple_log": KerpleLogConfig, "alibi": AlibiConfig}
HIDDEN = 32


@dataclass
class DapeConfig:
    """A network on scores and biases (a reference without a fast path)."""

    name: str = "dape"
    base: str = "kerple_log"
    """Scheme of the bias: kerple_log or alibi."""

    def __post_init__(self) -> None:
        require_one_of("position.base", self.base, BASES)

    def build(self, shape: PositionShape) -> Dape:
        return Dape(self, shape)


class Dape(PositionScheme):
    """The network and the bias of one layer."""

    per_layer = True

    def __init__(self, config: DapeConfig, shape: PositionShape) -> None:
        super().__init__(shape)
        self.base: PositionScheme = BASES[config.base]().build(shape)
        heads = shape.num_heads
        self.w1, self.b1 = nn.Parameter(torch.empty(HIDDEN, 2 * heads)), nn.Parameter(torch.empty(HIDDEN))
        self.w2, self.b2 = nn.Parameter(torch.empty(heads, HIDDEN)), nn.Parameter(torch.empty(heads))
        self.initialise()

    def initialise(self) -> None:
        """The base as it initialises itself, the network as torch initialises linear layers."""
        self.base.initialise()
        for weights in ((self.w1, self.b1), (self.w2, self.b2)):
            bound = weights[0].shape[1] ** -0.5
            for parameter in weights:
                nn.init.uniform_(parameter, -bound, bound)

    @exact
    def content_bias(self, q: Tensor, k: Tensor, x: Tensor | None, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        bias = self.base.bias(q_pos, k_pos)
        assert bias is not None
        scores = q @ k.mT * q.shape[-1] ** -0.5
        bias = bias.to(q.dtype).expand_as(scores)
        w1, b1, w2, b2 = (p.to(q.dtype) for p in (self.w1, self.b1, self.w2, self.b2))
        hidden = F.leaky_relu(F.linear(torch.cat([scores, bias], dim=1).movedim(1, -1), w1, b1))
        return bias + F.linear(hidden, w2, b2).movedim(-1, 1)
