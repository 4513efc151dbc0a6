"""Attention on the CPU by a kernel of this package, compiled for the machine's processor (`native.cpp`).

It serves every pass in float32 whose bias, if any, depends on head and distance (a scheme's `distance_bias`:
ALiBi, T5 and others), trained or not; with or without a window; also with a cache (`decode.py`), then without
gradients. A full pass may have a bias per key that depends on content (`content_key_bias`: forget gates). Other
passes go to `sdpa`: other devices and dtypes, dropout of attention weights, positions with gaps.

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
from alibi_lm.attention.native_library import View
from alibi_lm.positions.base import PositionScheme


class NativeAttention(AttentionBackend):
    """The compiled kernel; `why_not` says whether it is available."""

    name = "native"

    def refuses_scheme(self, scheme: PositionScheme) -> str:
        if scheme.defines("content_bias"):
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
        self.lines: WeakKeyDictionary[PositionScheme, tuple[int, list[Tensor], Lines]] = WeakKeyDictionary()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        # What is kept between passes stays in this process: a model can be pickled.
        return type(self), ()

    def prepare(self, scheme: PositionScheme, request: Request) -> Attend:
        tokens = len(request.k_pos)
        if not request.whole:
            lines = self._lines(scheme, tokens) if scheme.defines("distance_bias") else None
            return equal_widths(lambda q, k, v, x: attend_to_cache(q, k, v, lines, request.window or tokens))
        bias, window = scheme.distance_bias(torch.arange(tokens)), request.window or tokens
        return equal_widths(
            lambda q, k, v, x: attend(q, k, v, bias, window, scheme.content_key_bias(x, request.k_pos))
        )

    def _lines(self, scheme: PositionScheme, tokens: int) -> Lines | None:
        """The bias of at least `tokens` distances, kept until the scheme's parameters change."""
        # Compared by value: the version of a tensor tells of no change through `.data`, or in inference mode.
        now, known = [p.detach() for p in scheme.parameters()], self.lines.get(scheme)
        if known is None or known[0] < tokens or not all(map(torch.equal, known[1], now)):
            length = 1 << (tokens - 1).bit_length()
            bias = scheme.distance_bias(torch.arange(length))
            if bias is None:
                return None
            known = self.lines[scheme] = (length, [p.clone() for p in now], Lines.alone(bias.detach()))
        return known[2]


def attend_to_cache(q: Tensor, k: Tensor, v: Tensor, lines: Lines | None, window: int) -> Tensor:
    """Attention of the last T of S tokens: q (B, H, T, K), k and v (B, H, S, K) float32 -> (B, H, T, K)."""
    k, v = (k, v) if k.stride() == v.stride() and k.stride(-1) == 1 else (k.contiguous(), v.contiguous())
    held = HeldKeys(k.shape[1], k.stride(2))
    held.place(list(range(k.shape[1])), k, v)
    held.keys[:], held.windows[:] = k.shape[2], window
    return decode(q, held, lines)


def attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, window: int, key_bias: Tensor | None = None
) -> Tensor:
    """Causal attention with a bias per head and distance, and a bias per key.

    Args:
        q: (B, H, T, K) float32 on the CPU.
        k: (B, H, T, K).
        v: (B, H, T, K).
        bias: (H, T) float32, of distances 0 to T - 1; None: no bias.
        window: a query sees the keys at distances below it; at least 1.
        key_bias: (B, H, T) float64, one number per key, up to a constant; None: no such bias.

    Returns:
        (B, H, T, K).

    Raises:
        ValueError: tensors of other shapes, dtypes or devices, for which the kernel would read past their ends.
    """
    _check(q, k, v, bias, key_bias)
    # The kernel ignores strides and reads each vector as contiguous numbers.
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    # The first call of a custom operator loads torch's whole compiler, which would dominate the start-up time.
    run = _operator if torch.compiler.is_compiling() else _Attention.apply
    return run(q, k, v, bias, window, key_bias)[0]


HOOKS = {"bias": "distance_bias", "key_bias": "content_key_bias"}


def _check(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, key_bias: Tensor | None) -> None:
    for name, x, shape, dtype in (
        *((name, x, q.shape, torch.float32) for name, x in (("q", q), ("k", k), ("v", v))),
        ("bias", bias, q.shape[1:3], torch.float32),
        ("key_bias", key_bias, q.shape[:3], torch.float64),
    ):
        if x is not None and not (x.is_cpu and x.dtype == dtype and x.shape == shape):
            raise ValueError(
                f"attention = native got {name} of shape {tuple(x.shape)}, {x.dtype}, on {x.device.type}. "
                f"It takes {tuple(shape)}, {dtype}, on the CPU"
                + (f": that is what a scheme's {HOOKS[name]} gives." if name in HOOKS else ".")
            )


