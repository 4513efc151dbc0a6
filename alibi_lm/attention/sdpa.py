"""Attention through torch's fused kernels, `scaled_dot_product_attention`.

Three routes, all equal to `eager`:
- no bias: the plain causal kernel;
- a bias that is a function of the key (`PositionScheme.key_bias`, ALiBi): the plain causal kernel with the bias as
  extra columns of queries and keys; no (T, S) tensor exists. On a CPU those columns cost 20 to 30% of attention's
  time, which `native`, where there is a C++ compiler, does not;
- any other bias, a window, or queries that are not all of the keys: a dense additive mask, built once per forward
  pass when it is small and in slices of queries when it is not. In training, a bias that is trained or depends on
  content needs memory for all scores.

Shape letters: B batch, T queries, S keys, H heads, D model dim, K head dim; t, s queries and keys of a slice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from alibi_lm.attention.base import AttentionBackend, hidden_keys
from alibi_lm.positions.base import PositionScheme

MASK_ELEMENTS = 1 << 25
"""Largest dense mask, in elements (128 MiB of float32); longer ones are built in slices of queries."""
SHORT = 256
"""On a CPU, up to this many keys a dense mask costs no more than extra columns, and is exact to the last bit."""


class DenseMask:
    """Additive masks of slices of queries; the mask of the whole pass is kept where it is small.

    Args:
        scheme: gives the bias.
        q_pos: (T,) int64.
        k_pos: (S,) int64.
        span: k_pos[-1] - k_pos[0].
        window: see `AttentionBackend.prepare`.
        dtype: of queries and keys.
        most: elements of a slice's mask.
    """

    def __init__(
        self,
        scheme: PositionScheme,
        q_pos: Tensor,
        k_pos: Tensor,
        span: int,
        window: int | None,
        dtype: torch.dtype,
        most: int,
    ) -> None:
        self.scheme, self.q_pos, self.k_pos, self.window, self.most = scheme, q_pos, k_pos, window, most
        # Kernels of a GPU want the mask in the dtype of the queries; the CPU's add it in float32.
        self.dtype = torch.promote_types(dtype, torch.float32) if q_pos.is_cpu else dtype
        self.row: Tensor | None = None
        """(H, span + 1) float32: the bias of each distance, where positions have no gaps and it is a function of
        distance. Its gradient costs far less than that of a table of pairs."""
        if span == len(k_pos) - 1 and scheme.defines("distance_bias") and not scheme.defines("bias"):
            self.row = scheme.distance_bias(torch.arange(span + 1, device=k_pos.device))
        rows = self.rows_per_slice(1)
        self.kept = self.static(slice(None), slice(None)) if rows >= len(q_pos) else None

    def rows_per_slice(self, batch: int) -> int:
        """Queries of a slice, so that its mask is not too large."""
        return max(1, self.most // (batch * self.scheme.shape.num_heads * len(self.k_pos)))

    def slices(self, rows_per_slice: int) -> list[tuple[slice, slice]]:
        """Slices of queries, and of the keys that they can see."""
        num_queries, num_keys = len(self.q_pos), len(self.k_pos)
        found = []
        for start in range(0, num_queries, rows_per_slice):
            stop = min(start + rows_per_slice, num_queries)
            offset, first = num_keys - num_queries, 0
            if self.window is not None and not self.scheme.defines("content_bias"):
                # Positions ascend, so keys are at least as far away as their index says.
                first = max(0, offset + start - self.window + 1)
            found.append((slice(start, stop), slice(first, offset + stop)))
        return found

    def static(self, rows: slice, columns: slice) -> Tensor:
        """The mask without the content bias: (1, H, t, s), -inf where the key is hidden."""
        q_pos, k_pos = self.q_pos[rows], self.k_pos[columns]
        if self.row is not None:
            return self._by_distance(self.row, rows, columns, len(q_pos), len(k_pos))
        hidden = hidden_keys(q_pos, k_pos, self.window)
        bias = self.scheme.bias(q_pos, k_pos)
        if bias is None:
            bias = torch.zeros((1, 1), device=hidden.device).expand_as(hidden)[None]
        # The fused CPU kernel takes a mask of four dimensions only.
        return bias.masked_fill(hidden, float("-inf")).to(self.dtype)[None]

    def _by_distance(self, row: Tensor, rows: slice, columns: slice, num_queries: int, num_keys: int) -> Tensor:
        """Each row of the mask is the one above it, moved by one: windows on one line, read from its end."""
        first_query = (rows.start or 0) + len(self.k_pos) - len(self.q_pos)
        first_key = columns.start or 0
        distance = torch.arange(first_query + num_queries - 1, first_query - num_keys, -1, device=row.device)
        distance = distance - first_key
        visible = distance >= 0
        if self.window is not None:
            visible &= distance < self.window
        line = row[:, distance.clamp(0, row.shape[1] - 1)].masked_fill(~visible, float("-inf")).to(self.dtype)
        return line.unfold(1, num_keys, 1).flip(1)[None]


@dataclass
class SdpaPrepared:
    """What the layers share: a key bias (H, S) float32, or a dense mask, or nothing (plain causal)."""

    key_bias: Tensor | None = None
    mask: DenseMask | None = None


class SdpaAttention(AttentionBackend[SdpaPrepared]):
    """torch.nn.functional.scaled_dot_product_attention.

    Args:
        mask_elements: largest dense mask.
        short: up to this many keys a CPU takes a dense mask.
    """

    name = "sdpa"

    def __init__(self, mask_elements: int = MASK_ELEMENTS, short: int = SHORT) -> None:
        self.mask_elements, self.short = mask_elements, short

    def prepare(
        self,
        scheme: PositionScheme,
        q_pos: Tensor,
        k_pos: Tensor,
        span: int,
        window: int | None,
        dtype: torch.dtype,
    ) -> SdpaPrepared:
        if len(q_pos) == len(k_pos) and window is None:
            if not scheme.defines("bias", "distance_bias", "content_bias"):
                return SdpaPrepared()
            if (len(k_pos) > self.short or not k_pos.is_cpu) and dtype in (torch.float32, torch.bfloat16):
                key_bias = None if scheme.defines("content_bias") else scheme.key_bias(k_pos)
                if key_bias is not None:
                    return SdpaPrepared(key_bias=key_bias)
        return SdpaPrepared(mask=DenseMask(scheme, q_pos, k_pos, span, window, dtype, self.mask_elements))

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, prepared: SdpaPrepared, x: Tensor | None, dropout: float
    ) -> Tensor:
        if prepared.key_bias is not None:
            return _with_columns(q, k, v, prepared.key_bias, dropout)
        if prepared.mask is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        return _with_mask(q, k, v, prepared.mask, x, dropout)


def _with_mask(q: Tensor, k: Tensor, v: Tensor, mask: DenseMask, x: Tensor | None, dropout: float) -> Tensor:
    """Attention with a dense mask, in slices of queries."""
    by_content = mask.scheme.defines("content_bias")
    if mask.kept is not None and not by_content:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.kept, dropout_p=dropout)
    parts = []
    for rows, columns in mask.slices(mask.rows_per_slice(len(q) if by_content else 1)):
        queries, keys = q[:, :, rows], k[:, :, columns]
        added = mask.static(rows, columns)
        if by_content:
            inputs = None if x is None else x[:, columns]
            content = mask.scheme.content_bias(queries, keys, inputs, mask.q_pos[rows], mask.k_pos[columns])
            added = added if content is None else (added + content).to(added.dtype)
        parts.append(
            F.scaled_dot_product_attention(queries, keys, v[:, :, columns], attn_mask=added, dropout_p=dropout)
        )
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
