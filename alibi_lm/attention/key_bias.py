"""Causal attention with a bias per head and key, on the CPU: ALiBi for the price of plain attention, or less.

Two things make it so:
- The bias of all keys is one row, handed to torch's kernel with stride 0 over the queries, beside causal skipping.
  No (T, T) tensor exists.
- A head whose row rises as a line of slope m, as ALiBi's do, leaves keys out that weigh nothing. With s_ij the
  score before the bias, a key at distance d has at most exp(b - m d) of the weight of the query's own key, where
  b is a bound on s_ij - s_ii. From some reach on, all such keys together have less than 2^-25 of that weight:
  float32 could not hold the difference. The bound is taken from the norms of the queries and keys at hand,

      s_ij - s_ii <= (|q_i| max_j |k_j| - q_i . k_i) / sqrt(K)

  so that it holds whatever was trained. A steep head costs what its reach costs, not what the length costs.

The reach is that of the longest-sighted token of the batch, so another token, a later one included, can change how
the sums are split, and with it the last bits of a result: as with any two shapes of a batch, never more.

Shape letters: B batch, T tokens (queries and keys), H heads, K head dim, F rows before the first block, R rows of
a block, W keys that a block sees before its own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alibi_lm.attention.base import empty_by_tokens
from alibi_lm.attention.fused_cpu import kernel, kernel_backward

NEGLIGIBLE = 25 * math.log(2)
"""Far keys are left out where their weights together stay below exp(-NEGLIGIBLE) of the query's own key's."""
WORTHWHILE = 0.75
"""A head takes blocks where they compute no more than this share of the scores of the whole triangle."""


def attend_key_bias(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor) -> Tensor:
    """Causal attention with a bias per head and key.

    Args:
        q: (B, H, T, K), float32 or bfloat16, on the CPU.
        k: (B, H, T, K).
        v: (B, H, T, K).
        key_bias: (H, T) float32, no gradient.

    Returns:
        (B, H, T, K).
    """
    # The kernel reads each vector as a run of numbers, whatever its stride.
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return _operator(q, k, v, key_bias)[0]


def reaches(q: Tensor, k: Tensor, key_bias: Tensor) -> Tensor:
    """The distance from which on a head's keys weigh nothing.

    Args:
        q: (B, H, T, K).
        k: (B, H, T, K).
        key_bias: (H, T).

    Returns:
        (H,) int64, in [1, T]; T where all keys count.
    """
    length = q.shape[2]
    row = key_bias.double()
    slope = (row[:, -1] - row[:, 0]) / max(length - 1, 1)
    line = row[:, :1] + slope[:, None] * torch.arange(length, dtype=torch.float64)
    # A row in float32 leaves its line by its own rounding.
    is_line = (row - line).abs().amax(1) <= 4 * torch.finfo(torch.float32).eps * row.abs().amax(1)
    # Sum over d >= W of exp(b - slope d), by the geometric series, for b = 0; each unit of b adds 1 / slope.
    shortest = (NEGLIGIBLE - torch.log1p(-torch.exp(-slope))) / slope
    # Not a number where the row does not rise: then all keys count. Norms are taken only where they may matter.
    steep = is_line & (shortest < length)
    count = int(steep.nonzero().max()) + 1 if steep.any() else 0
    reach = shortest[:count] + _bound(q[:, :count], k[:, :count]) / slope[:count]
    # Scores that are not numbers bound nothing.
    known = steep[:count] & (reach < length)
    result = torch.full((len(row),), length)
    result[:count][known] = reach[known].ceil().clamp_min(1).long()
    return result


def _bound(q: Tensor, k: Tensor) -> Tensor:
    """(B, H, T, K) twice -> (H,) float64: the most by which any key's score exceeds the one of the query's own."""
    q, k = q.float(), k.float()
    # Sums of squares: faster than a norm over so few numbers.
    largest_key = k.square().sum(-1).amax(-1, keepdim=True).sqrt()
    excess = q.square().sum(-1).sqrt() * largest_key - (q * k).sum(-1)
    return excess.amax(2).amax(0).double() * q.shape[-1] ** -0.5


def forward(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Attend: output (B, H, T, K), log of the sum of exponentials (B, H, T), reaches (H,)."""
    scale = q.shape[-1] ** -0.5
    reach = reaches(q, k, key_bias)
    out = empty_by_tokens(q)
    log_sum = q.new_empty(q.shape[:3], dtype=torch.float32)
    for part in _parts(reach.tolist(), key_bias):
        part_out, part_sum = kernel(part.rows(q), part.keys(k), part.keys(v), part.causal, part.mask, scale)
        part.rows(out).copy_(part_out)
        part.rows(log_sum[..., None]).copy_(part_sum[..., None])
    return out, log_sum, reach


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor, out: Tensor, log_sum: Tensor, reach: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, from what `forward` returned."""
    scale = q.shape[-1] ** -0.5
    grad_q, grad_k, grad_v = (empty_by_tokens(x) for x in (q, k, v))
    for part in _parts(reach.tolist(), key_bias):
        part_q, part_k, part_v = kernel_backward(
            part.rows(grad), part.rows(q), part.keys(k), part.keys(v), part.rows(out),
            part.rows(log_sum[..., None])[..., 0], part.causal, part.mask, scale,
        )  # fmt: skip
        part.rows(grad_q).copy_(part_q)
        part.add_to_keys(grad_k, part_k)
        part.add_to_keys(grad_v, part_v)
    return grad_q, grad_k, grad_v


class _Part(NamedTuple):
    """Scores that one call of the kernel computes, for some heads: a triangle, or blocks of rows.

    Blocks take the place of heads in that call: `rows` and `keys` are views, overlapping where keys are shared.
    """

    heads: slice
    first: int
    """Rows from here on are blocks; the triangle is the rows before."""
    block: int
    """R; 0 for the triangle."""
    reach: int
    """W."""
    mask: Tensor

    @property
    def causal(self) -> bool:
        """Whether the kernel hides later keys; the mask of a block does it itself."""
        return self.block == 0

    def rows(self, x: Tensor) -> Tensor:
        """(B, H, T, n) -> the rows of this part: (B, heads, F, n), or (B, blocks, R, n)."""
        if self.causal:
            return x[:, self.heads, : self.first]
        return x[:, self.heads.start, self.first :].unflatten(1, (-1, self.block))

    def keys(self, x: Tensor) -> Tensor:
        """(B, H, T, n) -> the keys that they see: (B, heads, F, n), or (B, blocks, W + R, n)."""
        if self.causal:
            return x[:, self.heads, : self.first]
        seen = x[:, self.heads.start, self.first - self.reach :]
        return seen.unfold(1, self.reach + self.block, self.block).transpose(-2, -1)

    def add_to_keys(self, total: Tensor, grad: Tensor) -> None:
        """The adjoint of `keys`, added to (B, H, T, n); a triangle, which comes first, overwrites."""
        if self.causal:
            total[:, self.heads, : self.first] = grad
            total[:, self.heads, self.first :] = 0
            return
        length = total.shape[2] - self.first
        for ahead in range(0, self.reach + self.block, self.block):
            start = self.first - self.reach + ahead
            target = total[:, self.heads.start, start : start + length].unflatten(1, (-1, self.block))
            target += grad[:, :, ahead : ahead + self.block]


def _parts(reaches: list[int], key_bias: Tensor) -> Iterator[_Part]:
    """Cut the scores of all heads into calls of the kernel; the parts of a head begin with its triangle."""
    num_heads, length = key_bias.shape
    plans = [_blocks(reach, length) for reach in reaches]
    start = 0
    while start < num_heads:
        stop = start + 1
        if plans[start] is None:  # neighbours that need no blocks share a call
            while stop < num_heads and plans[stop] is None:
                stop += 1
        heads = slice(start, stop)
        first, block, reach = plans[start] or (length, 0, 0)
        row = key_bias[heads, :first]
        yield _Part(heads, first, 0, 0, row[None, :, None, :].expand(1, -1, first, -1))
        if block:
            slope = float(key_bias[start, -1] - key_bias[start, 0]) / (length - 1)
            mask = _block_mask(slope, block, reach).expand(1, (length - first) // block, -1, -1)
            yield _Part(heads, first, block, reach, mask)
        start = stop


def _blocks(reach: int, length: int) -> tuple[int, int, int] | None:
    """(F, R, W) for a head, W a multiple of R and at least its reach; None where blocks save too little."""
    # The kernel is faster with more rows, and rows see more keys for nothing.
    block = 64 if reach <= 256 else 128 if reach <= 512 else 256 if reach <= 3072 else 768
    reach = -(-reach // block) * block
    count = (length - reach) // block
    if count <= 0:
        return None
    first = length - count * block
    # The kernel skips hidden keys by some 64 or 256 at a time.
    computed = first * (first + 64) / 2 + count * block * (reach + block)
    return (first, block, reach) if computed <= WORTHWHILE * length * (length + 256) / 2 else None


@functools.lru_cache(maxsize=8)
def _block_mask(slope: float, block: int, reach: int) -> Tensor:
    """(R, W + R): the bias of the keys that a block sees, the same for every block; later keys hidden.

    Kept for the next layer and the backward pass: the heads of one layer need few, of 27 MB at most below 16,384
    tokens.
    """
    distance = torch.arange(block)[:, None] + float(reach) - torch.arange(reach + block)
    return (-slope * distance).masked_fill(distance < 0, -math.inf)


# A compiler would look inside, and write expanded masks out; it sees these two operators instead. Its cache on
# disk knows them by name: another signature needs another name.
_operator = torch.library.custom_op("alibi_lm::key_bias_attention", forward, mutates_args=())
_operator_backward = torch.library.custom_op("alibi_lm::key_bias_attention_backward", backward, mutates_args=())


@_operator.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (
        empty_by_tokens(q),
        q.new_empty(q.shape[:3], dtype=torch.float32),
        q.new_empty(q.shape[1], dtype=torch.int64),
    )


@_operator_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return empty_by_tokens(q), empty_by_tokens(k), empty_by_tokens(v)


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return *_operator_backward(grad, *ctx.saved_tensors), None


_operator.register_autograd(_differentiate, setup_context=_setup_context)
