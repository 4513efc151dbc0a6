"""ALiBi: attention with linear biases. Each head lowers a score in proportion to the distance of its key.

Source: Press, Smith & Lewis 2022, "Train Short, Test Long", arXiv 2108.12409, section 3; slopes as in the
authors' code (ofirpress/attention_with_linear_biases, fairseq/models/transformer.py, `get_slopes`).

    scores[h, i, j] = q_i . k_j / sqrt(head_dim) - slopes[h] * (i - j),    j <= i

`slopes` is the paper's m: positive, fixed, the same in every layer. The bias is not scaled by sqrt(head_dim)
(footnote 10) and nothing is added to embeddings or values.

Change at test time: `scaling=linear` divides the slopes by s = max(1, context / train length), or by `factor`
(position interpolation; Al-Khateeb et al. 2023, arXiv 2310.13017, in BTLM-3B).

Past the trained length: defined everywhere; the penalty keeps growing linearly.
Differs from the paper: nothing. `learned_slopes=true` trains the slopes (kept positive), which the paper
tried and found to extrapolate badly. `half_precision=true` rounds as the authors' code does in float16 training.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alibi_lm.positions.base import PositionScheme, PositionShape, exact, per_head
from alibi_lm.settings import require, setting


@dataclass
class AlibiConfig:
    """Attention with linear biases."""

    name: str = "alibi"
    learned_slopes: bool = False
    """Train one slope per head, starting from the fixed ones."""
    half_precision: bool = setting(False, counts="run", later=True)
    """Round scores and bias as the authors' code does in float16 training; slow, to measure what that changes."""
    scaling: str = setting("none", counts="run", later=True)
    """none, or linear: slopes are divided by the factor."""
    factor: float | None = setting(None, counts="run", later=True)
    """Factor of the scaling, > 0; null: max(1, context_length / train_length)."""
    last_exponent: float = setting(8.0, counts="run", later=True)
    """The slopes of n heads are 2^(-last_exponent h / n); the paper's 8 ends at 2^-8. With a smaller number a
    cache of bounded loss keeps fewer keys."""

    def __post_init__(self) -> None:
        require(
            not self.half_precision
            or (not self.learned_slopes and self.scaling == "none" and self.last_exponent == 8),
            "position.half_precision = true is the authors' own form: leave learned_slopes, scaling and "
            "last_exponent out.",
        )
        require(
            0 < self.last_exponent <= 24,
            f"position.last_exponent = {self.last_exponent}. Use a number above 0, up to 24; the paper's is 8.",
        )
        allowed = self.scaling in ("none", "linear")
        require(allowed, f"position.scaling = {self.scaling!r} with position=alibi. Allowed: none, linear.")
        require(
            self.factor is None or self.factor > 0,
            f"position.factor = {self.factor}. Use a number above 0, or null for context / train length.",
        )
        require(
            self.factor is None or self.scaling != "none",
            f"position.factor = {self.factor} with position.scaling = none, which has no factor. Leave it out, or "
            "use position.scaling=linear.",
        )

    def build(self, shape: PositionShape) -> PositionScheme:
        return HalfPrecisionAlibi(shape) if self.half_precision else Alibi(self, shape)

    def test_changes(self, stretch: float) -> dict[str, list[dict[str, Any]]]:
        """Changes to try at `stretch` times the training length, by name: settings, with several factors each."""
        factors = [stretch**power for power in (0.125, 0.25, 0.5, 1.0)]
        return {"ALiBi interpolation": [{"scaling": "linear", "factor": factor} for factor in factors]}


