"""Transformer-XL: each score has two terms for the distance, one that depends on the query and one that does not.

Source: Dai et al. 2019, "Transformer-XL", arXiv 1901.02860, section 3.3; the authors' code is
kimiyoung/transformer-xl (commit 44781ed), pytorch/mem_transformer.py, `RelPartialLearnableMultiHeadAttn`.

    scores[h, i, j] = ((q_i + u_h) . k_j + (q_i + v_h) . (W_R R[i - j])_h) / sqrt(head_dim)
    R[d] = [sin(d w_0), sin(d w_1), ..., cos(d w_0), cos(d w_1), ...],  w_c = 10000^(-2c / model_dim)

W_R (model_dim x model_dim), u and v (head_dim for each head) are trained, separately in each layer. They start at
random: W_R like the model's projections, u and v with standard deviation 0.02.

Past the trained length: defined, with waves never seen in training; with `clamp_distance` all larger distances
count as that one, as in the authors' evaluation. Differs from the paper: its recurrence, in which cached states of
the previous segment serve as keys, is not part of the position scheme and is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from alibi_lm.positions.base import PositionScheme, PositionShape, distances, exact, wave_frequencies
from alibi_lm.settings import require


@dataclass
class TransformerXLConfig:
    """Relative sinusoids in the scores."""

    name: str = "transformer_xl"
    clamp_distance: int | None = None
    """Larger distances count as this one; null: no limit."""

    def __post_init__(self) -> None:
        require(
            self.clamp_distance is None or self.clamp_distance >= 1,
            f"position.clamp_distance = {self.clamp_distance}. Use a whole number >= 1, or null.",
        )

    def build(self, shape: PositionShape) -> TransformerXL:
        return TransformerXL(self, shape)


class TransformerXL(PositionScheme):
    """Projected sinusoids, and two vectors per head, for one layer."""

    per_layer = True
    frequencies: Tensor

    def __init__(self, config: TransformerXLConfig, shape: PositionShape) -> None:
        super().__init__(shape)
        width, heads, dim = shape.model_dim, shape.num_heads, shape.head_dim
        require(
            width % 2 == 0,
            f"model.model_dim = {width} with position=transformer_xl. Waves come in pairs: use an even number.",
        )
        self.clamp_distance = config.clamp_distance
        self.register_exact("frequencies", wave_frequencies(width))
        self.w_r = nn.Parameter(torch.empty(heads * dim, width))
        self.u, self.v = nn.Parameter(torch.empty(heads, dim)), nn.Parameter(torch.empty(heads, dim))
        self.initialise()

    def initialise(self) -> None:
        """Normal: standard deviation model_dim^-0.5 for W_R, 0.02 for u and v."""
        nn.init.normal_(self.w_r, std=self.shape.model_dim**-0.5)
        for vectors in (self.u, self.v):
            nn.init.normal_(vectors, std=0.02)

    @exact
    def content_bias(self, q: Tensor, k: Tensor, x: Tensor | None, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        u, v = (t.to(q.dtype)[:, None] for t in (self.u, self.v))
        distance = distances(q_pos, k_pos).clamp(0, self.clamp_distance)
        # Each distance is projected once, then picked for the pairs that have it.
        angles = torch.arange(int(distance.max()) + 1, device=q.device)[:, None] * self.frequencies
        waves = torch.cat([angles.sin(), angles.cos()], dim=1).to(q.dtype)
        projected = (waves @ self.w_r.to(q.dtype).T).unflatten(1, u.shape[::2]).permute(1, 2, 0)
        of_distance = ((q + v) @ projected).gather(-1, distance.expand(*q.shape[:2], -1, -1))
        return (of_distance + u @ k.mT) * q.shape[-1] ** -0.5
