"""Query scales: queries, and so their scores, are multiplied by a factor before the softmax.

They can be combined with every position scheme and every attention backend. Let n be the number of keys that a
query sees (including its own), L the training length and q' = factor * q, so that

    scores = factor * q . k / sqrt(head_dim) + bias

    log_n     max(1, ln n / ln L)               Chiang & Cholak 2022, arXiv 2202.12172; clipped at 1 as in Su's
                                                ReRoPE (jquesnelle/yarn, scaled_rope/LlamaReRoPE.py) and Qwen 1
    ssmax     s ln n, s trained per layer and head       Nakanishi 2025, arXiv 2501.19399 (Scalable-Softmax)
    llama4    1 + 0.1 ln(floor(n / floor_scale) + 1)     Llama 4 (transformers, models/llama4), `attn_scale`
    constant  a number                                   Wang et al. 2024, arXiv 2404.12224 (UniformScale)
    per_head  trained per layer and head                 the same (HeadScale)

The sources count positions from 1, while this package counts visible keys. The two are equal for sequences that
begin at position 0 and see all of their keys; with a window, or with shifted or drawn positions, only the count is
the number of keys that the softmax is over.

Variants where public code disagrees: `clipped=false` is the plain ln n / ln L, which is below 1 for n < L and 0
for the first query. `scale_bias=true` multiplies the score bias too, factor * (q . k / sqrt(head_dim) + bias), as
BAM does with SSMax (Bianchessi et al. 2025, arXiv 2505.22842); its authors' ALiBi with SSMax does not.

Shape letters: T tokens now, H heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from alibi_lm.positions import PositionShape
from alibi_lm.settings import require, require_at_least


class QueryScale(nn.Module):
    """The factors of the queries, and their trained parameters.

    Args:
        config: settings.
        shape: the model's shape.
    """

    def __init__(self, config: QueryScaleConfig, shape: PositionShape) -> None:
        super().__init__()
        self.config, self.train_length = config, shape.train_length
        self.scales = nn.ParameterList()
        if isinstance(config, PerHeadConfig):
            scales = torch.full((shape.num_layers, shape.num_heads), config.start)
            self.scales.extend(nn.Parameter(scale.clone()) for scale in scales)

    def factors(self, visible: Tensor) -> list[Tensor]:
        """The factor of each query.

        Args:
            visible: (T,) int64, how many keys each query sees.

        Returns:
            One tensor that all layers share, or one for each layer: (1, T) or (H, T) float64. Empty: no factors.
        """
        common = self.config.common(visible, self.train_length)
        if common is None:
            return []
        return [scale.double()[:, None] * common for scale in self.scales] or [common[None]]


@dataclass
class QueryScaleConfig:
    """No scale: queries are not multiplied."""

    name: str = "none"

    def common(self, visible: Tensor, train_length: int) -> Tensor | None:
        """The part of the factors that all layers and heads share: (T,) int64 -> (T,) float64, or None."""
        return None

    def build(self, shape: PositionShape) -> QueryScale:
        return QueryScale(self, shape)


@dataclass
class ScaledConfig(QueryScaleConfig):
    """Settings that all scales have."""

    scale_bias: bool = False
    """Multiply the score bias of the position scheme too."""


@dataclass
class LogNConfig(ScaledConfig):
    """Queries times ln n / ln L."""

    name: str = "log_n"
    length: int | None = None
    """L, the number of keys from which the factor grows; null: the training length."""
    clipped: bool = True
    """Let no factor be below 1."""

    def __post_init__(self) -> None:
        require(self.length is None or self.length >= 2, f"query_scale.length = {self.length}. Use at least 2.")

    def common(self, visible: Tensor, train_length: int) -> Tensor:
        length = self.length or train_length
        require(
            length >= 2, f"query_scale.length = {length}. Use a whole number >= 2: scores are divided by its ln."
        )
        factor = visible.double().log() / math.log(length)
        return factor.clamp_min(1.0) if self.clipped else factor


@dataclass
class Llama4Config(ScaledConfig):
    """Queries times 1 + attn_scale ln(floor(n / floor_scale) + 1)."""

    name: str = "llama4"
    attn_scale: float = 0.1
    """Coefficient of the logarithm."""
    floor_scale: int | None = None
    """Number of keys between two steps of the factor (8192 in Llama 4); null: the training length."""

    def __post_init__(self) -> None:
        floor = self.floor_scale
        require_at_least("query_scale.floor_scale", floor, 1)

    def common(self, visible: Tensor, train_length: int) -> Tensor:
        steps = visible // (self.floor_scale or train_length)
        return 1 + self.attn_scale * (steps.double() + 1).log()


@dataclass
class ConstantConfig(ScaledConfig):
    """Queries times one number: the inverse of a temperature."""

    name: str = "constant"
    factor: float = 1.0
    """The factor, > 0."""

    def __post_init__(self) -> None:
        require(0 < self.factor < math.inf, f"query_scale.factor = {self.factor}. Use a number above 0.")

    def common(self, visible: Tensor, train_length: int) -> Tensor:
        return torch.full_like(visible, self.factor, dtype=torch.float64)


@dataclass
class PerHeadConfig(ScaledConfig):
    """Queries times a trained number per layer and head."""

    name: str = "per_head"
    start: float = 1.0
    """Initial value of the trained numbers."""

    starts: ClassVar[tuple[str, ...]] = ("start",)
    """Settings that a trained run no longer depends on."""

    def common(self, visible: Tensor, train_length: int) -> Tensor:
        return torch.ones_like(visible).double()


@dataclass
class SsmaxConfig(PerHeadConfig):
    """Queries times s ln n, with s trained per layer and head."""

    name: str = "ssmax"

    def common(self, visible: Tensor, train_length: int) -> Tensor:
        return visible.double().log()


QUERY_SCALES: dict[str, type] = {
    "none": QueryScaleConfig,
    "log_n": LogNConfig,
    "ssmax": SsmaxConfig,
    "llama4": Llama4Config,
    "constant": ConstantConfig,
    "per_head": PerHeadConfig,
}
"""Entries of the config group `query_scale`."""


def visible_keys(q_pos: Tensor, k_pos: Tensor, window: int | None) -> Tensor:
    """How many keys each query sees.

    Args:
        q_pos: (T,) int64, the last T entries of k_pos.
        k_pos: (S,) int64, ascending.
        window: keys at distances below it are seen; None: all keys at or before the query.

    Returns:
        (T,) int64, >= 1.
    """
    visible = torch.arange(len(k_pos) - len(q_pos) + 1, len(k_pos) + 1, device=q_pos.device)
    return visible if window is None else visible - torch.searchsorted(k_pos, q_pos - window, right=True)
