"""Schemes whose score bias is multiplied: by one number, or by a factor for each query.

Both replace the scheme of a model for one forward pass; to attention backends they are ordinary schemes.

Shape letters: B batch, T tokens now, S keys seen, H heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from alibi_lm.model.query_scale import QueryScaleConfig, ScaledConfig
from alibi_lm.positions import PositionScheme

CONTENT_HOOKS = ("content_bias", "content_key_bias", "scores")
BIAS_HOOKS = ("distance_bias", "bias", *CONTENT_HOOKS)


def scales_bias(config: QueryScaleConfig, scheme: PositionScheme) -> bool:
    """Whether a query scale multiplies the bias of a scheme."""
    return isinstance(config, ScaledConfig) and config.scale_bias and scheme.defines(*BIAS_HOOKS)


def only_a_bias(scheme: PositionScheme) -> bool:
    """Whether a scheme does nothing but add a bias to scores."""
    others = ("add_to_embeddings", "transform_qk", "scores", "value_bias")
    return scheme.defines(*BIAS_HOOKS) and not scheme.defines(*others)


class FadedBias(PositionScheme):
    """A scheme's bias times one number.

    Args:
        scheme: the scheme whose bias is changed; the model calls its other hooks.
        strength: the factor.
    """

    def __init__(self, scheme: PositionScheme, strength: float) -> None:
        super().__init__(scheme.shape)
        self.scheme, self.strength = scheme, strength
        self.max_position = scheme.max_position
        self.cache_inputs = scheme.cache_inputs

    def defines(self, *hooks: str) -> bool:
        """Whether the scheme itself overrides a hook, so that backends take the same path for both."""
        return self.scheme.defines(*hooks)

    def distance_bias(self, distance: Tensor) -> Tensor | None:
        return self._times(self.scheme.distance_bias(distance))

    def bias(self, q_pos: Tensor, k_pos: Tensor) -> Tensor | None:
        return self._times(self.scheme.bias(q_pos, k_pos))

    def features(self, x: Tensor) -> Tensor:
        return self.scheme.features(x)

    def content_key_bias(self, x: Tensor | None, k_pos: Tensor) -> Tensor | None:
        return self._times(self.scheme.content_key_bias(x, k_pos))

    def content_bias(self, q: Tensor, k: Tensor, x: Tensor | None, q_pos: Tensor, k_pos: Tensor) -> Tensor | None:
        return self._times(self.scheme.content_bias(q, k, x, q_pos, k_pos))

    def key_bias(self, k_pos: Tensor) -> Tensor | None:
        return self._times(self.scheme.key_bias(k_pos))

    def _times(self, bias: Tensor | None) -> Tensor | None:
        return None if bias is None else bias * self.strength


class RowScaledBias(PositionScheme):
    """A scheme's bias times a factor for each query: more than a function of distance.

    Args:
        scheme: the scheme whose bias is multiplied; it depends on positions only.
        q_pos: (T,) int64, ascending: positions of the queries.
        factor: (1, T) or (H, T), the queries' factors.
    """

    def __init__(self, scheme: PositionScheme, q_pos: Tensor, factor: Tensor) -> None:
        super().__init__(scheme.shape)
        self.scheme, self.q_pos, self.factor = scheme, q_pos, factor

    def bias(self, q_pos: Tensor, k_pos: Tensor) -> Tensor | None:
        bias = self.scheme.bias(q_pos, k_pos)
        rows = torch.searchsorted(self.q_pos, q_pos)
        return None if bias is None else bias * self.factor[:, rows, None]
