"""The attention-backend protocol: say what you serve, prepare once per forward pass, then attend in each layer.

Shape letters: B batch, T queries, S keys, H heads, D model dim, K head dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch
from torch import Tensor

from alibi_lm.positions.base import PositionScheme

P = TypeVar("P")


class AttentionBackend(ABC, Generic[P]):
    """One way to compute softmax(q k^T / sqrt(K) + bias, causal) v for position schemes.

    All backends compute the same function; `eager` is its definition. `P` is what the layers share in a pass.
    """

    name: str

    def supports(
        self,
        scheme: PositionScheme,
        device: torch.device,
        dtype: torch.dtype,
        window: int | None = None,
        dropout: float = 0.0,
        grad: bool = False,
        whole: bool = True,
        gaps: bool = False,
    ) -> str:
        """Why the backend cannot serve passes of this kind; empty where it can.

        Args:
            scheme: gives the bias.
            device: of queries and keys.
            dtype: of queries and keys.
            window: see `prepare`.
            dropout: probability of dropping an attention weight.
            grad: whether gradients will be asked for.
            whole: whether the queries are all of the keys; not so in cached decoding.
            gaps: whether some position does not follow the one before it.
        """
        return ""

    @abstractmethod
    def prepare(
        self,
        scheme: PositionScheme,
        q_pos: Tensor,
        k_pos: Tensor,
        span: int,
        window: int | None,
        dtype: torch.dtype,
    ) -> P:
        """Build what all layers share in this forward pass.

        Args:
            scheme: gives the bias.
            q_pos: (T,) int64, strictly ascending: the last T entries of k_pos.
            k_pos: (S,) int64, strictly ascending.
            span: k_pos[-1] - k_pos[0]; S - 1 where positions have no gaps.
            window: a query sees only the keys at distances below it; None: all keys at or before it.
            dtype: of queries and keys.
        """

    @abstractmethod
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, prepared: P, x: Tensor | None, dropout: float) -> Tensor:
        """Attend.

        Args:
            q: (B, H, T, K).
            k: (B, H, S, K).
            v: (B, H, S, K).
            prepared: the value of `prepare`.
            x: (B, S, D), the layer's input at the keys; None unless the scheme has `cache_inputs`.
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
