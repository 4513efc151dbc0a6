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

import torch
import torch.nn.functional as F
from torch import Tensor

from alibi_lm.attention.base import (
    Attend,
    AttentionBackend,
    Request,
    equal_widths,
    hidden_keys,
    more_than_a_bias,
)
from alibi_lm.positions.base import PositionScheme

MASK_ELEMENTS = 1 << 25
"""Largest dense mask, in elements (128 MiB of float32); longer ones are built in slices of queries."""
SHORT = 256
"""On a CPU, up to this many keys a dense mask costs no more than extra columns, and is exact to the last bit."""
EXACT_COLUMNS = (torch.float32, torch.bfloat16)
"""Dtypes whose columns hold the bias to 24 bits."""


class SdpaAttention(AttentionBackend):
    """torch.nn.functional.scaled_dot_product_attention.

    Args:
        mask_elements: largest dense mask.
        short: up to this many keys a CPU takes a dense mask.
    """

    name = "sdpa"

    def __init__(self, mask_elements: int = MASK_ELEMENTS, short: int = SHORT) -> None:
        self.mask_elements, self.short = mask_elements, short

    def refuses_scheme(self, scheme: PositionScheme) -> str:
        return more_than_a_bias(scheme)

    def prepare(self, scheme: PositionScheme, request: Request) -> Attend:
        return equal_widths(self._prepare(scheme, request))

    def _prepare(self, scheme: PositionScheme, request: Request) -> Attend:
        k_pos, dropout = request.k_pos, request.dropout
        if request.whole and request.window is None and not scheme.defines("content_bias", "content_key_bias"):
            if not scheme.defines("bias", "distance_bias"):
                return lambda q, k, v, x: F.scaled_dot_product_attention(
                    q, k, v, is_causal=True, dropout_p=dropout
                )
            long = len(k_pos) > self.short or not k_pos.is_cpu
            key_bias = scheme.key_bias(k_pos) if long and request.dtype in EXACT_COLUMNS else None
            if key_bias is not None:
                bias = key_bias
                return lambda q, k, v, x: _with_columns(q, k, v, bias, dropout)
        return DenseMask(scheme, request, self.mask_elements)


def _with_columns(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor, dropout: float) -> Tensor:
    """Causal attention with a bias per head and key, (H, S) float32, as extra columns of queries and keys."""
    head_dim = q.shape[-1]
    q_columns, k_columns = (
        c.to(q.dtype).expand(len(q), -1, -1, -1) for c in key_bias_columns(key_bias, head_dim, q.dtype)
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


def key_bias_columns(key_bias: Tensor, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
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


class DenseMask:
    """Attention with an additive mask: of the whole pass where that is small, else of slices of queries.

    Args:
        scheme: gives the bias.
        request: the forward pass.
        most: elements of a slice's mask.
    """

    def __init__(self, scheme: PositionScheme, request: Request, most: int) -> None:
        self.scheme, self.most, self.window, self.dropout = scheme, most, request.window, request.dropout
        self.q_pos, self.k_pos = request.q_pos, request.k_pos
        # Kernels of a GPU want the mask in the dtype of the queries; the CPU's add it in float32.
        self.dtype = torch.promote_types(request.dtype, torch.float32) if self.q_pos.is_cpu else request.dtype
        self.by_content = scheme.defines("content_bias", "content_key_bias")
        self.line: Tensor | None = None
        """(H, span + 1) float32: the bias of each distance, where positions have no gaps and it is a function of
        distance. Its gradient costs far less than that of a table of pairs."""
        if not request.gaps and scheme.defines("distance_bias") and not scheme.defines("bias"):
            self.line = scheme.distance_bias(torch.arange(request.span + 1, device=self.k_pos.device))
        fits = self._rows_per_slice(1) >= len(self.q_pos)
        self.kept = self._mask(slice(None), slice(None)) if fits and not self.by_content else None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor | None) -> Tensor:
        if self.kept is not None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=self.kept, dropout_p=self.dropout)
        slices = self._slices(self._rows_per_slice(len(q) if self.by_content else 1))
        # Where no mask waits for a backward pass, the largest comes first: a process that keeps freed memory then
        # finds room for all the others in it.
        largest_first = not torch.is_grad_enabled()
        parts = []
        for rows, columns in reversed(slices) if largest_first else slices:
            queries, keys = q[:, :, rows], k[:, :, columns]
            mask = self._mask(rows, columns)
            if self.by_content:
                inputs = None if x is None else x[:, columns]
                bias = self.scheme.content_bias(queries, keys, inputs, self.q_pos[rows], self.k_pos[columns])
                mask = mask if bias is None else (mask + bias).to(mask.dtype)
            values = v[:, :, columns]
            parts.append(
                F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, dropout_p=self.dropout)
            )
        if largest_first:
            parts.reverse()
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def _rows_per_slice(self, batch: int) -> int:
        return max(1, self.most // (batch * self.scheme.shape.num_heads * len(self.k_pos)))

    def _slices(self, rows_per_slice: int) -> list[tuple[slice, slice]]:
        """Slices of queries, and of the keys that they can see."""
        num_queries, offset = len(self.q_pos), len(self.k_pos) - len(self.q_pos)
        found = []
        for start in range(0, num_queries, rows_per_slice):
            stop, first = min(start + rows_per_slice, num_queries), 0
            if self.window is not None and not self.by_content:
                # Positions ascend, so keys are at least as far away as their index says.
                first = max(0, offset + start - self.window + 1)
            found.append((slice(start, stop), slice(first, offset + stop)))
        return found

    def _mask(self, rows: slice, columns: slice) -> Tensor:
        """The mask without the content bias: (1, H, t, s), -inf where the key is hidden."""
        q_pos, k_pos = self.q_pos[rows], self.k_pos[columns]
        if self.line is not None:
            first_distance = (rows.start or 0) + len(self.k_pos) - len(self.q_pos) - (columns.start or 0)
            return self._mask_by_distance(self.line, first_distance, len(q_pos), len(k_pos))
        hidden = hidden_keys(q_pos, k_pos, self.window)
        bias = self.scheme.bias(q_pos, k_pos)
        if bias is None:
            bias = torch.zeros((1, 1), device=hidden.device).expand_as(hidden)[None]
        # The fused CPU kernel takes a mask of four dimensions only.
        return bias.masked_fill(hidden, float("-inf")).to(self.dtype)[None]

    def _mask_by_distance(self, line: Tensor, first_distance: int, num_queries: int, num_keys: int) -> Tensor:
        """Each row of the mask is the one above it, moved by one: windows on one line, read from its end."""
        last = first_distance + num_queries - 1
        distance = torch.arange(last, first_distance - num_keys, -1, device=line.device)
        visible = distance >= 0
        if self.window is not None:
            visible &= distance < self.window
        masked = line[:, distance.clamp(0, line.shape[1] - 1)].masked_fill(~visible, float("-inf"))
        return masked.to(self.dtype).unfold(1, num_keys, 1).flip(1)[None]
