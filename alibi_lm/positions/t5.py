"""T5 bias: each head adds a trained scalar per bucket of distances to its scores.

Source: Raffel et al. 2020, arXiv 1910.10683, section 2.1; buckets as in Hugging Face's T5 with
`bidirectional=False`, which the ALiBi paper used (footnote 7).

    scores[h, i, j] = q_i . k_j / sqrt(head_dim) + table[bucket(i - j), h]

The first half of the buckets holds one distance each; the rest grow logarithmically up to `max_distance`,
beyond which all distances share the last bucket. One table serves all layers.

Past the trained length: defined; every distance of max_distance or more shares the last bucket.
Differs from the source: queries are scaled by 1/sqrt(head_dim), as in the models compared with it. A table
whose max_distance lies past the trained length would have buckets that training never sees, so by default
max_distance is T5's 128 or half the training length, whichever is smaller.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from alibi_lm.positions.base import PositionScheme, PositionShape
from alibi_lm.settings import require


@dataclass
class T5Config:
    """A trained scalar per head and bucket of distances."""

    name: str = "t5"
    num_buckets: int = 32
    """Number of buckets; even, >= 2."""
    max_distance: int | None = None
    """All distances from this one on share the last bucket; null: min(128, train_length / 2)."""

    def __post_init__(self) -> None:
        require(
            self.num_buckets >= 2 and self.num_buckets % 2 == 0,
            f"position.num_buckets = {self.num_buckets}. Use an even number >= 2.",
        )
        require(
            self.max_distance is None or self.max_distance > self.num_buckets // 2,
            f"position.max_distance = {self.max_distance}. It must exceed num_buckets / 2 = "
            f"{self.num_buckets // 2}, the number of distances that have their own bucket.",
        )

    def build(self, shape: PositionShape) -> T5Bias:
        return T5Bias(self, shape)


def t5_bucket(distance: Tensor, num_buckets: int, max_distance: int) -> Tensor:
    """Bucket of each distance: int64 >= 0 of any shape -> int64 in [0, num_buckets), same shape."""
    exact = num_buckets // 2
    # float32, as in the reference: the borders of the logarithmic buckets depend on its rounding.
    ratio = torch.log(distance.clamp_min(1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (ratio * (num_buckets - exact)).long()).clamp_max(num_buckets - 1)
    return torch.where(distance < exact, distance, far)


class T5Bias(PositionScheme):
    """Bucketed relative biases, one table for all layers."""

    def __init__(self, config: T5Config, shape: PositionShape) -> None:
        super().__init__(shape)
        self.num_buckets = config.num_buckets
        automatic = max(config.num_buckets // 2 + 1, min(128, shape.train_length // 2))
        self.max_distance = config.max_distance or automatic
        self.table = nn.Parameter(torch.empty(config.num_buckets, shape.num_heads))
        self.initialise()

    def initialise(self) -> None:
        """Normal, standard deviation model_dim^-0.5, like the table in Hugging Face's T5."""
        nn.init.normal_(self.table, std=self.shape.model_dim**-0.5)

    def distance_bias(self, distance: Tensor) -> Tensor:
        bucket = t5_bucket(distance, self.num_buckets, self.max_distance)
        return self.table.float().t()[:, bucket]
