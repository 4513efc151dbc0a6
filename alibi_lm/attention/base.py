"""The attention-backend protocol: prepare once per forward pass, then call in each layer.

Shape letters: B batch, T queries, S keys, H heads, K head dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from alibi_lm.positions.base import PositionScheme


class AttentionBackend(ABC):
    """One way to compute softmax(q k^T / sqrt(K) + bias, causal) v for any position scheme.

    All backends compute the same function; `eager` is its definition.
    """

    name: str
    prepares_outside: bool = False
    """Whether `prepare` reads positions, so that a compiled model must break off for it, once per forward pass."""

    @abstractmethod
    def prepare(
        self, scheme: PositionScheme, q_pos: Tensor, k_pos: Tensor, window: int | None, dtype: torch.dtype
    ) -> Any:
        """Build what all layers share in this forward pass.

        Args:
            scheme: gives the bias.
            q_pos: (T,) int64, ascending: the last T entries of k_pos.
            k_pos: (S,) int64, ascending.
            window: a query sees only the keys at distances below it; None: all keys at or before it.
            dtype: of queries and keys.
        """

    @abstractmethod
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, prepared: Any, dropout: float) -> Tensor:
        """Attend.

        Args:
            q: (B, H, T, K).
            k: (B, H, S, K).
            v: (B, H, S, K).
            prepared: the value of `prepare`.
            dropout: probability of dropping an attention weight.

        Returns:
            (B, H, T, K), dtype of v.
        """


def hidden_keys(q_pos: Tensor, k_pos: Tensor, window: int | None) -> Tensor:
    """Which keys each query must not see.

    Args:
        q_pos: (T,) int64.
        k_pos: (S,) int64.
        window: see `AttentionBackend.prepare`.

    Returns:
        (T, S) bool, True where the key lies ahead of the query or outside its window.
    """
    ahead = k_pos[None, :] > q_pos[:, None]
    if window is None:
        return ahead
    return ahead | (q_pos[:, None] - k_pos[None, :] >= window)


def consecutive(positions: Tensor) -> bool:
    """Whether each position follows the one before. Positions on the CPU only: it reads them."""
    return bool((positions.diff() == 1).all())


def empty_by_tokens(x: Tensor) -> Tensor:
    """(B, H, T, K), empty, with tokens before heads in memory: heads then join to one vector without a copy."""
    batch, heads, tokens, dim = x.shape
    return x.new_empty(batch, tokens, heads, dim).transpose(1, 2)


@contextmanager
def trial() -> Iterator[torch.Generator]:
    """For trying a kernel: CPU, gradients, no autocast, whatever the caller has chosen; gives a generator."""
    with (
        torch.device("cpu"),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
    ):
        yield torch.Generator("cpu").manual_seed(0)
