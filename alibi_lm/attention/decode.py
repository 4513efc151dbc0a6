"""Attention of new tokens to the keys of a cache by the compiled kernel (`decode.cpp`): float32, on a CPU.

Shape letters: B batch, T queries (the last T tokens), S keys held, H heads, K head dim, N distances.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from alibi_lm.attention import native_library
from alibi_lm.attention.native_library import View

MARGIN = native_library.ROWS + 64
"""How many numbers the kernel may read past the end of a line."""


@dataclass
class Lines:
    """The bias of each head as the kernel reads it."""

    bias: Tensor
    """(H, N + MARGIN) float32, in powers of 2: the bias of distance d is at N - 1 - d; zeros past the end."""
    tails: Tensor | None
    """(H, N) float32: log2 of the sum of 2^(bias - bias at 0) over each distance and beyond; None: not known."""

    @classmethod
    def of(cls, bias: Tensor, tails: Tensor | None) -> Lines:
        """From the bias (H, N) and the natural logarithms of its tails (H, N)."""
        reversed_bias = torch.nn.functional.pad(bias.float().flip(1) / math.log(2), (0, MARGIN))
        # Rounding up, so that what follows from a tail stays an upper bound.
        known = None if tails is None else (tails / math.log(2) + 1e-5).float().contiguous()
        return cls(reversed_bias.contiguous(), known)

    @classmethod
    def alone(cls, bias: Tensor) -> Lines:
        """From the bias (H, N) of all distances that can occur."""
        line = bias.double()
        return cls.of(bias, line.flip(1).logcumsumexp(1).flip(1) - line[:, :1])


class HeldKeys:
    """Where the keys and values of each head are in memory, and how many; the same for all sequences of a batch.

    Attributes:
        table: (6, H) int64: addresses of the first key and value, floats from one sequence to the next, keys held,
            window, and keys of the stream that were dropped. The kernel reads it; the owner keeps the last three
            rows up to date.
        step: floats from one key to the next.
    """

    def __init__(self, num_heads: int, step: int) -> None:
        self.table = np.zeros((6, num_heads), dtype=np.int64)
        self.step = step
        self.keys, self.windows, self.missing = self.table[3:]

    def place(self, heads: list[int], k: Tensor, v: Tensor) -> None:
        """Set where some heads have their keys: k, v (B, len(heads), capacity, K) float32, with equal strides."""
        offsets = 4 * k.stride(1) * np.arange(len(heads))
        self.table[0, heads], self.table[1, heads] = k.data_ptr() + offsets, v.data_ptr() + offsets
        self.table[2, heads] = k.stride(0)


class _Call(ctypes.Structure):
    """`struct Decode` of decode.cpp, field by field."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("B", "H", "T", "K", "threads", "length", "step")),
        ("scale", ctypes.c_float),
        *((name, View) for name in ("q", "out", "new_k", "new_v")),
        *((name, ctypes.c_void_p) for name in ("k", "v", "step_b", "keys", "windows", "missing")),
        *((name, ctypes.c_void_p) for name in ("lines", "tails", "norms", "lost")),
    ]


def decode(
    q: Tensor,
    held: HeldKeys,
    lines: Lines | None,
    new: tuple[Tensor, Tensor] | None = None,
    norms: Tensor | None = None,
    lost: Tensor | None = None,
) -> Tensor:
    """Attend from the last T tokens.

    Args:
        q: (B, H, T, K) float32 on the CPU.
        held: the keys; those of the T tokens are the last ones.
        lines: the bias of at least as many distances as keys are held; None: no bias.
        new: keys and values (B, H, T, K) of the T tokens, to be stored first; None: they are already there.
        norms: (B, H) float32, the largest norm of a key so far, updated in place.
        lost: (B, H, T) float32, filled with log2 of an upper bound on the share of attention that keys outside
            the window, or no longer held, would have had. Needs `norms` and the tails of `lines`.

    Returns:
        (B, H, T, K).
    """
    batch, heads, tokens, dim = q.shape
    out = q.new_empty(batch, tokens, heads, dim).transpose(1, 2)
    length = 0 if lines is None else lines.bias.shape[1] - MARGIN
    call = _Call(batch, heads, tokens, dim, torch.get_num_threads(), length, held.step, dim**-0.5)
    for index, name in enumerate(("k", "v", "step_b", "keys", "windows", "missing")):
        setattr(call, name, held.table.ctypes.data + index * held.table.strides[0])
    bias, tails = (None, None) if lines is None else (lines.bias, lines.tails)
    views = {"q": q, "new_k": None if new is None else new[0], "new_v": None if new is None else new[1]}
    views = {name: x if x is None or x.stride(-1) == 1 else x.contiguous() for name, x in views.items()}
    tensors = views | {"out": out, "lines": bias, "tails": tails, "norms": norms, "lost": lost}
    native_library.run("decode", call, tensors)
    return out
