"""torch's fused CPU attention kernel, called with what `scaled_dot_product_attention` does not pass on.

The public function refuses a mask together with `is_causal`, and takes its unfused path when the mask needs a
gradient. The kernel behind it has neither limit in its arithmetic:

- `attend_key_bias`: causal skipping and an additive row per key, broadcast over the queries with stride 0. That
  is ALiBi, at the price of plain causal attention and without any (T, S) tensor.
- `DistanceAttention`: a bias that depends on distance only. One (H, rows, S) block of it, moved along the
  diagonal, serves every slice of queries; the gradient of the bias needs only the distances below its
  saturation, because the gradients of a row of scores add up to zero.

Shape letters: B batch, T tokens (queries and keys), H heads, K head dim, R rows of a slice, W keys of a band.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

ROWS = 256
"""Queries of a slice in `DistanceAttention`: few enough to skip most hidden keys, enough to fill the threads."""


def _forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The kernel: (output (B, H, T, K), log of the sum of exponentials (B, H, T))."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=mask, scale=scale
    )


@functools.cache
def available() -> bool:
    """Whether this build of torch has the kernel, and it computes what this module relies on.

    The operator is not part of torch's public interface, so it is tried once, on five tokens.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        q, k, v = (torch.randn(1, 2, 5, 8, generator=generator, requires_grad=True) for _ in range(3))
        row = torch.randn(2, 5, generator=generator)
        ahead = torch.ones(5, 5, dtype=torch.bool).triu(1)
        expected = (q @ k.mT * 8**-0.5 + row[:, None]).masked_fill(ahead, float("-inf")).softmax(-1) @ v
        try:
            got = attend_key_bias(q, k, v, row)
            mine, theirs = (torch.autograd.grad(out.square().sum(), (q, k, v)) for out in (got, expected))
        except (AttributeError, RuntimeError, NotImplementedError, TypeError):
            return False
        close = functools.partial(torch.allclose, rtol=1e-4, atol=1e-5)
        return close(got, expected) and all(map(close, mine, theirs))


def attend_key_bias(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor) -> Tensor:
    """Causal attention with a bias per head and key.

    Args:
        q: (B, H, T, K), on the CPU.
        k: (B, H, T, K).
        v: (B, H, T, K).
        key_bias: (H, T), no gradient; float32, or the dtype of q.

    Returns:
        (B, H, T, K).
    """
    mask = key_bias[None, :, None, :].expand(1, -1, q.shape[2], -1)
    return _forward(q, k, v, True, mask, q.shape[-1] ** -0.5)[0]


class DistanceAttention(torch.autograd.Function):
    """Causal attention whose bias is a vector over distances; differentiable in the bias too."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, block: Tensor, saturation: int) -> Tensor:
        """Attend.

        Args:
            ctx: of autograd.
            q: (B, H, T, K), on the CPU.
            k: (B, H, T, K).
            v: (B, H, T, K).
            bias: (H, T): of each distance.
            block: (1, H, R, T): `distance_block(bias)`.
            saturation: the bias is constant from this distance on.

        Returns:
            (B, H, T, K).
        """
        scale = q.shape[-1] ** -0.5
        parts = [
            _forward(q[:, :, rows], k[:, :, :stop], v[:, :, :stop], False, mask, scale)
            for rows, stop, mask in _slices(block)
        ]
        out = torch.cat([part[0] for part in parts], dim=2)
        log_sum = torch.cat([part[1] for part in parts], dim=2)
        ctx.save_for_backward(q, k, v, bias, block, out, log_sum)
        ctx.saturation = saturation
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, k, v and bias."""
        q, k, v, bias, block, out, log_sum = ctx.saved_tensors
        scale = q.shape[-1] ** -0.5
        grad_q, grad_k, grad_v = [], torch.zeros_like(k), torch.zeros_like(v)
        for rows, stop, mask in _slices(block):
            dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad_out[:, :, rows], q[:, :, rows], k[:, :, :stop], v[:, :, :stop], out[:, :, rows],
                log_sum[:, :, rows], 0.0, False, attn_mask=mask, scale=scale,
            )  # fmt: skip
            grad_q.append(dq)
            grad_k[:, :, :stop] += dk
            grad_v[:, :, :stop] += dv
        grad_bias = None
        if ctx.needs_input_grad[3]:
            grad_bias = _bias_gradient(q, k, v, bias, out, log_sum, grad_out, ctx.saturation)
        return torch.cat(grad_q, dim=2), grad_k, grad_v, grad_bias, None, None