@functools.cache
def why_not() -> str:
    """Why the kernel is not available here; empty if it is.

    It is tried once, on 70 tokens (more than a tile of queries or of keys), with each kind of bias and without.
    """
    library = native_library.find()
    if isinstance(library, str):
        return library
    with (  # independent of the caller's choices
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
        of_keys = (slopes * torch.arange(70)).double()[None]
        for given, window, by_key in ((None, 70, None), (bias, 70, None), (bias, 7, None), (None, 70, of_keys)):
            scores = q @ k.mT * 10**-0.5 + (0 if given is None else given[:, distance.clamp_min(0)])
            scores = scores if by_key is None else scores + by_key.float()[:, :, None]
            expected = scores.masked_fill((distance < 0) | (distance >= window), -math.inf).softmax(-1) @ v
            try:
                got = attend(q, k, v, given, window, by_key)
            except (AttributeError, RuntimeError) as error:
                return f"what was compiled cannot be called ({error})"
            leaves = [q, k, v] if given is None and by_key is None else [q, k, v, slopes]
            mine, theirs = (
                torch.autograd.grad(out.square().sum(), leaves, retain_graph=True) for out in (got, expected)
            )
            for x, y in zip((got, *mine), (expected, *theirs), strict=True):
                if not torch.allclose(x, y, rtol=1e-3, atol=1e-4):
                    return "what was compiled does not compute attention"
    return ""


class _Call(ctypes.Structure):
    """The arguments of a kernel call: `struct Call` of native.cpp, field by field."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("B", "H", "T", "K", "threads", "window")),
        ("scale", ctypes.c_float),
        *((name, View) for name in ("q", "k", "v", "out")),
        *((name, ctypes.c_void_p) for name in ("bias", "log_sum", "reach", "key_bias")),
        *((name, View) for name in ("grad_out", "grad_q", "grad_k", "grad_v")),
        *((name, ctypes.c_void_p) for name in ("grad_bias", "grad_key_bias")),
    ]


def _run(function: str, q: Tensor, window: int, **tensors: Tensor | None) -> None:
    """Call the kernel; tensors must be float32 (reach: int64, key_bias: float64) and alive until this returns."""
    call = _Call(*q.shape, torch.get_num_threads(), window, q.shape[-1] ** -0.5)
    native_library.run(function, call, {"q": q, **tensors})


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, window: int, key_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend: output (B, H, T, K), log2 of the sum of exponentials (B, H, T), reach in distances (B, H, N)."""
    out, log_sum, reach = _results(q)
    bias, key_bias = _contiguous(bias), _contiguous(key_bias)
    _run("forward", q, window, k=k, v=v, out=out, bias=bias, log_sum=log_sum, reach=reach, key_bias=key_bias)
    return out, log_sum, reach


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    window: int,
    key_bias: Tensor | None,
    out: Tensor,
    log_sum: Tensor,
    reach: Tensor,
    of_bias: bool,
    of_key_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, the bias (H, T) and the key bias (B, H, T) float64, from what `forward` returned.

    The gradients of biases are empty unless asked for.
    """
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    bias, key_bias = _contiguous(bias), _contiguous(key_bias)
    grad_q, grad_k, grad_v = (_empty_like(x) for x in (q, k, v))
    grad_bias = q.new_empty(q.shape[:3]) if of_bias else None
    grad_key_bias = q.new_empty(q.shape[:3]) if of_key_bias else None
    _run(
        "backward", q, window, k=k, v=v, out=out, bias=bias, log_sum=log_sum, reach=reach, key_bias=key_bias,
        grad_out=grad, grad_q=grad_q, grad_k=grad_k, grad_v=grad_v, grad_bias=grad_bias,
        grad_key_bias=grad_key_bias,
    )  # fmt: skip
    empty = q.new_empty(0)
    of_distances = empty if grad_bias is None else grad_bias.sum(0)
    return grad_q, grad_k, grad_v, of_distances, (empty if grad_key_bias is None else grad_key_bias).double()


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _empty_like(x: Tensor) -> Tensor:
    """(B, H, T, K) with tokens before heads in memory, so that heads can be joined without a copy."""
    batch, heads, tokens, dim = x.shape
    return x.new_empty(batch, tokens, heads, dim).transpose(1, 2)


def _results(q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    blocks = (q.shape[2] + native_library.ROWS - 1) // native_library.ROWS
    return (
        _empty_like(q),
        q.new_empty(q.shape[:3]),
        q.new_empty((*q.shape[:2], blocks), dtype=torch.int64),
    )


# torch's compiler treats these two operators as opaque. Its cache on disk knows them by name, so another signature
# needs another name.
_operator = torch.library.custom_op("alibi_lm::attention", forward, mutates_args=())
_operator_backward = torch.library.custom_op("alibi_lm::attention_backward", backward, mutates_args=())


@_operator.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _results(q)


@_operator_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    grad_bias = q.new_empty(q.shape[1:3]) if rest[-2] else q.new_empty(0)
    grad_key_bias = q.new_empty(q.shape[:3] if rest[-1] else 0, dtype=torch.float64)
    return _empty_like(q), _empty_like(k), _empty_like(v), grad_bias, grad_key_bias


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, bias, ctx.window, key_bias = inputs
    ctx.has = bias is not None, key_bias is not None
    ctx.save_for_backward(q, k, v, *(x for x in (bias, key_bias) if x is not None), *output)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, run: Callable[..., tuple[Tensor, ...]], grad: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, *rest = ctx.saved_tensors
    bias, key_bias = (rest.pop(0) if given else None for given in ctx.has)
    of_bias, of_key_bias = ctx.needs_input_grad[3], ctx.needs_input_grad[5]
    *grads, grad_bias, grad_key_bias = run(grad, q, k, v, bias, ctx.window, key_bias, *rest, of_bias, of_key_bias)
    return *grads, grad_bias if of_bias else None, None, grad_key_bias if of_key_bias else None


_operator.register_autograd(lambda ctx, grad, *_: _gradients(ctx, _operator_backward, grad), setup_context=_save)


class _Attention(torch.autograd.Function):
    forward = staticmethod(forward)
    setup_context = staticmethod(_save)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, backward, grad)
