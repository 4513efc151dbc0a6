"""torch's fused CPU attention kernel, called with what `scaled_dot_product_attention` does not pass on.

The public function refuses a mask together with `is_causal`, and takes its unfused path when the mask needs a
gradient. The kernel behind it has neither limit in its arithmetic, and reads a mask by its strides. `key_bias.py`
uses that for biases that depend on the key, `band.py` for biases that depend on distance.

Shape letters: B batch, T tokens (queries and keys), H heads, K head dim.
"""

from __future__ import annotations

import functools

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
    causal: bool,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel's gradients of q, k and v."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out, q, k, v, out, log_sum, 0.0, causal, attn_mask=mask, scale=scale
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
            got = kernel(q, k, v, True, row[None, :, None].expand(1, -1, 5, -1), 8**-0.5)[0]
            mine, theirs = (torch.autograd.grad(out.square().sum(), (q, k, v)) for out in (got, expected))
        except (AttributeError, RuntimeError, NotImplementedError, TypeError):
            return False
        close = functools.partial(torch.allclose, rtol=1e-4, atol=1e-5)
        return close(got, expected) and all(map(close, mine, theirs))
