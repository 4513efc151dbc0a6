"""Causal attention with a bias that depends on distance only, and is constant from some distance on; on the CPU.

Short sequences take a whole mask. Long ones are cut in two: the far keys are plain causal attention of the queries
shifted by that distance, so that no mask is needed; the near ones are a band of blocks that share one mask. Memory
is linear in the length. The gradient of the bias needs the band alone, because the gradients of a row of scores
add up to zero: what the near distances gain, the constant of the far ones loses.

Shape letters: B batch, T tokens (queries and keys), H heads, K head dim, D saturation (the first distance that is
far), R rows of a block, W = D + R keys that a block can see.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from alibi_lm.attention.fused_cpu import kernel, kernel_backward

WHOLE = 1024
"""Up to this length a whole (H, T, T) mask is faster than far keys and band."""


class Band(NamedTuple):
    """A bias over distances, as the layers need it."""

    bias: Tensor
    """(H, T): of each distance; may need a gradient."""
    saturation: int
    """D: the bias is constant from this distance on; at most T."""
    mask: Tensor
    """Short sequences: (1, H, T, T), of each pair. Long ones: (1, H, R, W), of near keys, -inf for all others."""

    @property
    def whole(self) -> bool:
        """Whether the mask is that of all pairs."""
        return self.mask.shape[2] == self.bias.shape[1]


def prepare_band(bias: Tensor, saturation: int | None, dtype: torch.dtype) -> Band | None:
    """Build the mask that serves all layers.

    Args:
        bias: (H, T): of each distance.
        saturation: the bias is constant from this distance on, if it is.
        dtype: of queries and keys.

    Returns:
        None where the sequence is long and the bias has no constant part: no mask of linear size serves it.
    """
    length = bias.shape[1]
    reach = min(saturation or length, length)
    exact = torch.promote_types(dtype, torch.float32)
    if length <= max(WHOLE, _rows(1)):
        # Each row is the one below it, moved by one: windows on one line, read from its end.
        line = F.pad(bias.detach().to(exact).flip(1), (0, length - 1))
        return Band(bias, reach, line.unfold(1, length, 1).flip(1)[None])
    if reach == length:
        return None
    distance, near = _band_distances(reach, _rows(reach))
    mask = bias.detach()[:, distance.clamp(0, length - 1)].masked_fill(~near, -math.inf)
    return Band(bias, reach, mask.to(exact)[None])


class DistanceAttention(torch.autograd.Function):
    """Causal attention whose bias is a vector over distances; differentiable in the bias too."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, band: Band) -> Tensor:
        """Attend.

        Args:
            ctx: of autograd.
            q: (B, H, T, K), on the CPU.
            k: (B, H, T, K).
            v: (B, H, T, K).
            bias: `band.bias`, named for autograd.
            band: of `prepare_band`.

        Returns:
            (B, H, T, K).
        """
        scale = q.shape[-1] ** -0.5
        if band.whole:
            out, log_sum = kernel(q, k, v, True, band.mask, scale)
        else:
            out, log_sum = _near(q, k, v, band)
            far = band.saturation
            far_out, far_sum = kernel(q[:, :, far:], k[:, :, :-far], v[:, :, :-far], True, None, scale)
            far_sum = far_sum + bias[:, far, None]
            both = torch.logaddexp(log_sum[:, :, far:], far_sum)
            near_share = (log_sum[:, :, far:] - both).exp()[..., None]
            out[:, :, far:] = torch.lerp(far_out.to(out.dtype), out[:, :, far:], near_share.to(out.dtype))
            log_sum[:, :, far:] = both
            out = out.to(v.dtype)
        ctx.save_for_backward(q, k, v, bias, out, log_sum)
        ctx.band = Band(bias.detach(), band.saturation, band.mask)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, k, v and bias."""
        q, k, v, bias, out, log_sum = ctx.saved_tensors
        scale, far, band = q.shape[-1] ** -0.5, ctx.band.saturation, ctx.band
        if band.whole:
            grads = kernel_backward(grad_out, q, k, v, out, log_sum, True, band.mask, scale)
            if not ctx.needs_input_grad[3]:
                return *grads, None, None
            return *grads, _near_gradients(q, k, v, band, out, log_sum, grad_out, bias_only=True)[3], None
        grad_q, grad_k, grad_v, grad_bias = _near_gradients(q, k, v, band, out, log_sum, grad_out)
        far_q, far_k, far_v = kernel_backward(
            grad_out[:, :, far:], q[:, :, far:], k[:, :, :-far], v[:, :, :-far], out[:, :, far:],
            log_sum[:, :, far:] - bias[:, far, None], True, None, scale,
        )  # fmt: skip
        grad_q[:, :, far:] += far_q
        grad_k[:, :, :-far] += far_k
        grad_v[:, :, :-far] += far_v
        return grad_q, grad_k, grad_v, grad_bias, None


def _rows(reach: int) -> int:
    """R: rows of a block. At least the reach, so that a block sees keys of one block before it."""
    return max(reach, 64)


def _band_distances(reach: int, rows: int) -> tuple[Tensor, Tensor]:
    """Distance of row r of a block from its key w, (R, W), and whether it is near: in [0, reach)."""
    distance = torch.arange(rows)[:, None] + reach - torch.arange(reach + rows)
    return distance, (distance >= 0) & (distance < reach)


def _blocks(x: Tensor, rows: int, value: float = 0.0) -> Tensor:
    """(B, H, T, n) -> (B, H, blocks, R, n), padded at the end."""
    return F.pad(x, (0, 0, 0, -x.shape[2] % rows), value=value).unflatten(2, (-1, rows))


def _windows(x: Tensor, rows: int, reach: int) -> Tensor:
    """(B, H, T, n) -> (B, H, blocks, W, n): what each block can see, zeros before the first key."""
    return F.pad(x, (0, 0, reach, -x.shape[2] % rows)).unfold(2, reach + rows, rows).transpose(-2, -1)


def _near(q: Tensor, k: Tensor, v: Tensor, band: Band) -> tuple[Tensor, Tensor]:
    """Attention to near keys alone: output (B, H, T, K) in the mask's dtype, log of the sum of exponentials."""
    batch, _, length, head_dim = q.shape
    rows, reach = band.mask.shape[2], band.saturation
    scale = head_dim**-0.5

    def rest(x: Tensor) -> Tensor:  # blocks but the first, as a batch: (B, H, blocks, n, K) -> (B blocks, H, n, K)
        return x[:, :, 1:].transpose(1, 2).flatten(0, 1)

    # The first block has no keys before it; its causal part is the right-hand side of the mask.
    first_mask = band.mask[:, :, :, reach:]
    first_out, first_sum = kernel(q[:, :, :rows], k[:, :, :rows], v[:, :, :rows], False, first_mask, scale)
    out, log_sum = kernel(
        rest(_blocks(q, rows)),
        rest(_windows(k, rows, reach)),
        rest(_windows(v, rows, reach)),
        False,
        band.mask,
        scale,
    )
    out = out.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)
    log_sum = log_sum.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)
    out = torch.cat([first_out, out], dim=2)[:, :, :length].to(band.mask.dtype)
    return out, torch.cat([first_sum, log_sum], dim=2)[:, :, :length]


