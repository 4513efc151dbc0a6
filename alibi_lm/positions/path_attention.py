"""PaTH: each token reflects the keys before it, so that scores depend on all tokens between. A reference.

Source: Yang et al. 2025, "PaTH Attention: Position Encoding via Accumulating Householder Transformations", arXiv
2505.16381, section 2; checked against fla-org/flash-linear-attention (commit bc3b101), fla/ops/path_attn/naive.py.

    scores[h, i, j] = q_i . H_i H_{i-1} ... H_{j+1} k_j / sqrt(head_dim),  H_t = I - beta_t w_t w_t^T
    w_t = silu(convolution of up down x over 3 tokens), at length 1,  beta_t = 2 sigmoid(weight . x_t + start)

x_t is the layer's input; `down` projects to 32 dimensions. Each layer has its own weights. `forget_gate` adds
FoX's sum of logarithms of gates, here divided by sqrt(head_dim) too, as the code does. The matrix products are
never formed: with L the part below the diagonal, the scores are those of plain attention minus tril(Q W^T)
(I + diag(beta) L(W W^T))^-1 diag(beta) L(W K^T), by the paper's section 3.

This is a reference without a fast path: only `eager` serves it, and decoding a token costs as much as a pass over
all keys. The authors' kernels are in the library named above.

Past the trained length: defined everywhere.
Differs from the paper: only in its kernels, not in what is computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alibi_lm.positions.base import PositionScheme, PositionShape, exact

RANK, TAPS = 32, 3


@dataclass
class PathConfig:
    """Products of reflections (a reference without a fast path)."""

    name: str = "path"
    forget_gate: bool = False
    """Add the logarithms of FoX's gates."""

    def build(self, shape: PositionShape) -> Path:
        return Path(self, shape)


class Path(PositionScheme):
    """Reflections of one layer."""

    per_layer = True
    cache_inputs = True

    def __init__(self, config: PathConfig, shape: PositionShape) -> None:
        super().__init__(shape)
        heads, width = shape.num_heads, shape.num_heads * shape.head_dim
        self.numbers = (2 if config.forget_gate else 1) * heads
        self.down = nn.Parameter(torch.empty(RANK, shape.model_dim))
        self.up = nn.Parameter(torch.empty(width, RANK))
        self.taps = nn.Parameter(torch.empty(width, 1, TAPS))
        self.weight = nn.Parameter(torch.empty(self.numbers, shape.model_dim))
        self.start = nn.Parameter(torch.empty(self.numbers))
        self.initialise()

    def initialise(self) -> None:
        """Normal projections, standard deviation inputs^-0.5; the convolution as in torch; biases 0."""
        for weight in (self.down, self.up, self.weight):
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        nn.init.uniform_(self.taps, -(TAPS**-0.5), TAPS**-0.5)
        nn.init.zeros_(self.start)

    @exact
    def features(self, x: Tensor) -> Tensor:
        """Directions before the convolution, and logits of beta and of gates: (B, T, H K + H or 2 H)."""
        directions = F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))
        return torch.cat([directions, F.linear(x, self.weight.to(x.dtype), self.start.to(x.dtype))], dim=-1)

    def reflections(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Features of the keys -> w (B, H, S, K), beta (B, H, S), logarithms of gates (B, H, S) or None."""
        directions, numbers = x.split([self.up.shape[0], self.numbers], dim=-1)
        kernel = self.taps.to(x.dtype)
        w = F.silu(F.conv1d(F.pad(directions.mT, (TAPS - 1, 0)), kernel, groups=len(kernel)))
        w = F.normalize(w.unflatten(1, (self.shape.num_heads, -1)).mT, dim=-1)
        beta, *gate = numbers.mT.split(self.shape.num_heads, dim=1)
        return w, 2 * beta.sigmoid(), F.logsigmoid(gate[0]) if gate else None

    @exact
    def scores(self, q: Tensor, k: Tensor, x: Tensor | None, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        assert x is not None
        w, beta, gate = self.reflections(x)
        own = torch.searchsorted(k_pos, q_pos)
        each = torch.arange(len(k_pos), device=q.device)
        triangle = beta[..., None] * (w @ w.mT).tril(-1) + torch.eye(len(k_pos), dtype=q.dtype, device=q.device)
        seen = (q @ w.mT).masked_fill(each > own[:, None], 0.0)
        passed = torch.linalg.solve_triangular(triangle, seen, upper=False, left=False, unitriangular=True)
        scores = q @ k.mT - (passed * beta[..., None, :]) @ (w @ k.mT).tril(-1)
        if gate is not None:
            total = gate.double().cumsum(-1)
            scores = scores + (total[..., own, None] - total[..., None, :]).to(q.dtype)
        return scores * q.shape[-1] ** -0.5
