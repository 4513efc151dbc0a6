"""The cross-entropy of a linear layer's scores, without holding the scores of a whole batch.

    nats_n = log sum_w exp(hidden_n . table_w) - hidden_n . table_target(n)

Rows are processed in chunks, each overwritten in place: scores, log-probabilities, probabilities, gradient of the
scores. If a batch's probabilities fit KEPT_ELEMENTS they are kept for the backward pass, else it computes them
again. Both are exact, and faster than scores, softmax and loss one after the other.

Shape letters: N tokens, D model dim, V vocabulary.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

HALF = (torch.bfloat16, torch.float16)
CHUNK_ELEMENTS = 1 << 23
"""Scores per chunk: 32 MiB of float32, which fit a CPU's last-level cache and a GPU's L2."""
FEWEST_ROWS = 512
"""Smallest number of rows per chunk: with 256 the loss takes 1.12 times as long to train, with 64 1.68 times."""
KEPT_ELEMENTS = 1 << 28
"""Number of probabilities that a CPU keeps for the backward pass: 1 GiB of float32."""
KEPT_SHARE = 0.1
"""Share of a GPU's memory for the same: 8 GiB of 80, which holds 100,000 targets among 20,000 words."""
ALIGNED = 64
"""On a GPU, half-precision products whose sizes are not multiples of this use slower kernels."""


def linear_cross_entropy(
    hidden: Tensor,
    table: Tensor,
    targets: Tensor,
    *,
    rows: int | None = None,
    keep: bool | None = None,
    multiple: int | None = None,
) -> Tensor:
    """Minus the natural logarithm of each target's probability under softmax(hidden table^T).

    Scores and sums are float32 or better for arguments of any dtype; inside autocast the factors of the products
    are rounded to its dtype.

    Args:
        hidden: (N, D).
        table: (V, D).
        targets: (N,) int64, in [0, V).
        rows: rows whose scores are computed at once; None: `chunk_rows`.
        keep: whether probabilities are kept for the backward pass; None: if they fit.
        multiple: the table is padded to a multiple of this many rows; the padding has scores of -inf and does not
            change the result. None: ALIGNED for half precision on a GPU, else 1.

    Returns:
        (N,) float32 (float64 for float64 arguments).
    """
    device = hidden.device.type
    hidden, table = _in_autocast_dtype(hidden, table)
    if multiple is None:
        multiple = ALIGNED if device == "cuda" and hidden.dtype in HALF else 1
    with torch.autocast(device, enabled=False):
        words = len(table)
        if words % multiple:
            table = F.pad(table, (0, 0, 0, -words % multiple))
        if keep is None:
            keep = len(hidden) * len(table) <= _kept_elements(hidden.device)
        # A parameter requires a gradient in evaluation too, and inside `forward` gradients are always off.
        keep = keep and torch.is_grad_enabled()
        return _LinearCrossEntropy.apply(hidden, table, targets, words, rows or chunk_rows(len(table)), keep)


def scores(hidden: Tensor, table: Tensor) -> Tensor:
    """The scores of `linear_cross_entropy`, all at once and with gradients: (..., D), (V, D) -> (..., V).

    Factors of half precision are rounded, their products and sums are not.
    """
    hidden, table = _in_autocast_dtype(hidden, table)
    exact = torch.promote_types(hidden.dtype, torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        return F.linear(hidden.to(exact), table.to(exact))


def first_choices(hidden: Tensor, table: Tensor) -> Tensor:
    """The word with the largest score in each row, chunk by chunk: (N, D), (V, D) -> (N,) int64. No gradient."""
    hidden, table = _in_autocast_dtype(hidden, table)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        return torch.cat([_scores(h, table).argmax(1) for h in hidden.split(chunk_rows(len(table)))])


def chunk_rows(words: int) -> int:
    """Rows whose scores are computed at once."""
    return max(FEWEST_ROWS, CHUNK_ELEMENTS // words)


def _in_autocast_dtype(hidden: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    device = hidden.device.type
    if not torch.is_autocast_enabled(device):
        return hidden, table
    dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), table.to(dtype)


def _kept_elements(device: torch.device) -> int:
    if device.type != "cuda":
        return KEPT_ELEMENTS
    return int(torch.cuda.get_device_properties(device).total_memory * KEPT_SHARE / 4)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, table: Tensor, targets: Tensor, words: int, rows: int, keep: bool
    ) -> Tensor:
        keep = keep and any(ctx.needs_input_grad[:2])
        nats, kept = [], []
        for h, t in zip(hidden.split(rows), targets.split(rows), strict=True):
            log_probs = _log_probs(h, table, words)
            nats.append(-log_probs.gather(1, t[:, None])[:, 0])
            if keep:
                kept.append(log_probs.exp_())
            del log_probs  # the next chunk reuses its memory, which is in the cache
        ctx.save_for_backward(hidden, table, targets)
        ctx.words, ctx.rows, ctx.kept = words, rows, kept
        return torch.cat(nats)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, table, targets = ctx.saved_tensors
        # Kept probabilities are overwritten below; a second pass through the same graph computes them again.
        kept, ctx.kept = ctx.kept, []
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_table: Tensor | None = None
        # Half precision would round the sum over chunks away.
        sum_dtype = torch.promote_types(table.dtype, torch.float32)
        for chunk, start in enumerate(range(0, len(hidden), ctx.rows)):
            rows = slice(start, start + ctx.rows)
            h, t, g = hidden[rows], targets[rows, None], grad[rows, None]
            probs = kept[chunk] if kept else _log_probs(h, table, ctx.words).exp_()
            # The gradient of the scores is g times this; g multiplies the smaller factor of both products.
            scores = probs.scatter_add_(1, t, -torch.ones_like(g)).to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(scores, table, out=grad_hidden[rows]).mul_(g)
            if ctx.needs_input_grad[1]:
                h = (h * g).to(h.dtype)
                if grad_table is None:
                    grad_table = (scores.t() @ h).to(sum_dtype)
                elif sum_dtype == h.dtype:
                    grad_table.addmm_(scores.t(), h)
                else:
                    grad_table += scores.t() @ h
        if grad_table is None and ctx.needs_input_grad[1]:
            grad_table = torch.zeros_like(table)
        return grad_hidden, None if grad_table is None else grad_table.to(table.dtype), None, None, None, None


def _log_probs(hidden: Tensor, table: Tensor, words: int) -> Tensor:
    """(N, D), (V, D) -> (N, V) natural logarithms, -inf past `words`, float32 or better, no gradient."""
    scores = _scores(hidden, table)
    scores[:, words:] = -math.inf
    return torch.log_softmax(scores, dim=1, out=scores)


def _scores(hidden: Tensor, table: Tensor) -> Tensor:
    """(N, D), (V, D) -> (N, V), float32 or better, no gradient: 8 bits would change a loss by 0.05 nats."""
    if hidden.dtype not in HALF:
        return F.linear(hidden, table)
    if _half_products_in_float32(hidden.device.type, hidden.dtype):
        return torch.mm(hidden, table.t(), out_dtype=torch.float32)
    return F.linear(hidden.float(), table.float())


@functools.cache
def _half_products_in_float32(device: str, dtype: torch.dtype) -> bool:
    """Whether a product of half-precision matrices can leave its float32 sums unrounded here."""
    ones = torch.ones(16, 16, device=device, dtype=dtype)
    try:
        return torch.mm(ones, ones, out_dtype=torch.float32).dtype == torch.float32
    except (TypeError, RuntimeError, NotImplementedError):
        return False
