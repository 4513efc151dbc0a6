"""Attention on the CPU by a kernel of this package, compiled for the machine's processor (`native.cpp`).

It serves every pass in float32 whose bias, if any, depends on head and distance: no bias, ALiBi, T5, and any
scheme that defines `PositionScheme.distance_bias`, trained or not; with or without a window; with a cache too
(`decode.py`), without gradients then. What it does not serve goes to `sdpa`: other devices and dtypes, dropout of
attention weights, positions with gaps.

Shape letters: B batch, T tokens (queries and keys), H heads, K head dim, N blocks of queries.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from alibi_lm.attention import native_library
from alibi_lm.attention.base import Attend, AttentionBackend, Request, equal_widths, more_than_a_bias
from alibi_lm.attention.decode import HeldKeys, Lines, decode
from alibi_lm.positions.base import PositionScheme


class NativeAttention(AttentionBackend):
    """The compiled kernel; `why_not` says whether there is one."""

    name = "native"

    def refuses_scheme(self, scheme: PositionScheme) -> str:
        if scheme.defines("content_bias", "content_key_bias"):
            return "it needs the full score matrix"
        return more_than_a_bias(scheme) or (
            "its bias is more than a function of distance" if scheme.defines("bias") else ""
        )

    def refuses(self, scheme: PositionScheme, request: Request) -> str:
        if not request.k_pos.is_cpu:
            return "the kernel runs on a CPU"
        if request.dtype != torch.float32:
            return f"the kernel computes in float32, not in {str(request.dtype).removeprefix('torch.')}"
        if request.dropout:
            return f"model.attention_dropout = {request.dropout}, and the kernel drops no attention weights"
        if not request.whole and torch.is_grad_enabled():
            return "cached decoding has no gradients"
        if not request.whole and scheme.defines("content_key_bias"):
            return "cached decoding has no bias per key"
        if request.gaps and (scheme.defines("distance_bias") or request.window is not None):
            return "the positions have gaps"
        return ""

    def __init__(self) -> None:
        self.lines: WeakKeyDictionary[PositionScheme, tuple[Any, Lines]] = WeakKeyDictionary()

    def prepare(self, scheme: PositionScheme, request: Request) -> Attend:
        tokens = len(request.k_pos)
        if not request.whole:
            lines = self._lines(scheme, tokens) if scheme.defines("distance_bias") else None
            return equal_widths(lambda q, k, v, x: attend_to_cache(q, k, v, lines, request.window or tokens))
        bias, window = scheme.distance_bias(torch.arange(tokens)), request.window or tokens
        return equal_widths(lambda q, k, v, x: attend(q, k, v, bias, window))

    def _lines(self, scheme: PositionScheme, tokens: int) -> Lines | None:
        """The bias of at least `tokens` distances, kept until the scheme's parameters change."""
        state = [(id(p), p._version) for p in scheme.parameters()]
        known = self.lines.get(scheme)
        if known is None or known[0][1] != state or known[0][0] < tokens:
            length = 1 << (tokens - 1).bit_length()
            bias = scheme.distance_bias(torch.arange(length))
            if bias is None:
                return None
            known = self.lines[scheme] = ((length, state), Lines.alone(bias.detach()))
        return known[1]


def attend_to_cache(q: Tensor, k: Tensor, v: Tensor, lines: Lines | None, window: int) -> Tensor:
    """Attention of the last T of S tokens: q (B, H, T, K), k and v (B, H, S, K) float32 -> (B, H, T, K)."""
    k, v = (k, v) if k.stride() == v.stride() and k.stride(-1) == 1 else (k.contiguous(), v.contiguous())
    held = HeldKeys(k.shape[1], k.stride(2))
    held.place(list(range(k.shape[1])), k, v)
    held.keys[:], held.windows[:] = k.shape[2], window
    return decode(q, held, lines)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, window: int) -> Tensor:
    """Causal attention with a bias per head and distance.

    Args:
        q: (B, H, T, K) float32 on the CPU.
        k: (B, H, T, K).
        v: (B, H, T, K).
        bias: (H, T) float32, of distances 0 to T - 1; None: no bias.
        window: a query sees the keys at distances below it; at least 1.

    Returns:
        (B, H, T, K).

    Raises:
        ValueError: tensors of other shapes, dtypes or devices; the kernel would read past their ends.
    """
    _check(q, k, v, bias)
    # The kernel reads each vector as a run of numbers, whatever its stride.
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    # The first call of an operator loads the whole of the compiler, which takes longer than all else at a start.
    run = _operator if torch.compiler.is_compiling() else _Attention.apply
    return run(q, k, v, bias, window)[0]


