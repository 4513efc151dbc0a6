"""torch's fused CPU attention kernel, called with what `scaled_dot_product_attention` does not pass on.

The public function refuses a mask together with `is_causal`, and takes its unfused path when the mask needs a
gradient. The kernel behind it has neither limit in its arithmetic, and reads a mask by its strides. `key_bias.py`
uses that for biases that depend on the key, `band.py` for biases that depend on distance.

Shape letters: B batch, T tokens (queries and keys), H heads, K head dim.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from alibi_lm.attention.base import trial


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
    """Whether this build of torch has the kernel, and it computes what is relied on here.

    The operator is not part of torch's public interface, so it is tried once: causal with a row of stride 0, and
    queries in blocks whose keys are overlapping views.
    """
    with trial() as generator:
        q, k, v = (torch.randn(1, 2, 6, 8, generator=generator, requires_grad=True) for _ in range(3))
        row = torch.randn(2, 6, generator=generator)[None, :, None].expand(1, -1, 6, -1)
        block = torch.randn(2, 4, generator=generator)
        block[0, 3] = -math.inf

        # The first head's last four queries in two blocks of two, each with the four keys up to its own last.
        q_blocks = q[:, 0, 2:].unflatten(1, (2, 2))
        k_blocks, v_blocks = (x[:, 0].unfold(1, 4, 2).transpose(-2, -1) for x in (k, v))
        calls = ((q, k, v, True, row), (q_blocks, k_blocks, v_blocks, False, block.expand(1, 2, -1, -1)))
        for queries, keys, values, causal, mask in calls:
            scores = queries @ keys.mT * 8**-0.5 + mask
            if causal:
                scores = scores.masked_fill(torch.ones(6, 6, dtype=torch.bool).triu(1), -math.inf)
            expected = scores.softmax(-1) @ values
            try:
                got = kernel(queries, keys, values, causal, mask, 8**-0.5)[0]
                mine, theirs = (torch.autograd.grad(out.square().sum(), (q, k, v)) for out in (got, expected))
            except (AttributeError, RuntimeError, NotImplementedError, TypeError):
                return False
            close = functools.partial(torch.allclose, rtol=1e-4, atol=1e-5)
            if not (close(got, expected) and all(map(close, mine, theirs))):
                return False
        return True
