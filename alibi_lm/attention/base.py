"""The protocol of attention backends: say what is supported, prepare once per forward pass, attend in each layer.

Shape letters: B batch, T queries, S keys, H heads, D model dim, K head dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from alibi_lm.positions.base import PositionScheme

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""q (B, H, T, K'), k (B, H, S, K'), v (B, H, S, K), x (B, S, F) or None -> (B, H, T, K), dtype of v.

K' is K unless the scheme's `transform_qk` makes queries and keys wider. x holds the `features` of the keys and is
None unless the scheme has `cache_inputs`."""


@dataclass
class Request:
    """What a forward pass asks of attention."""

    q_pos: Tensor
    """(T,) int64, strictly ascending: the last T entries of k_pos."""
    k_pos: Tensor
    """(S,) int64, strictly ascending."""
    span: int
    """k_pos[-1] - k_pos[0]."""
    window: int | None
    """A query sees only the keys at distances below this; None: all keys at or before the query."""
    dtype: torch.dtype
    """Dtype of queries and keys."""
    dropout: float
    """Probability of dropping an attention weight."""

    def __post_init__(self) -> None:
        if self.window is not None and self.window > self.span:
            self.window = None  # it hides nothing

    @property
    def whole(self) -> bool:
        """Whether there is a query for every key; false in cached decoding."""
        return len(self.q_pos) == len(self.k_pos)

    @property
    def gaps(self) -> bool:
        """Whether positions have gaps."""
        return self.span != len(self.k_pos) - 1


class AttentionBackend(ABC):
    """One way to compute softmax(q k^T / sqrt(K) + bias, causal) v for position schemes.

    All backends compute the same function; `eager` is its definition.
    """

    name: str

    def refuses_scheme(self, scheme: PositionScheme) -> str:
        """Why the backend can never serve a scheme; empty if it can."""
        return ""

    def refuses(self, scheme: PositionScheme, request: Request) -> str:
        """Why the backend cannot serve this pass, although it can serve the scheme; empty if it can."""
        return ""

    @abstractmethod
    def prepare(self, scheme: PositionScheme, request: Request) -> Attend:
        """Build what all layers of the scheme share in a forward pass; each layer calls the result."""


def more_than_a_bias(scheme: PositionScheme) -> str:
    """Why no fused kernel serves a scheme; empty if one may."""
    return "it is more than a score bias" if scheme.defines("scores", "value_bias") else ""


def equal_widths(attend: Attend) -> Attend:
    """Serve queries and keys that are wider than values with a kernel that needs equal widths."""

    def attend_any(q: Tensor, k: Tensor, v: Tensor, x: Tensor | None) -> Tensor:
        missing = q.shape[-1] - v.shape[-1]
        return attend(q, k, F.pad(v, (0, missing)), x)[..., : v.shape[-1]] if missing else attend(q, k, v, x)

    return attend_any


def hidden_keys(q_pos: Tensor, k_pos: Tensor, window: int | None) -> Tensor:
    """Which keys each query must not see: (T,), (S,) int64 -> (T, S) bool, True ahead and outside the window."""
    distance = q_pos[:, None] - k_pos
    return distance < 0 if window is None else (distance < 0) | (distance >= window)
