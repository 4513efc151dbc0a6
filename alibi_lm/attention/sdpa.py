"""Attention through torch's fused kernels, `scaled_dot_product_attention`.

Three routes, all equal to `eager`:
- no bias: the plain causal kernel;
- a bias that is a low-rank product (`PositionScheme.bias_factors`, ALiBi): its factors become extra columns of
  queries and keys, so that the plain causal kernel computes it and no (T, S) tensor exists;
- any other bias, a window, or queries that are not all of the keys: a dense additive mask, built once per
  forward pass when it is small and in slices of queries when it is not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from alibi_lm.attention.base import AttentionBackend, hidden_keys
from alibi_lm.positions.base import PositionScheme

MASK_ELEMENTS = 1 << 25
"""Largest dense mask, in elements (128 MiB of float32); longer ones are built in slices of queries."""
SHORT = 512
"""Up to this many keys a dense bias costs no more than factor columns, and is exact to the last bit."""


@dataclass
class SdpaPrepared:
    """What the layers share: nothing (plain causal), factor columns, or the masks of query slices."""

    columns: tuple[Tensor, Tensor] | None = None
    slices: list[tuple[slice, slice, Callable[[], Tensor | None]]] | None = None


class SdpaAttention(AttentionBackend):
    """torch.nn.functional.scaled_dot_product_attention."""

    name = "sdpa"

    def prepare(
        self, scheme: PositionScheme, q_pos: Tensor, k_pos: Tensor, window: int | None, dtype: torch.dtype
    ) -> SdpaPrepared:
        """See the base class."""
        num_queries, num_keys = len(q_pos), len(k_pos)
        if window is not None and window >= num_keys:
            window = None
        if num_queries == num_keys and window is None:
            factors = scheme.bias_factors(q_pos, k_pos)
            if factors is not None and num_keys > SHORT and dtype in (torch.float32, torch.bfloat16):
                return SdpaPrepared(columns=_columns(*factors, scheme.shape.head_dim, dtype))
            if factors is None and scheme.bias(q_pos[:1], k_pos[:1]) is None:
                return SdpaPrepared()
        return SdpaPrepared(slices=_mask_slices(scheme, q_pos, k_pos, window, dtype))

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, prepared: SdpaPrepared, dropout: float) -> Tensor:
        """See the base class."""
        if prepared.slices is not None:
            parts = [
                F.scaled_dot_product_attention(
                    q[:, :, rows], k[:, :, columns], v[:, :, columns], attn_mask=mask(), dropout_p=dropout
                )
                for rows, columns, mask in prepared.slices
            ]
            return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
        if prepared.columns is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        head_dim = q.shape[-1]
        q_columns, k_columns = (c.to(q.dtype).expand(len(q), -1, -1, -1) for c in prepared.columns)
        out = F.scaled_dot_product_attention(
            torch.cat([q, q_columns], dim=-1),
            torch.cat([k, k_columns], dim=-1),
            F.pad(v, (0, q_columns.shape[-1])),
            is_causal=True,
            dropout_p=dropout,
            scale=head_dim**-0.5,
        )
        return out[..., :head_dim]


def _columns(q_part: Tensor, k_part: Tensor, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Factor columns as queries and keys take them: scores are divided by sqrt(head_dim), the bias is not.

    bfloat16 holds 8 bits of a value, too few for a position. There each key column becomes three whose sum
    carries 24 bits; the kernel adds them in float32.

    Args:
        q_part: (H, T, R) float32.
        k_part: (H, S, R) float32.
        head_dim: of the unextended heads.
        dtype: of queries and keys.

    Returns:
        (1, H, T, C), (1, H, S, C) with C a multiple of 8, which fused kernels ask for.
    """
    k_part = k_part * head_dim**0.5
    if dtype == torch.bfloat16:
        pieces, rest = [], k_part
        for _ in range(3):
            pieces.append(rest.bfloat16())
            rest = rest - pieces[-1].float()
        k_part = torch.cat([p.float() for p in pieces], dim=-1)
        q_part = q_part.repeat(1, 1, 3)
    padding = -k_part.shape[-1] % 8
    return F.pad(q_part, (0, padding))[None], F.pad(k_part, (0, padding))[None]


def _mask_slices(
    scheme: PositionScheme, q_pos: Tensor, k_pos: Tensor, window: int | None, dtype: torch.dtype
) -> list[tuple[slice, slice, Callable[[], Tensor | None]]]:
    """Slices of queries, the keys each can see, and a function that gives its additive mask (1, H, t, s)."""
    num_queries, num_keys, num_heads = len(q_pos), len(k_pos), scheme.shape.num_heads
    offset = num_keys - num_queries

    def dense(rows: slice, columns: slice) -> Tensor:
        queries, keys = q_pos[rows], k_pos[columns]
        hidden = hidden_keys(queries, keys, window)
        bias = scheme.bias(queries, keys)
        if bias is None:
            bias = torch.zeros((1, 1), device=hidden.device).expand_as(hidden)[None]
        # The fused CPU kernel takes a mask of four dimensions only.
        return bias.masked_fill(hidden, float("-inf")).to(dtype)[None]

    rows_per_slice = max(1, MASK_ELEMENTS // (num_heads * num_keys))
    whole = rows_per_slice >= num_queries
    slices: list[tuple[slice, slice, Callable[[], Tensor | None]]] = []
    for start in range(0, num_queries, rows_per_slice):
        stop = min(start + rows_per_slice, num_queries)
        first = 0 if window is None else max(0, offset + start - window + 1)
        rows, columns = slice(start, stop), slice(first, offset + stop)
        if whole:
            mask = dense(rows, columns)
            slices.append((rows, columns, partial(_same, mask)))
        else:
            slices.append((rows, columns, partial(dense, rows, columns)))
    return slices


def _same(mask: Tensor) -> Tensor:
    return mask