def distance_block(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """Mask of the last slice of queries against all keys; earlier slices see its right-hand part.

    Args:
        bias: (H, T): of each distance.
        dtype: of the result.

    Returns:
        (1, H, R, T), -inf where the key lies ahead. R is ROWS, or T where that is less.
    """
    length = bias.shape[1]
    rows = min(ROWS, length)
    # Row r sees the key at column w from distance (length - rows + r) - w: a line read backwards, and the rows
    # from the last to the first are the same line shifted by one.
    hidden = bias.new_full((len(bias), rows - 1), float("-inf"))
    line = torch.cat([bias.detach().flip(1), hidden], dim=1).to(dtype)
    return line.unfold(1, length, 1).flip(1)[None]


def _slices(block: Tensor) -> list[tuple[slice, int, Tensor]]:
    """Slices of queries, the number of keys each sees, and its mask (1, H, r, keys), a view of the block."""
    _, _, rows, length = block.shape
    slices = []
    for start in range(0, length, rows):
        stop = min(start + rows, length)
        # A whole slice sees the distances of the last one, from fewer keys; a shorter slice is the end of the last.
        mask = block[..., length - stop :] if stop - start == rows else block[:, :, start - stop :]
        slices.append((slice(start, stop), stop, mask))
    return slices


def _bias_gradient(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, out: Tensor, log_sum: Tensor, grad_out: Tensor, saturation: int
) -> Tensor:
    """Gradient of the bias of each distance, (H, T): the sum of the gradients of all scores at it.

    Computed for distances below the saturation, in bands along the diagonal; the rest is minus their sum.
    """
    _, num_heads, length, head_dim = q.shape
    exact = torch.promote_types(q.dtype, torch.float32)
    q, k, v, out, grad_out = (x.to(exact) for x in (q, k, v, out, grad_out))
    reach = min(saturation, length)
    rows = min(max(reach, 64), length)
    num_bands = -(-length // rows)
    end = num_bands * rows - length

    def queries(x: Tensor, value: float = 0.0) -> Tensor:  # (B, H, T, n) -> (B, H, bands, rows, n)
        return F.pad(x, (0, 0, 0, end), value=value).unflatten(2, (num_bands, rows))

    def keys(x: Tensor) -> Tensor:  # (B, H, T, K) -> (B, H, bands, K, reach + rows): keys from `reach` before on
        return F.pad(x, (0, 0, reach, end)).unfold(2, reach + rows, rows)

    distance = torch.arange(rows)[:, None] + reach - torch.arange(reach + rows)
    near = (distance >= 0) & (distance < reach)
    band = bias.detach()[:, distance.clamp(0, length - 1)].to(exact)
    scores = queries(q) @ keys(k) * head_dim**-0.5 + band[:, None]
    weights = (scores - queries(log_sum[..., None], math.inf)).exp()
    total = queries((grad_out * out).sum(-1, keepdim=True))
    # Padded queries have no weight; the keys before the first do not exist.
    gradient = (weights * (queries(grad_out) @ keys(v) - total)).masked_fill(~near, 0.0)
    gradient[:, :, 0, :, :reach] = 0.0
    gradient = gradient.sum((0, 2)).flatten(1)
    result = bias.new_zeros(num_heads, length + 1)
    result[:, :reach].index_add_(1, distance.clamp(0, reach - 1).flatten(), gradient.to(bias.dtype))
    result[:, reach] -= result[:, :reach].sum(1)
    return result[:, :length]