def _check(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> None:
    for name, x, shape in (("q", q, q.shape), ("k", k, q.shape), ("v", v, q.shape), ("bias", bias, q.shape[1:3])):
        if x is not None and not (x.is_cpu and x.dtype == torch.float32 and x.shape == shape):
            raise ValueError(
                f"attention = native got {name} of shape {tuple(x.shape)}, {x.dtype}, on {x.device.type}. "
                f"It takes {tuple(shape)}, torch.float32, on the CPU"
                + (": that is what a scheme's distance_bias gives." if name == "bias" else ".")
            )


@functools.cache
def why_not() -> str:
    """Why the kernel does not serve here; empty where it does.

    It is tried once: 70 tokens, more than a tile of queries or of keys, with a bias and without.
    """
    library = native_library.find()
    if isinstance(library, str):
        return library
    with (  # whatever the caller has chosen
        torch.device("cpu"),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
    ):
        generator = torch.Generator("cpu").manual_seed(0)
        q, k, v = (
            torch.randn(1, 2, 70, 10, generator=generator, dtype=torch.float32, requires_grad=True)
            for _ in range(3)
        )
        slopes = torch.tensor([[0.5], [0.01]], dtype=torch.float32, requires_grad=True)
        bias = -slopes * torch.arange(70)
        distance = torch.arange(70)[:, None] - torch.arange(70)
        for given, window in ((None, 70), (bias, 70), (bias, 7)):
            scores = q @ k.mT * 10**-0.5 + (0 if given is None else given[:, distance.clamp_min(0)])
            expected = scores.masked_fill((distance < 0) | (distance >= window), -math.inf).softmax(-1) @ v
            try:
                got = attend(q, k, v, given, window)
            except (AttributeError, RuntimeError) as error:
                return f"what was compiled cannot be called ({error})"
            leaves = [q, k, v] if given is None else [q, k, v, slopes]
            mine, theirs = (
                torch.autograd.grad(out.square().sum(), leaves, retain_graph=True) for out in (got, expected)
            )
            for x, y in zip((got, *mine), (expected, *theirs), strict=True):
                if not torch.allclose(x, y, rtol=1e-3, atol=1e-4):
                    return "what was compiled does not compute attention"
    return ""


class _View(ctypes.Structure):
    """A (B, H, T, K) tensor whose last dimension lies in one run."""

    _fields_ = [("data", ctypes.c_void_p), *((f"step_{n}", ctypes.c_int64) for n in "bht")]


class _Call(ctypes.Structure):
    """What a call of the kernel hands over: `struct Call` of native.cpp, field by field."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("B", "H", "T", "K", "threads", "window")),
        ("scale", ctypes.c_float),
        *((name, _View) for name in ("q", "k", "v", "out")),
        *((name, ctypes.c_void_p) for name in ("bias", "log_sum", "reach")),
        *((name, _View) for name in ("grad_out", "grad_q", "grad_k", "grad_v")),
        ("grad_bias", ctypes.c_void_p),
    ]


def _run(function: str, q: Tensor, window: int, **tensors: Tensor | None) -> None:
    """Call the kernel; every tensor must be float32 (reach: int64), and alive until this returns."""
    batch, heads, tokens, dim = q.shape
    library = native_library.find()
    assert not isinstance(library, str)
    call = _Call(batch, heads, tokens, dim, torch.get_num_threads(), window, dim**-0.5)
    for name, x in {"q": q, **tensors}.items():
        if x is not None:
            is_view = isinstance(getattr(call, name), _View)
            setattr(call, name, _View(x.data_ptr(), *x.stride()[:3]) if is_view else x.data_ptr())
    if getattr(library, function)(ctypes.byref(call)):
        raise RuntimeError(f"attention = native: no memory for {batch} x {heads} heads of {tokens} tokens.")


def forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, window: int) -> tuple[Tensor, Tensor, Tensor]:
    """Attend: output (B, H, T, K), log2 of the sum of exponentials (B, H, T), distances that count (B, H, N)."""
    out, log_sum, reach = _results(q)
    bias = None if bias is None else bias.contiguous()
    _run("forward", q, window, k=k, v=v, out=out, bias=bias, log_sum=log_sum, reach=reach)
    return out, log_sum, reach


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    window: int,
    out: Tensor,
    log_sum: Tensor,
    reach: Tensor,
    of_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, and of the bias (H, T) if `of_bias`, else empty; from what `forward` returned."""
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    bias = None if bias is None else bias.contiguous()
    grad_q, grad_k, grad_v = (_empty_like(x) for x in (q, k, v))
    grad_bias = q.new_empty(q.shape[:3]) if of_bias else None
    _run(
        "backward", q, window, k=k, v=v, out=out, bias=bias, log_sum=log_sum, reach=reach,
        grad_out=grad, grad_q=grad_q, grad_k=grad_k, grad_v=grad_v, grad_bias=grad_bias,
    )  # fmt: skip
    return grad_q, grad_k, grad_v, q.new_empty(0) if grad_bias is None else grad_bias.sum(0)


def _empty_like(x: Tensor) -> Tensor:
    """(B, H, T, K) with tokens before heads in memory: heads then join to one vector without a copy."""
    batch, heads, tokens, dim = x.shape
    return x.new_empty(batch, tokens, heads, dim).transpose(1, 2)


def _results(q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    blocks = (q.shape[2] + native_library.ROWS - 1) // native_library.ROWS
    return (
        _empty_like(q),
        q.new_empty(q.shape[:3]),
        q.new_empty((*q.shape[:2], blocks), dtype=torch.int64),
    )


# A compiler sees these two operators as they are. Its cache on disk knows them by name: another signature needs
# another name.
_operator = torch.library.custom_op("alibi_lm::native_attention", forward, mutates_args=())
_operator_backward = torch.library.custom_op("alibi_lm::native_attention_backward", backward, mutates_args=())


@_operator.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _results(q)


@_operator_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_bias = q.new_empty(q.shape[1:3]) if rest[-1] else q.new_empty(0)
    return _empty_like(q), _empty_like(k), _empty_like(v), grad_bias


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, bias, ctx.window = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(q, k, v, *([bias] if ctx.has_bias else []), *output)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, run: Callable[..., tuple[Tensor, ...]], grad: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, *rest = ctx.saved_tensors
    bias = rest.pop(0) if ctx.has_bias else None
    of_bias = ctx.needs_input_grad[3]
    *grads, grad_bias = run(grad, q, k, v, bias, ctx.window, *rest, of_bias)
    return *grads, grad_bias if of_bias else None, None


_operator.register_autograd(lambda ctx, grad, *_: _gradients(ctx, _operator_backward, grad), setup_context=_save)


class _Attention(torch.autograd.Function):
    forward = staticmethod(forward)
    setup_context = staticmethod(_save)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, backward, grad)
