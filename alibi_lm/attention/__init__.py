"""Attention backends: one implementation a file, all computing what `eager` defines; and the choice among them."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alibi_lm.attention.base import AttentionBackend
from alibi_lm.attention.eager import EagerAttention
from alibi_lm.attention.flex import FlexAttention
from alibi_lm.attention.native import NativeAttention, why_not
from alibi_lm.attention.sdpa import SdpaAttention
from alibi_lm.positions.base import PositionScheme

log = logging.getLogger("alibi_lm")


@dataclass
class AutoConfig:
    """native where it can be had and there is no GPU, else sdpa."""

    name: str = "auto"


@dataclass
class EagerConfig:
    """The definition, in plain tensor operations."""

    name: str = "eager"


@dataclass
class SdpaConfig:
    """torch's fused kernels."""

    name: str = "sdpa"


@dataclass
class NativeConfig:
    """A kernel for CPUs of this package's own, compiled at its first use."""

    name: str = "native"


@dataclass
class FlexConfig:
    """torch's FlexAttention, for GPUs."""

    name: str = "flex"


ATTENTION: dict[str, type] = {
    "auto": AutoConfig,
    "eager": EagerConfig,
    "sdpa": SdpaConfig,
    "native": NativeConfig,
    "flex": FlexConfig,
}
CHAINS: dict[str, tuple[type[AttentionBackend[Any]], ...]] = {
    "eager": (EagerAttention,),
    "sdpa": (SdpaAttention,),
    "native": (NativeAttention, SdpaAttention),
    "flex": (FlexAttention,),
}
"""The backend of each name, and the one that takes the passes which it does not serve, if there is one."""


@dataclass(frozen=True)
class Prepared:
    """A backend and what it prepared for one forward pass; every layer of the scheme calls it."""

    backend: AttentionBackend[Any]
    shared: Any
    dropout: float

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor | None = None) -> Tensor:
        """Attend: (B, H, T, K), (B, H, S, K), (B, H, S, K), (B, S, D) or None -> (B, H, T, K)."""
        return self.backend(q, k, v, self.shared, x, self.dropout)


class Backends:
    """The backend that a model was built with, and the only place where a pass goes to another one.

    Args:
        name: a key of CHAINS.
        position: name of the position scheme, for messages.
    """

    def __init__(self, name: str, position: str) -> None:
        self.name, self.position = name, position
        self.backends = [backend() for backend in CHAINS[name]]

    def refuses(self, scheme: PositionScheme, device: torch.device, dtype: torch.dtype, **facts: Any) -> str:
        """Why no backend of the chain serves such passes, as a message; empty where one does.

        Args:
            scheme: gives the bias.
            device: of queries and keys.
            dtype: of queries and keys.
            facts: window, dropout, grad, whole and gaps of `AttentionBackend.supports`.
        """
        reasons = [backend.supports(scheme, device, dtype, **facts) for backend in self.backends]
        return "" if not all(reasons) else self._refusal(scheme, reasons[0])

    def refuses_scheme(self, scheme: PositionScheme) -> str:
        """Why the named backend can never serve a scheme, as a message; empty where it can, on some device."""
        first = self.backends[0]
        reasons = [first.supports(scheme, torch.device(d), torch.float32) for d in ("cpu", "cuda")]
        return "" if not all(reasons) else self._refusal(scheme, reasons[0])

    def _refusal(self, scheme: PositionScheme, reason: str) -> str:
        other = "eager" if scheme.defines("content_bias") else "sdpa"
        return f"attention={self.name} cannot run position={self.position} ({reason}). Use attention={other}."

    def prepare(
        self,
        scheme: PositionScheme,
        q_pos: Tensor,
        k_pos: Tensor,
        span: int,
        window: int | None,
        dtype: torch.dtype,
        dropout: float,
    ) -> Prepared:
        """Choose the backend of a forward pass, and build what its layers share.

        Args:
            scheme: gives the bias.
            q_pos: (T,) int64, strictly ascending: the last T entries of k_pos.
            k_pos: (S,) int64, strictly ascending.
            span: k_pos[-1] - k_pos[0].
            window: a query sees only the keys at distances below it; None: all keys at or before it.
            dtype: of queries and keys.
            dropout: probability of dropping an attention weight.

        Raises:
            ValueError: the backend that was asked for by name does not serve this pass.
        """
        if window is not None and window > span:
            window = None
        device, grad = k_pos.device, torch.is_grad_enabled()
        whole, gaps = len(q_pos) == len(k_pos), span != len(k_pos) - 1
        for backend in self.backends:
            if not backend.supports(scheme, device, dtype, window, dropout, grad, whole, gaps):
                shared = backend.prepare(scheme, q_pos, k_pos, span, window, dtype)
                return Prepared(backend, shared, dropout)
        raise ValueError(
            self.refuses(scheme, device, dtype, window=window, dropout=dropout, grad=grad, whole=whole, gaps=gaps)
        )


def chosen_backend(name: str) -> str:
    """The backend that a name stands for on this machine: `auto` for the fastest one, any other for itself."""
    if name != "auto":
        return name
    if torch.cuda.is_available():
        return "sdpa"
    if reason := why_not():
        _warn_once(reason)
        return "sdpa"
    return "native"


@functools.cache
def _warn_once(reason: str) -> None:
    log.warning(
        "attention=auto takes sdpa, because the faster CPU kernel cannot be had: %s. "
        "Results are the same up to rounding; attention takes longer.",
        reason,
    )


def build_backend(name: str, scheme: PositionScheme, position: str) -> Backends:
    """Choose the backend of a model.

    Args:
        name: a key of ATTENTION.
        scheme: the model's position scheme.
        position: its name.

    Raises:
        ValueError: unknown name, or a backend that this machine does not have or that cannot run the scheme.
    """
    if name not in ATTENTION:
        raise ValueError(f"attention = {name!r}. Allowed: {', '.join(ATTENTION)}.")
    if name == "native" and (reason := why_not()):
        raise ValueError(
            f"attention = native, but its kernel cannot be had here: {reason}. It needs a C++ "
            "compiler with OpenMP (g++, or the one that CXX names). Mend that, or use attention=sdpa."
        )
    backends = Backends(chosen_backend(name), position)
    if refusal := backends.refuses_scheme(scheme):
        if name != "auto":
            raise ValueError(refusal)
        backends = Backends("sdpa", position)
    return backends


__all__ = ["ATTENTION", "AttentionBackend", "Backends", "Prepared", "build_backend", "chosen_backend"]
