"""Attention through torch's fused kernels, `scaled_dot_product_attention` and what lies behind it on the CPU.

Four routes, all equal to `eager`:
- no bias: the plain causal kernel;
- a bias that is a function of the key (`PositionScheme.key_bias`, ALiBi): on the CPU see `key_bias.py`, elsewhere
  extra columns of queries and keys; no (T, S) tensor exists;
- a bias that is a function of the distance (`PositionScheme.distance_bias`, T5), on the CPU: see `band.py`;
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

from alibi_lm.attention import fused_cpu
from alibi_lm.attention.band import Band, DistanceAttention, prepare_band
from alibi_lm.attention.base import AttentionBackend, consecutive, hidden_keys
from alibi_lm.attention.key_bias import attend_key_bias
from alibi_lm.positions.base import PositionScheme

MASK_ELEMENTS = 1 << 25
"""Largest dense mask, in elements (128 MiB of float32); longer ones are built in slices of queries."""
SHORT = 256
"""On a CPU, up to this many keys a dense mask costs no more than a key bias, and is exact to the last bit."""


@dataclass
class SdpaPrepared:
    """What the layers share: nothing (plain causal), or one of the others."""

    key_bias: Tensor | None = None
    """(H, S) float32."""
    band: Band | None = None
    slices: list[tuple[slice, slice, Callable[[], Tensor | None]]] | None = None


class SdpaAttention(AttentionBackend):
    """torch.nn.functional.scaled_dot_product_attention."""

    name = "sdpa"

    def __init__(self) -> None:
        self.fused_cpu = fused_cpu.available()

    def prepare(
        self, scheme: PositionScheme, q_pos: Tensor, k_pos: Tensor, window: int | None, dtype: torch.dtype
    ) -> SdpaPrepared:
        """See the base class."""
        num_queries, num_keys = len(q_pos), len(k_pos)
        if window is not None and window >= num_keys:
            window = None
        if num_queries == num_keys and window is None:
            if scheme.bias(q_pos[:1], k_pos[:1]) is None:
                return SdpaPrepared()
            if (num_keys > SHORT or not k_pos.is_cpu) and dtype in (torch.float32, torch.bfloat16):
                key_bias = scheme.key_bias(k_pos)
                if key_bias is not None:
                    return SdpaPrepared(key_bias=key_bias)
            if k_pos.is_cpu and self.fused_cpu and not torch.compiler.is_compiling() and consecutive(k_pos):
                bias = scheme.distance_bias(torch.arange(num_keys))
                band = None if bias is None else prepare_band(bias, scheme.saturation, dtype)
                if band is not None:
                    return SdpaPrepared(band=band)
        return SdpaPrepared(slices=_mask_slices(scheme, q_pos, k_pos, window, dtype))

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, prepared: SdpaPrepared, dropout: float) -> Tensor:
        """See the base class."""
        if prepared.key_bias is not None:
            if q.is_cpu and self.fused_cpu and not dropout and not prepared.key_bias.requires_grad:
                return attend_key_bias(q, k, v, prepared.key_bias)
            return _with_columns(q, k, v, prepared.key_bias, dropout)
        if prepared.band is not None:
            return _with_distance_bias(q, k, v, prepared.band, dropout)
        if prepared.slices is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        parts = [
            F.scaled_dot_product_attention(
                q[:, :, rows], k[:, :, columns], v[:, :, columns], attn_mask=mask(), dropout_p=dropout
            )
            for rows, columns, mask in prepared.slices
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _with_columns(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor, dropout: float) -> Tensor:
    """Causal attention with a bias per head and key, as extra columns of queries and keys."""
    head_dim = q.shape[-1]
    q_columns, k_columns = (
        c.to(q.dtype).expand(len(q), -1, -1, -1) for c in _columns(key_bias, head_dim, q.dtype)
    )
    out = F.scaled_dot_product_attention(
        torch.cat([q, q_columns], dim=-1),
        torch.cat([k, k_columns], dim=-1),
        F.pad(v, (0, q_columns.shape[-1])),
        is_causal=True,
        dropout_p=dropout,
        scale=head_dim**-0.5,
    )
    return out[..., :head_dim]


def _columns(key_bias: Tensor, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A key bias as columns of queries and keys, whose product it is.

    Scores are divided by sqrt(head_dim), the bias is not. bfloat16 holds 8 bits of a value, too few for a
    position. There the column of the keys becomes three whose sum carries 24 bits; the kernel adds them in
    float32.

    Args:
        key_bias: (H, S) float32.
        head_dim: of the unextended heads.
        dtype: of queries and keys.

    Returns:
        (1, H, S, C), (1, H, S, C) with C a multiple of 8, which fused kernels ask for.
    """
    rest, pieces = key_bias * head_dim**0.5, []
    for _ in range(3 if dtype == torch.bfloat16 else 1):
        pieces.append(rest.to(dtype).to(rest.dtype))
        rest = rest - pieces[-1]
    k_columns = torch.stack(pieces, dim=-1)
    padding = (0, -len(pieces) % 8)
    return F.pad(torch.ones_like(k_columns), padding)[None], F.pad(k_columns, padding)[None]


def _with_distance_bias(q: Tensor, k: Tensor, v: Tensor, band: Band, dropout: float) -> Tensor:
    """Causal attention with a bias per head and distance."""
    if not dropout:
        return DistanceAttention.apply(q, k, v, band.bias, band)
    # Dropout of attention weights has no fused kernel on the CPU.
    distance = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
    mask = band.bias[:, distance.clamp_min(0)].masked_fill(distance < 0, float("-inf"))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.dtype)[None], dropout_p=dropout)


def _mask_slices(
    scheme: PositionScheme, q_pos: Tensor, k_pos: Tensor, window: int | None, dtype: torch.dtype
) -> list[tuple[slice, slice, Callable[[], Tensor | None]]]:
    """Slices of queries, the keys each can see, and a function that gives its additive mask (1, H, t, s)."""
    num_queries, num_keys, num_heads = len(q_pos), len(k_pos), scheme.shape.num_heads
    offset = num_keys - num_queries
    # Kernels of a GPU want the mask in the dtype of the queries; the CPU's add it in float32.
    mask_dtype = torch.promote_types(dtype, torch.float32) if q_pos.is_cpu else dtype

    def dense(rows: slice, columns: slice) -> Tensor:
        queries, keys = q_pos[rows], k_pos[columns]
        hidden = hidden_keys(queries, keys, window)
        bias = scheme.bias(queries, keys)
        if bias is None:
            bias = torch.zeros((1, 1), device=hidden.device).expand_as(hidden)[None]
        # The fused CPU kernel takes a mask of four dimensions only.
        return bias.masked_fill(hidden, float("-inf")).to(mask_dtype)[None]

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
