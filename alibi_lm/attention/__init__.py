"""Attention backends: one implementation a file, all computing what `eager` defines."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from alibi_lm.attention.base import AttentionBackend
from alibi_lm.attention.eager import EagerAttention
from alibi_lm.attention.flex import FlexAttention
from alibi_lm.attention.native import NativeAttention, why_not
from alibi_lm.attention.sdpa import SdpaAttention


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
    """A kernel for CPUs of this package's own, compiled at its first use; else as sdpa."""

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
_BACKENDS: dict[str, type[AttentionBackend]] = {
    "eager": EagerAttention,
    "sdpa": SdpaAttention,
    "native": NativeAttention,
    "flex": FlexAttention,
}


def chosen_backend(name: str) -> str:
    """The backend that a name stands for: `auto` for the fastest one here, any other for itself."""
    if name != "auto":
        return name
    return "sdpa" if torch.cuda.is_available() or why_not() else "native"


def build_backend(name: str) -> AttentionBackend:
    """Build an attention backend.

    Args:
        name: a key of ATTENTION.

    Raises:
        ValueError: unknown name, or a backend that this machine does not have.
    """
    if name not in ATTENTION:
        raise ValueError(f"attention = {name!r}. Allowed: {', '.join(ATTENTION)}.")
    return _BACKENDS[chosen_backend(name)]()


__all__ = ["ATTENTION", "AttentionBackend", "build_backend", "chosen_backend"]
