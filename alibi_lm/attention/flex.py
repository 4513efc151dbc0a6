"""Attention through torch's FlexAttention: the scheme's score function runs inside a generated kernel.

Meant for a GPU: no (T, S) tensor for a bias that depends on distance, hidden blocks are skipped, and the distances
are float32 whatever the dtype of queries and keys. On a CPU it computes the forward pass, slowly. Gradients of a
trained bias are summed with atomics there: not the same to the last bit from run to run.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alibi_lm.attention.base import AttentionBackend
from alibi_lm.positions.base import PositionScheme

RECOMPILATIONS = 64
"""Kernels that one process may generate: one for each scheme, and for each of the first lengths. Past torch's own
limit of 8 FlexAttention silently builds (B, H, T, S) scores."""


@dataclass
class FlexPrepared:
    """Change of each score, or None, and the blocks of keys that each block of queries sees."""

    score_mod: Callable[..., Tensor] | None
    block_mask: Any


class FlexAttention(AttentionBackend[FlexPrepared]):
    """torch.nn.attention.flex_attention, compiled on a GPU."""

    name = "flex"

    def __init__(self) -> None:
        self._compiled: Callable[..., Tensor] | None = None
        self._causal: tuple[tuple[Any, ...], Any] = ((), None)

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
        if scheme.defines("content_bias"):
            return "it needs the full score matrix"
        if dropout:
            return f"model.attention_dropout = {dropout}, and FlexAttention drops no attention weights"
        if grad and device.type == "cpu":
            return "on a CPU FlexAttention has no backward pass, so nothing can be trained"
        return ""

    def prepare(
        self,
        scheme: PositionScheme,
        q_pos: Tensor,
        k_pos: Tensor,
        span: int,
        window: int | None,
        dtype: torch.dtype,
    ) -> FlexPrepared:
        return FlexPrepared(scheme.score_mod(q_pos, k_pos, span), self._block_mask(q_pos, k_pos, window))

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, prepared: FlexPrepared, x: Tensor | None, dropout: float
    ) -> Tensor:
        from torch.nn.attention.flex_attention import flex_attention

        if torch.compiler.is_compiling():
            # Part of the model's own graph. A filter of warnings would break that graph in every layer.
            return flex_attention(q, k, v, prepared.score_mod, prepared.block_mask)
        if q.is_cuda:
            if self._compiled is None:
                allow_recompilations()
                self._compiled = torch.compile(flex_attention)
            return self._compiled(q, k, v, prepared.score_mod, prepared.block_mask)
        with warnings.catch_warnings():
            # Uncompiled it is slow, and says so at each call; on a CPU that is what was asked for.
            warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
            return flex_attention(q, k, v, prepared.score_mod, prepared.block_mask)

    def _block_mask(self, q_pos: Tensor, k_pos: Tensor, window: int | None) -> Any:
        """Which keys each query sees. The causal one depends on lengths alone and is kept."""
        from torch.nn.attention.flex_attention import create_block_mask

        num_queries, num_keys = len(q_pos), len(k_pos)
        offset, limit = num_keys - num_queries, window or 0

        def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return k <= q + offset

        def windowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            distance = q_pos[q] - k_pos[k]
            return (distance >= 0) & (distance < limit)

        device = str(q_pos.device)
        if window is not None:
            return create_block_mask(windowed, None, None, num_queries, num_keys, device)
        key = (num_queries, num_keys, device)
        if self._causal[0] != key:
            self._causal = key, create_block_mask(causal, None, None, num_queries, num_keys, device)
        return self._causal[1]


def allow_recompilations() -> None:
    """Raise torch's limit of recompilations to what schemes and lengths of one process need."""
    import torch._dynamo.config as config

    config.recompile_limit = max(config.recompile_limit, RECOMPILATIONS)
