"""Attention through torch's FlexAttention: the scheme's score function runs inside a generated kernel.

Meant for a GPU: no (T, S) tensor for a bias that depends on distance, and distances are float32 for queries and
keys of any dtype. Blocks of keys are skipped if they are hidden, or so far away that a falling bias leaves them no
weight. On a CPU it computes only the forward pass, slowly, and skips nothing. On a GPU gradients of a trained bias
are summed with atomics, so their last bits differ from run to run.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from alibi_lm.attention.base import Attend, AttentionBackend, Request, more_than_a_bias
from alibi_lm.positions.base import PositionScheme

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

RECOMPILATIONS = 64
"""How many kernels one process may generate: one per scheme and for each of the first lengths. Past torch's own
limit of 8 FlexAttention silently builds (B, H, T, S) scores."""
BLOCK = 128
"""Queries and keys per block, FlexAttention's own size."""
LOST = 2.0**-25
"""Share of a query's weights that skipped blocks may hold: half a unit in the last place of float32."""


class FlexAttention(AttentionBackend):
    """torch.nn.attention.flex_attention, compiled on a GPU."""

    name = "flex"

    def __init__(self) -> None:
        self._compiled: Callable[..., Tensor] | None = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        # What is kept between passes stays in this process: a compiled kernel cannot be pickled.
        return type(self), ()

    def refuses_scheme(self, scheme: PositionScheme) -> str:
        if reason := more_than_a_bias(scheme):
            return reason
        if scheme.defines("content_bias"):
            return "it needs the full score matrix"
        return "its bias is made from content" if scheme.defines("content_key_bias") else ""

    def refuses(self, scheme: PositionScheme, request: Request) -> str:
        if request.dropout:
            return f"model.attention_dropout = {request.dropout}, and FlexAttention drops no attention weights"
        if not request.k_pos.is_cpu and scheme.shape.head_dim < 16:
            return f"its kernel needs 16 dimensions per head, and the model has {scheme.shape.head_dim}"
        if request.k_pos.is_cpu and torch.is_grad_enabled():
            return "on a CPU FlexAttention has no backward pass, so nothing can be trained"
        return ""

    def prepare(self, scheme: PositionScheme, request: Request) -> Attend:
        from torch.nn.attention.flex_attention import flex_attention

        score_mod = scheme.score_mod(request.q_pos, request.k_pos, request.span)
        line = None
        if request.whole and not request.gaps and request.window is None and not scheme.defines("bias"):
            line = scheme.distance_bias(torch.arange(len(request.k_pos), device=request.k_pos.device))
        tail = None if line is None else tail_sums(line.detach())
        given = self._blocks(request) if tail is None else None

        def attend(q: Tensor, k: Tensor, v: Tensor, x: Tensor | None) -> Tensor:
            block_mask = given if tail is None else near_blocks(q, k, tail)
            if torch.compiler.is_compiling():
                # Part of the model's own graph, which a filter of warnings would break in every layer.
                return flex_attention(q, k, v, score_mod, block_mask)
            if q.is_cuda:
                return self._kernel()(q, k, v, score_mod, block_mask)
            with warnings.catch_warnings():
                # Uncompiled it is slow and warns at each call; on a CPU the user asked for that.
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

    def _blocks(self, request: Request) -> Any:
        """Which blocks of keys each block of queries sees; only a window or a cache needs all pairs for it."""
        from torch.nn.attention.flex_attention import create_block_mask

        q_pos, k_pos = request.q_pos, request.k_pos
        num_queries, num_keys, device = len(q_pos), len(k_pos), str(q_pos.device)
        if request.whole and request.window is None:
            return causal_blocks(q_pos.new_zeros(1, -(-num_keys // BLOCK)), num_keys)
        offset, limit = num_keys - num_queries, request.window or 0

        def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return k <= q + offset

        def windowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            distance = q_pos[q] - k_pos[k]
            return (distance >= 0) & (distance < limit)

        if request.window is not None:
            return create_block_mask(windowed, None, None, num_queries, num_keys, device)
        return create_block_mask(causal, None, None, num_queries, num_keys, device)


def tail_sums(line: Tensor) -> Tensor:
    """How much weight the bias leaves to all keys at a distance and beyond.

    Args:
        line: (H, T) float32, the bias at distances 0 to T - 1.

    Returns:
        (H, T) float32: ln of the sum of exp(line[d] - line[0]) over the distances d >= w, for w = 0 ... T - 1.
    """
    return (line - line[:, :1]).flip(-1).logcumsumexp(-1).flip(-1)


def near_blocks(q: Tensor, k: Tensor, tail: Tensor) -> BlockMask:
    """The blocks of keys that hold more than `LOST` of the weights of some query, per head and block of queries.

    No score q.k / sqrt(K) exceeds that of the query's own key by more than b = 2 max|q| max|k| / sqrt(K). So keys
    at distances from w on together have less than exp(b + tail[w]) of the own key's weight. All of this is
    computed on the device of the tensors, without synchronising.

    Args:
        q: (B, H, T, K).
        k: (B, H, T, K).
        tail: (H, T) float32, see `tail_sums`.

    Returns:
        A mask for `flex_attention`, causal, the same for each sequence of the batch.
    """
    tokens, dim = q.shape[2:]
    blocks = -(-tokens // BLOCK)
    with torch.no_grad():
        # Norms of bfloat16 numbers are computed in float32; the factor 1 + 1e-4 covers their rounding.
        of_queries, of_keys = (x.float().norm(dim=-1).amax(0) * (1 + 1e-4) for x in (q, k))  # (H, T)
        of_queries = nn.functional.pad(of_queries, (0, blocks * BLOCK - tokens)).unflatten(-1, (blocks, BLOCK))
        excess = 2 * of_queries.amax(-1) * of_keys.amax(-1, keepdim=True) * dim**-0.5  # (H, blocks)
        # The tails fall with the distance, but searchsorted needs rising values.
        reach = torch.searchsorted(-tail.contiguous(), (excess - math.log(LOST)).contiguous())
        block = torch.arange(blocks, device=q.device)
        first = (block * BLOCK - reach.clamp_min(1) + 1).clamp_min(0) // BLOCK  # (H, blocks)
        return causal_blocks(first, tokens)


def causal_blocks(first: Tensor, tokens: int) -> BlockMask:
    """A causal mask that begins, for each head and block of queries, at a block of keys.

    Args:
        first: (H or 1, ceil(T / BLOCK)) int64, number of the first block of keys.
        tokens: T.
    """
    from torch.nn.attention.flex_attention import BlockMask

    block = torch.arange(first.shape[1], device=first.device)
    whole = (first[..., None] + block).clamp_max(len(block) - 1)  # (H, blocks, blocks), of which i - first count
    return BlockMask.from_kv_blocks(
        torch.ones_like(first)[None].int(),
        block[:, None].expand(*first.shape, len(block))[None].int().contiguous(),
        (block - first)[None].int(),
        whole[None].int(),
        BLOCK_SIZE=BLOCK,
        mask_mod=lambda b, h, q, k: k <= q,
        seq_lengths=(tokens, tokens),
    )
