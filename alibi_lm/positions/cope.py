"""CoPE: positions are counted by content. A gate at each key says how much it counts.

Source: Golovneva, Wang, Weston & Sukhbaatar 2024, "Contextual Position Encoding", arXiv 2405.18719, section 3; the
authors' code is facebookresearch/RAM, projects/cope/src/cope/context_position.py.

    gates[i, j] = sigmoid(q_i . k_j / sqrt(head_dim)),    j <= i
    p[i, j] = min(gates[i, j] + ... + gates[i, i], num_positions - 1)
    scores[i, j] = (q_i . k_j + term[i, j]) / sqrt(head_dim)
    term[i, j] = q_i . table[p[i, j]], linear between the two whole positions around p[i, j]

A query's own token is counted, so p[i, i] lies between 0 and 1. `table` is the paper's e. Each layer has one, for
all its heads; it starts at 0. Absolute positions are used for the causal order only.

With `gate_keys`, gates have separate keys, a projection of the layer's input (`cope-sep-key` in the authors'
code). The authors' gates from values (`cope-val-gates`) are left out: a scheme here does not see values.

Past the trained length: defined everywhere; counts stop at num_positions - 1.
Differs from the paper: nothing from the authors' code. Its listing adds the term after the division by
sqrt(head_dim): `scaled_term=false`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alibi_lm.positions.base import PositionScheme, PositionShape, exact
from alibi_lm.settings import require_at_least, setting


@dataclass
class CopeConfig:
    """Positions counted by gates on the keys."""

    name: str = "cope"
    num_positions: int = 64
    """Positions that have a vector, >= 2; larger counts share the last one."""
    scaled_term: bool = True
    """Divide the position term by sqrt(head_dim), as the authors' code does; false: as in the paper's listing."""
    gate_keys: bool = setting(False, counts="run", later=True)
    """Give the gates separate keys, projected from the layer's input."""

    def __post_init__(self) -> None:
        require_at_least("position.num_positions", self.num_positions, 2)

    def build(self, shape: PositionShape) -> Cope:
        return Cope(self, shape)


class Cope(PositionScheme):
    """One table of position vectors for a layer."""

    per_layer = True

    def __init__(self, config: CopeConfig, shape: PositionShape) -> None:
        super().__init__(shape)
        self.scale = shape.head_dim**-0.5 if config.scaled_term else 1.0
        self.table = nn.Parameter(torch.empty(config.num_positions, shape.head_dim))
        self.cache_inputs = config.gate_keys
        if config.gate_keys:
            self.weight = nn.Parameter(torch.empty(shape.num_heads * shape.head_dim, shape.model_dim))
        self.initialise()

    def initialise(self) -> None:
        """Table 0, as in the authors' code; gate keys like the model's own projections."""
        nn.init.zeros_(self.table)
        if self.cache_inputs:
            nn.init.normal_(self.weight, std=self.shape.model_dim**-0.5)

    @exact
    def features(self, x: Tensor) -> Tensor:
        """Keys of the gates, with `gate_keys`: (B, T, D) -> (B, T, H K) float32 or better."""
        return F.linear(x, self.weight.to(x.dtype))

    @exact
    def content_bias(self, q: Tensor, k: Tensor, x: Tensor | None, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        if x is not None:
            k = x.unflatten(-1, (q.shape[1], -1)).transpose(1, 2)
        counts = self.counts(q, k, q_pos, k_pos)
        low = counts.floor().long()
        high = counts.ceil().long()
        terms = q @ self.table.to(q.dtype).T * self.scale
        at_low, at_high = terms.gather(-1, low), terms.gather(-1, high)
        return torch.lerp(at_low, at_high, counts - low)

    def counts(self, q: Tensor, k: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        """The position of each key as the query counts it, the paper's p; `k` are the keys of the gates."""
        gates = (q @ k.mT * q.shape[-1] ** -0.5).sigmoid().masked_fill(k_pos > q_pos[:, None], 0.0)
        return gates.flip(-1).cumsum(-1).flip(-1).clamp_max(len(self.table) - 1)
