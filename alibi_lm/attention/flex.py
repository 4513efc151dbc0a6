"""Attention through torch's FlexAttention: the scheme's score function runs inside a generated kernel.

Meant for a GPU: no (T, S) tensor for a bias that depends on distance, hidden blocks are skipped, and the distances
are float32 whatever the dtype of queries and keys. On a CPU it computes the forward pass, slowly. Gradients of a
trained bias are summed with atomics there: not the same to the last bit from run to run.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from alibi_lm.attention.base import Attend, AttentionBackend, Request, more_than_a_bias
from alibi_lm.positions.base import PositionScheme

RECOMPILATIONS = 64
"""Kernels that one process may generate: one for each scheme, and for each of the first lengths. Past torch's own
limit of 8 FlexAttention silently builds (B, H, T, S) scores."""


class FlexAttention(AttentionBackend):
    """torch.nn.attention.flex_attention, compiled on a GPU."""

    name = "flex"

    def __init__(self) -> None:
        self._compiled: Callable[..., Tensor] | None = None
        self._causal: tuple[tuple[Any, ...], Any] = ((), None)
        """Shape and blocks of the last causal mask: it depends on lengths alone, so it is kept."""

    def refuses_scheme(self, scheme: PositionScheme) -> str:
        if reason := more_than_a_bias(scheme):
            return reason
        if scheme.defines("content_bias"):
            return "it needs the full score matrix"
        return "its bias is made from content" if scheme.defines("content_key_bias") else ""

    def refuses(self, scheme: PositionScheme, request: Request) -> str:
        if request.dropout:
            return f"model.attention_dropout = {request.dropout}, and FlexAttention drops no attention weights"
        if request.k_pos.is_cpu and torch.is_grad_enabled():
            return "on a CPU FlexAttention has no backward pass, so nothing can be trained"
        return ""

    def prepare(self, scheme: PositionScheme, request: Request) -> Attend:
        from torch.nn.attention.flex_attention import flex_attention

        score_mod = scheme.score_mod(request.q_pos, request.k_pos, request.span)
        block_mask = self._block_mask(request)

        def attend(q: Tensor, k: Tensor, v: Tensor, x: Tensor | None) -> Tensor:
            if torch.compiler.is_compiling():
                # Part of the model's own graph. A filter of warnings would break that graph in every layer.
                return flex_attention(q, k, v, score_mod, block_mask)
            if q.is_cuda:
                return self._kernel()(q, k, v, score_mod, block_mask)
            with warnings.catch_warnings():
                # Uncompiled it is slow, and says so at each call; on a CPU that is what was asked for.
                warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
                return flex_attention(q, k, v, score_mod, block_mask)

        return attend

    def _kernel(self) -> Callable[..., Tensor]:
        if self._compiled is None:
            import torch._dynamo.config as config
            from torch.nn.attention.flex_attention import flex_attention

            config.recompile_limit = max(config.recompile_limit, RECOMPILATIONS)
            self._compiled = torch.compile(flex_attention)
        return self._compiled

    def _block_mask(self, request: Request) -> Any:
        """Which blocks of keys each block of queries sees."""
        from torch.nn.attention.flex_attention import create_block_mask

        q_pos, k_pos = request.q_pos, request.k_pos
        num_queries, num_keys, device = len(q_pos), len(k_pos), str(q_pos.device)
        offset, limit = num_keys - num_queries, request.window or 0

        def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return k <= q + offset

        def windowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            distance = q_pos[q] - k_pos[k]
            return (distance >= 0) & (distance < limit)

        if request.window is not None:
            return create_block_mask(windowed, None, None, num_queries, num_keys, device)
        shape = (num_queries, num_keys, device)
        if self._causal[0] != shape:
            self._causal = shape, create_block_mask(causal, None, None, num_queries, num_keys, device)
        return self._causal[1]
