"""torch's fused CPU attention kernel, called with what `scaled_dot_product_attention` does not pass on.

The public function refuses a mask together with `is_causal`, and takes its unfused path when the mask needs a
gradient. The kernel behind it has neither limit in its arithmetic. `attend_key_bias` uses that: causal skipping,
and an additive row per key, broadcast over the queries with stride 0. That is ALiBi at the price of plain causal
attention, without any (T, T) tensor. `band.py` uses it for biases that depend on distance.

Shape letters: B batch, T tokens (queries and keys), H heads, K head dim.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor


def kernel(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The kernel: (output (B, H, T, K), log of the sum of exponentials (B, H, T))."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=mask, scale=scale
    )


def kernel_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sum: Tensor,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel's gradients of q, k, v for causal attention with an additive mask."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out, q, k, v, out, log_sum, 0.0, True, attn_mask=mask, scale=scale
    )


@functools.cache
def available() -> bool:
    """Whether this build of torch has the kernel, and it computes what this module relies on.

    The operator is not part of torch's public interface, so it is tried once, on five tokens.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    with (
        torch.device("cpu"),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
    ):
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
    if torch.compiler.is_compiling():
        return _opaque(q, k, v, key_bias)[0]
    return kernel(q, k, v, True, _row_mask(q, key_bias), q.shape[-1] ** -0.5)[0]


def _row_mask(q: Tensor, key_bias: Tensor) -> Tensor:
    """(1, H, T, T) with stride 0 over the queries."""
    return key_bias[None, :, None, :].expand(1, -1, q.shape[2], -1)


# A compiler would write the expanded mask out before calling the kernel: it sees these two operators instead.
@torch.library.custom_op("alibi_lm::attend_key_bias", mutates_args=())
def _opaque(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor) -> tuple[Tensor, Tensor]:
    out, log_sum = kernel(q, k, v, True, _row_mask(q, key_bias), q.shape[-1] ** -0.5)
    return out.transpose(1, 2).contiguous().transpose(1, 2), log_sum.contiguous()


@torch.library.custom_op("alibi_lm::attend_key_bias_backward", mutates_args=())
def _opaque_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor, out: Tensor, log_sum: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grads = kernel_backward(grad, q, k, v, out, log_sum, _row_mask(q, key_bias), q.shape[-1] ** -0.5)
    dq, dk, dv = (g.transpose(1, 2).contiguous().transpose(1, 2) for g in grads)
    return dq, dk, dv


@_opaque.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor) -> tuple[Tensor, Tensor]:
    return _by_tokens(q), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


@_opaque_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor, out: Tensor, log_sum: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _by_tokens(q), _by_tokens(k), _by_tokens(v)


def _by_tokens(x: Tensor) -> Tensor:
    """(B, H, T, K), empty, in the kernel's order of memory: tokens before heads."""
    batch, heads, tokens, dim = x.shape
    return x.new_empty(batch, tokens, heads, dim).transpose(1, 2)


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    return *_opaque_backward(grad, *ctx.saved_tensors), None


_opaque.register_autograd(_differentiate, setup_context=_setup_context)
