"""Attention backends, one per file, all computing what `eager` defines; and the choice among them."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass

import torch

from alibi_lm.attention.base import Attend, AttentionBackend, Request
from alibi_lm.attention.eager import EagerAttention
from alibi_lm.attention.flex import FlexAttention
from alibi_lm.attention.native import NativeAttention, why_not
from alibi_lm.attention.sdpa import SdpaAttention
from alibi_lm.positions.base import PositionScheme

log = logging.getLogger("alibi_lm")


@dataclass
class AutoConfig:
    """native if it is available and there is no GPU, else sdpa."""

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
    """A kernel of this package for CPUs, compiled at its first use."""

    name: str = "native"


@dataclass
class FlexConfig:
    """torch's FlexAttention, for GPUs."""

    name: str = "flex"


CHAINS: dict[str, tuple[type[AttentionBackend], ...]] = {
    "eager": (EagerAttention,),
    "sdpa": (SdpaAttention,),
    "native": (NativeAttention, SdpaAttention),
    "flex": (FlexAttention,),
}
"""For each name, the backend and, if there is one, the backend for passes that the first does not support."""
ATTENTION: dict[str, type] = {
    "auto": AutoConfig,
    "eager": EagerConfig,
    "sdpa": SdpaConfig,
    "native": NativeConfig,
    "flex": FlexConfig,
}


class Backends:
    """The backend that a model was built with; only here may a pass be given to another one.

    Args:
        name: a key of CHAINS.
        position: name of the position scheme, for messages.
    """

    def __init__(self, name: str, position: str) -> None:
        self.name, self.position = name, position
        self.chain = [backend() for backend in CHAINS[name]]

    def refuses_scheme(self, scheme: PositionScheme) -> str:
        """Why the named backend can never serve a scheme, as a message; empty if it can."""
        reason = self.chain[0].refuses_scheme(scheme)
        return reason and self._message(scheme, reason)

    def choose(self, scheme: PositionScheme, request: Request) -> AttentionBackend:
        """The backend that serves a forward pass.

        Raises:
            ValueError: the requested backend does not support the pass, and no other one takes its place.
        """
        for backend in self.chain:
            # The scheme of a pass may be the model's scheme with a changed bias.
            if not (backend.refuses_scheme(scheme) or backend.refuses(scheme, request)):
                return backend
        raise ValueError(self._message(scheme, self.chain[0].refuses(scheme, request)))

    def prepare(self, scheme: PositionScheme, request: Request) -> Attend:
        """Choose the backend of a forward pass, and build what the layers of the scheme share."""
        return self.choose(scheme, request).prepare(scheme, request)

    def _message(self, scheme: PositionScheme, reason: str) -> str:
        other = "eager" if scheme.defines("content_bias", "scores", "value_bias") else "sdpa"
        return f"attention={self.name} cannot run position={self.position} ({reason}). Use attention={other}."


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
        "attention=auto takes sdpa, because the faster CPU kernel is not available: %s. "
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
            f"attention = native, but its kernel is not available here: {reason}. It needs a C++ "
            "compiler with OpenMP (g++, or the one that CXX names). Install one, or use attention=sdpa."
        )
    backends = Backends(chosen_backend(name), position)
    if refusal := backends.refuses_scheme(scheme):
        if name != "auto":
            raise ValueError(refusal)
        backends = Backends("sdpa" if not SdpaAttention().refuses_scheme(scheme) else "eager", position)
    return backends


__all__ = ["ATTENTION", "Attend", "AttentionBackend", "Backends", "Request", "build_backend", "chosen_backend"]
