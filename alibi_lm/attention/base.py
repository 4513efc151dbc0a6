"""The attention-backend protocol: say what you serve, prepare once per forward pass, then attend in each layer.

Shape letters: B batch, T queries, S keys, H heads, D model dim, K head dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from alibi_lm.positions.base import PositionScheme

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""q (B, H, T, K), k (B, H, S, K), v (B, H, S, K), x (B, S, D) or None -> (B, H, T, K), dtype of v.

x is the layer's input at the keys; None unless the scheme has `cache_inputs`."""


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
    """A query sees only the keys at distances below it; None: all keys at or before it."""
    dtype: torch.dtype
    """Of queries and keys."""
    dropout: float
    """Probability of dropping an attention weight."""

    def __post_init__(self) -> None:
        if self.window is not None and self.window > self.span:
            self.window = None  # it hides nothing

    @property
    def whole(self) -> bool:
        """Whether the queries are all of the keys; not so in cached decoding."""
        return len(self.q_pos) == len(self.k_pos)

    @property
    def gaps(self) -> bool:
        """Whether some position does not follow the one before it."""
        return self.span != len(self.k_pos) - 1


class AttentionBackend(ABC):
    """One way to compute softmax(q k^T / sqrt(K) + bias, causal) v for position schemes.

    All backends compute the same function; `eager` is its definition.
    """

    name: str

    def refuses_scheme(self, scheme: PositionScheme) -> str:
        """Why the backend can never serve a scheme; empty where it can."""
        return ""

    def refuses(self, scheme: PositionScheme, request: Request) -> str:
        """Why the backend cannot serve this pass of a scheme that it can serve; empty where it can."""
        return ""

    @abstractmethod
    def prepare(self, scheme: PositionScheme, request: Request) -> Attend:
        """Build what all layers of the scheme share in a forward pass; each of them calls the result."""


def hidden_keys(q_pos: Tensor, k_pos: Tensor, window: int | None) -> Tensor:
    """Which keys each query must not see: (T,), (S,) int64 -> (T, S) bool, True ahead and outside the window."""
    distance = q_pos[:, None] - k_pos
    return distance < 0 if window is None else (distance < 0) | (distance >= window)
