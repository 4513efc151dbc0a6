"""Seconds of one call, and the speed of the matrix product that steps are compared with."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


def matmul_speeds(device: torch.device, precision: str, clock: str = "wall") -> list[float]:
    """FLOP/s of a large matrix product, the limit that a step is compared with; three times."""
    size = 1024 if device.type == "cpu" else 8192
    half = device.type == "cuda" and precision != "float32"
    a = torch.randn(2 * size, size, device=device, dtype=torch.bfloat16 if half else torch.float32)
    b = torch.randn(size, size, device=device, dtype=a.dtype)
    a @ b
    seconds = [timed(device, lambda: a @ b, clock) for _ in range(3)]
    return [4 * size**3 / s for s in seconds if s]


def timed(device: torch.device, run: Callable[[], Any], clock: str = "wall") -> float | None:
    """Seconds of a call, or None where it runs out of memory."""
    now = time.process_time if clock == "cpu" else time.perf_counter
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = now()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return now() - began
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None