def _near_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    band: Band,
    out: Tensor,
    log_sum: Tensor,
    grad_out: Tensor,
    bias_only: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients through the scores of near keys: of q, k, v (empty if bias_only) and of the bias of each distance.

    That of the far keys' constant is minus the sum of the others.
    """
    length, scale, dtype = q.shape[2], q.shape[-1] ** -0.5, q.dtype
    num_heads, reach = len(band.bias), band.saturation
    rows = _rows(reach)
    exact = torch.promote_types(dtype, torch.float32)
    q, k, v, out, grad_out = (x.to(exact) for x in (q, k, v, out, grad_out))
    distance, near = _band_distances(reach, rows)
    mask = band.bias[:, distance.clamp(0, reach - 1)].to(exact).masked_fill(~near, -math.inf)[:, None]

    q_blocks, k_windows = _blocks(q, rows), _windows(k, rows, reach)
    grad_blocks, v_windows = _blocks(grad_out, rows), _windows(v, rows, reach)
    # Padded queries get no weight, and so do the keys before the first.
    weights = (
        (q_blocks @ k_windows.mT).mul_(scale).add_(mask).sub_(_blocks(log_sum[..., None], rows, math.inf)).exp_()
    )
    weights[:, :, 0, :, :reach] = 0
    total = _blocks((grad_out * out).sum(-1, keepdim=True), rows)
    grad_scores = (grad_blocks @ v_windows.mT).sub_(total).mul_(weights)

    summed = grad_scores.sum(0).sum(1).flatten(1)  # far faster than sum((0, 2))
    where = distance.clamp(0, reach - 1).flatten().expand(num_heads, -1)
    near_bias = summed.new_zeros(num_heads, reach).scatter_add_(1, where, summed)
    grad_bias = summed.new_zeros(num_heads, length + 1)
    grad_bias[:, :reach] = near_bias
    grad_bias[:, reach] = -near_bias.sum(1)
    grad_bias = grad_bias[:, :length].to(band.bias.dtype)
    if bias_only:
        return q.new_empty(0), q.new_empty(0), q.new_empty(0), grad_bias

    def fold(windows: Tensor) -> Tensor:  # the adjoint of _windows
        total = windows[..., reach:, :].clone()
        total[:, :, :-1, rows - reach :] += windows[:, :, 1:, :reach]
        return total.flatten(2, 3)[:, :, :length].to(dtype)

    grad_q = (grad_scores @ k_windows).mul_(scale).flatten(2, 3)[:, :, :length].to(dtype)
    grad_k = fold((grad_scores.mT @ q_blocks).mul_(scale))
    return grad_q, grad_k, fold(weights.mT @ grad_blocks), grad_bias
