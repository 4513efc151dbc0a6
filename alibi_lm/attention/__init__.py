"""Attention backends: one implementation a file, all computing what `eager` defines."""

from __future__ import annotations

from dataclasses import dataclass

from alibi_lm.attention.base import AttentionBackend
from alibi_lm.attention.eager import EagerAttention
from alibi_lm.attention.flex import FlexAttention
from alibi_lm.attention.sdpa import SdpaAttention


@dataclass
class EagerConfig:
    """The definition, in plain tensor operations."""

    name: str = "eager"


@dataclass
class SdpaConfig:
    """torch's fused kernels."""

    name: str = "sdpa"


@dataclass
class FlexConfig:
    """torch's FlexAttention, for GPUs."""

    name: str = "flex"


ATTENTION: dict[str, type] = {"eager": EagerConfig, "sdpa": SdpaConfig, "flex": FlexConfig}
_BACKENDS: dict[str, type[AttentionBackend]] = {
    "eager": EagerAttention,
    "sdpa": SdpaAttention,
    "flex": FlexAttention,
}


def build_backend(name: str) -> AttentionBackend:
    """Build an attention backend.

    Args:
        name: a key of ATTENTION.

    Raises:
        ValueError: unknown name.
    """
    if name not in _BACKENDS:
        raise ValueError(f"attention = {name!r}. Allowed: {', '.join(_BACKENDS)}.")
    return _BACKENDS[name]()


__all__ = ["ATTENTION", "AttentionBackend", "build_backend"]