def alibi_slopes(num_heads: int, last_exponent: float = 8.0) -> list[float]:
    """Slopes of the heads, in head order, by the authors' rule.

    A power of two n gives 2^(-8h/n), h = 1..n. Otherwise the slopes of the largest power of two c below n are
    followed by every other slope of 2c heads (those that lie between), n - c of them; not sorted.

    Args:
        num_heads: >= 1.
        last_exponent: the number that replaces the paper's 8.

    Returns:
        `num_heads` floats in (0, 1).
    """
    if num_heads < 1:
        raise ValueError(f"num_heads = {num_heads}. ALiBi needs at least one head.")
    closest = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-last_exponent * h / closest) for h in range(1, closest + 1)]
    between = [2.0 ** (-last_exponent * h / (2 * closest)) for h in range(1, 2 * closest + 1, 2)]
    return slopes + between[: num_heads - closest]


class LinearBias(PositionScheme):
    """Minus a slope per head times the distance, in each form that a backend may ask for."""

    def slopes_per_head(self) -> Tensor:
        """The slopes, (H,) float32."""
        raise NotImplementedError

    def distance_bias(self, distance: Tensor) -> Tensor:
        """Exact for slopes that are powers of two and distances below 2^24."""
        return -per_head(self.slopes_per_head(), distance) * distance.float()

    def score_mod(self, q_pos: Tensor, k_pos: Tensor, span: int) -> Callable[..., Tensor]:
        """Computed from the positions, so that no table is read."""
        slopes = self.slopes_per_head()
        return lambda score, b, h, q, k: score - slopes[h] * (q_pos[q] - k_pos[k])

    def key_bias(self, k_pos: Tensor) -> Tensor:
        """-m (i - j) = m (j - c) + m (c - i), where the last term depends on the query only.

        c is the middle position, for which the values, and the rounding of the scores that they are added to, are
        smallest.
        """
        return self.slopes_per_head()[:, None] * (k_pos - k_pos[len(k_pos) // 2]).float()


class Alibi(LinearBias):
    """Linear biases with fixed or trained slopes."""

    slopes: Tensor
    divisor: float = 1.0
    """Divisor of the slopes in a test."""

    def __init__(self, config: AlibiConfig, shape: PositionShape) -> None:
        super().__init__(shape)
        self.fixed = alibi_slopes(shape.num_heads, config.last_exponent)
        fixed = torch.tensor(self.fixed, dtype=torch.float32, device="cpu")
        if config.scaling == "linear":
            self.divisor = config.factor or max(1.0, shape.context_length / shape.train_length)
        self.learned = config.learned_slopes
        if self.learned:
            # The logarithm keeps a trained slope positive.
            self.log_slopes = nn.Parameter(torch.empty(shape.num_heads))
            self.initialise()
        else:
            self.register_exact("slopes", fixed)

    def initialise(self) -> None:
        """Start learned slopes at the fixed ones."""
        if self.learned:
            with torch.no_grad():
                self.log_slopes.copy_(torch.tensor(self.fixed).log())

    def slopes_per_head(self) -> Tensor:
        slopes = self.log_slopes.float().exp() if self.learned else self.slopes
        return slopes if self.divisor == 1 else slopes / self.divisor


class HalfPrecisionAlibi(PositionScheme):
    """ALiBi rounded as in the authors' float16 training: half(half(q . k / sqrt(head_dim)) + half(m j)).

    j is the key's place in the sequence, counted from 0, so that the bias grows along the sequence instead of
    falling with the distance: in exact arithmetic the same after softmax, but in float16 coarser for later keys
    (steps of 1 at m j = 1,024). Source: the authors' fairseq/models/transformer.py, `buffered_future_mask`,
    and fairseq's attention, which keeps scores in the dtype of the activations. Softmax is exact here.
    """

    slopes: Tensor

    def __init__(self, shape: PositionShape) -> None:
        super().__init__(shape)
        self.register_exact(
            "slopes", torch.tensor(alibi_slopes(shape.num_heads), dtype=torch.float32, device="cpu")
        )

    @exact
    def content_bias(self, q: Tensor, k: Tensor, x: Tensor | None, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        """The difference that rounding and bias make to the exact score."""
        scores = q @ k.mT * q.shape[-1] ** -0.5
        bias = (self.slopes[:, None, None] * (k_pos - k_pos[0]).float()).half()
        return (scores.half() + bias).to(scores.dtype) - scores
