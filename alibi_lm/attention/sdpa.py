"""Attention through torch's fused kernels, `scaled_dot_product_attention`.

Three routes, all equal to `eager`:
- no bias: the plain causal kernel;
- a bias that is a function of the key (`PositionScheme.key_bias`, ALiBi) or a number per key made from content
  (`content_key_bias`, forget gates): the plain causal kernel with the bias as extra columns of queries and keys;
  no (T, S) tensor exists. Scores are rounded as numbers of the bias's size. On a CPU those columns cost 20 to 30%
  of attention's time; `native`, which needs a C++ compiler, does not have this cost;
- any other bias, a window, or cached decoding: a dense additive mask, built once per forward pass if it is small,
  and otherwise in slices of queries. In training, a bias that is trained or depends on content needs memory for
  all scores.

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
"""On a CPU with up to this many keys, a dense mask costs no more than extra columns, and is exact."""
EXACT_COLUMNS = (torch.float32, torch.bfloat16)
"""Dtypes in which columns hold the bias to 24 bits."""


class SdpaAttention(AttentionBackend):
    """torch.nn.functional.scaled_dot_product_attention.

    Args:
        mask_elements: size of the largest dense mask, in elements.
        short: on a CPU, up to this many keys use a dense mask.
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
        if request.whole and request.window is None and not scheme.defines("content_bias"):
            by_content, by_position = scheme.defines("content_key_bias"), scheme.defines("bias", "distance_bias")
            if not by_content and not by_position:
                return lambda q, k, v, x: F.scaled_dot_product_attention(
                    q, k, v, is_causal=True, dropout_p=dropout
                )
            long = len(k_pos) > self.short or not k_pos.is_cpu
            exact = long and request.dtype in EXACT_COLUMNS
            if exact and by_content and not by_position:
                return lambda q, k, v, x: _with_columns(q, k, v, _from_the_middle(scheme, x, k_pos), dropout)
            key_bias = scheme.key_bias(k_pos) if exact and not by_content else None
            if key_bias is not None:
                bias = key_bias[None]
                return lambda q, k, v, x: _with_columns(q, k, v, bias, dropout)
        return DenseMask(scheme, request, self.mask_elements)


def _from_the_middle(scheme: PositionScheme, x: Tensor | None, k_pos: Tensor) -> Tensor:
    """The content bias of each key, less that of the middle one: (B, H, S) float32."""
    bias = scheme.content_key_bias(x, k_pos)
    assert bias is not None
    return (bias - bias[..., len(k_pos) // 2, None]).float()


def _with_columns(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor, dropout: float) -> Tensor:
    """Causal attention with a bias per key, (B or 1, H, S) float32, as extra columns of queries and keys."""
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
    """Extra columns of queries and keys whose product is a key bias.

    Scores are divided by sqrt(head_dim), the bias is not. bfloat16 holds 8 bits of a value, too few for a
    position. There the keys have three columns whose sum carries 24 bits; the kernel adds them in float32.

    Args:
        key_bias: (..., H, S) float32.
        head_dim: dimensions of a head without the extra columns.
        dtype: dtype of queries and keys.

    Returns:
        (..., H, S, C), (..., H, S, C) with C a multiple of 8, which fused kernels need.
    """
    rest, pieces = key_bias * head_dim**0.5, []
    for _ in range(3 if dtype == torch.bfloat16 else 1):
        pieces.append(rest.to(dtype).to(rest.dtype))
        rest = rest - pieces[-1]
    k_columns = torch.stack(pieces, dim=-1)
    padding = (0, -len(pieces) % 8)
    return F.pad(torch.ones_like(k_columns), padding), F.pad(k_columns, padding)


def _masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dropout: float) -> Tensor:
    """Attention with an additive mask, whose dtype autocast would change."""
    with torch.autocast(q.device.type, enabled=False):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


class DenseMask:
    """Attention with an additive mask: for the whole pass if that is small, else for slices of queries.

    Args:
        scheme: gives the bias.
        request: the forward pass.
        most: largest number of elements in a slice's mask.
    """

    def __init__(self, scheme: PositionScheme, request: Request, most: int) -> None:
        self.scheme, self.most, self.window, self.dropout = scheme, most, request.window, request.dropout
        self.q_pos, self.k_pos = request.q_pos, request.k_pos
        # GPU kernels need the mask in the dtype of the queries; CPU kernels add it in float32.
        self.dtype = torch.promote_types(request.dtype, torch.float32) if self.q_pos.is_cpu else request.dtype
        self.by_content = scheme.defines("content_bias", "content_key_bias")
        self.line: Tensor | None = None
        """(H, span + 1) float32: the bias of each distance, if it is a function of distance and positions have no
        gaps. Its gradient costs far less than that of a table of pairs."""
        if not request.gaps and scheme.defines("distance_bias") and not scheme.defines("bias"):
            self.line = scheme.distance_bias(torch.arange(request.span + 1, device=self.k_pos.device))
            if self.line is not None and self.dtype.itemsize < 4:
                # Softmax ignores a constant; near keys, which weigh most, then have the smallest numbers to round.
                self.line = self.line - self.line[:, :1]
        fits = self._rows_per_slice(1) >= len(self.q_pos)
        self.kept = self._mask(slice(None), slice(None)) if fits and not self.by_content else None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor | None) -> Tensor:
        if self.kept is not None:
            return _masked(q, k, v, self.kept, self.dropout)
        slices = self._slices(self._rows_per_slice(len(q) if self.by_content else 1))
        # If no mask is kept for a backward pass, the largest comes first: a process that keeps freed memory can
        # then reuse it for all others.
        largest_first = not torch.is_grad_enabled()
        parts = []
        for rows, columns in reversed(slices) if largest_first else slices:
            queries, keys = q[:, :, rows], k[:, :, columns]
            mask = self._mask(rows, columns)
            if self.by_content:
                inputs = None if x is None else x[:, columns]
                bias = self.scheme.content_bias(queries, keys, inputs, self.q_pos[rows], self.k_pos[columns])
                mask = mask if bias is None else (mask + bias).to(mask.dtype)
            parts.append(_masked(queries, keys, v[:, :, columns], mask, self.dropout))
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
                # Positions ascend, so keys are at least as far away as their indices.
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
        # The fused CPU kernel takes only masks with four dimensions.
        return bias.masked_fill(hidden, float("-inf")).to(self.dtype)[None]

    def _mask_by_distance(self, line: Tensor, first_distance: int, num_queries: int, num_keys: int) -> Tensor:
        """The mask as windows on one vector, read from its end: each row is the one above, shifted by one."""
        last = first_distance + num_queries - 1
        distance = torch.arange(last, first_distance - num_keys, -1, device=line.device)
        visible = distance >= 0
        if self.window is not None:
            visible &= distance < self.window
        masked = line[:, distance.clamp(0, line.shape[1] - 1)].masked_fill(~visible, float("-inf"))
        return masked.to(self.dtype).unfold(1, num_keys, 1).flip(1)[None]
