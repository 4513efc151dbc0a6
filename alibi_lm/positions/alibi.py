"""ALiBi: attention with linear biases. Each head lowers a score in proportion to the distance of its key.

Source: Press, Smith & Lewis 2022, "Train Short, Test Long", arXiv 2108.12409, section 3; slopes as in the
authors' code (ofirpress/attention_with_linear_biases, fairseq/models/transformer.py, `get_slopes`).

    scores[h, i, j] = q_i . k_j / sqrt(head_dim) - slopes[h] * (i - j),    j <= i

`slopes` is the paper's m: positive, fixed, the same in every layer. The bias is not scaled by sqrt(head_dim)
(footnote 10) and nothing is added to embeddings or values.

Past the trained length: defined everywhere; the bias keeps growing linearly.
Differs from the paper: nothing. `learned_slopes=true` trains the slopes (kept positive), which the paper
tried and found to extrapolate badly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from alibi_lm.positions.base import PositionScheme, PositionShape
from alibi_lm.settings import require


@dataclass
class AlibiConfig:
    """Attention with linear biases."""

    name: str = "alibi"
    learned_slopes: bool = False
    """Train one slope per head, starting from the fixed ones."""
    last_exponent: float = 8.0
    """The slopes of n heads are 2^(-last_exponent h / n): the paper's 8 ends at 2^-8. Fewer let a cache of bounded
    loss keep fewer keys."""

    def __post_init__(self) -> None:
        require(
            0 < self.last_exponent <= 24,
            f"position.last_exponent = {self.last_exponent}. Use a number above 0, up to 24; the paper's is 8.",
        )

    def build(self, shape: PositionShape) -> Alibi:
        return Alibi(self, shape)


def alibi_slopes(num_heads: int, last_exponent: float = 8.0) -> list[float]:
    """Slopes of the heads, in head order, by the authors' rule.

    A power of two n gives 2^(-8h/n), h = 1..n. Otherwise the slopes of the largest power of two c below n are
    followed by every other slope of 2c heads (those that lie between), n - c of them; not sorted.

    Args:
        num_heads: >= 1.
        last_exponent: what takes the place of the paper's 8.

    Returns:
        `num_heads` floats in (0, 1).
    """
    if num_heads < 1:
        raise ValueError(f"num_heads = {num_heads}. ALiBi needs at least one head.")
    closest = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-last_exponent * h / closest) for h in range(1, closest + 1)]
    between = [2.0 ** (-last_exponent * h / (2 * closest)) for h in range(1, 2 * closest + 1, 2)]
    return slopes + between[: num_heads - closest]


class Alibi(PositionScheme):
    """Linear biases with one slope per head."""

    slopes: Tensor

    def __init__(self, config: AlibiConfig, shape: PositionShape) -> None:
        super().__init__(shape)
        self.fixed = alibi_slopes(shape.num_heads, config.last_exponent)
        fixed = torch.tensor(self.fixed, dtype=torch.float32, device="cpu")
        self.learned = config.learned_slopes
        if self.learned:
            # The logarithm keeps a trained slope positive.
            self.log_slopes = nn.Parameter(torch.empty(shape.num_heads))
            self.initialise()
        else:
            self.register_exact("slopes", fixed)

    def initialise(self) -> None:
        """Start learned slopes at the fixed ones."""
        if self.learned and not self.log_slopes.is_meta:
            with torch.no_grad():
                self.log_slopes.copy_(torch.tensor(self.fixed).log())

    def slopes_per_head(self) -> Tensor:
        """The slopes, (H,) float32."""
        return self.log_slopes.float().exp() if self.learned else self.slopes

    def distance_bias(self, distance: Tensor) -> Tensor:
        """Exact for slopes that are powers of two and distances below 2^24."""
        slopes = self.slopes_per_head()
        return -slopes.view(-1, *[1] * distance.dim()) * distance.float()

    def score_mod(self, q_pos: Tensor, k_pos: Tensor, span: int) -> Callable[..., Tensor]:
        """Computed from the positions, so that no table is read."""
        slopes = self.slopes_per_head()
        return lambda score, b, h, q, k: score - slopes[h] * (q_pos[q] - k_pos[k])

    def key_bias(self, k_pos: Tensor) -> Tensor:
        """-m (i - j) = m (j - c) + m (c - i), and the last term belongs to the query.

        c is the middle position, which keeps the values, and the rounding of the scores they are added to,
        smallest.
        """
        return self.slopes_per_head()[:, None] * (k_pos - k_pos[len(k_pos) // 2]).float()
