"""The environment of a run: device, precision, seeds, cores, and a record of the machine and the code."""

from __future__ import annotations

import ctypes
import functools
import math
import os
import platform
import re
import subprocess
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from alibi_lm.settings import LARGEST, require, require_one_of

DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("auto", "float32", "bfloat16")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt (malloc.h)."""


def start(device: str = "auto", local_rank: int = 0, threads: int | None = None) -> torch.device:
    """Choose the device and set the process-wide switches; call before any tensor work.

    Flushing denormals matters for ALiBi on a CPU: its steep heads drive far probabilities to denormal
    floats, which are several times slower to multiply. Threads inherit the switch only if they are
    created after it is set.

    cuDNN's attention is not used: torch 2.11 prefers it on recent GPUs, where it rounds dropout rates to
    sixteenths and its backward pass gives NaN for some masked rows (PyTorch report 196678).

    Args:
        device: `auto` (CUDA if there is one), `cpu` or `cuda`.
        local_rank: index of the CUDA device on this machine.
        threads: intra-operation threads on the CPU; None leaves torch's choice.

    Raises:
        ValueError: unknown device, `cuda` where there is none, or a number of threads out of range.
    """
    torch.set_flush_denormal(True)
    _keep_freed_memory()
    if threads is not None:
        most = LARGEST["threads"]
        require(1 <= threads <= most, f"threads = {threads}. Use 1 to {most}, or null.")
        torch.set_num_threads(threads)
    require_one_of("device", device, DEVICES)
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    require(
        torch.cuda.is_available(),
        "device = cuda, but torch finds no CUDA device here. Use device=cpu or device=auto.",
    )
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def allowed_cores() -> int:
    """CPU cores that this process may use, by its affinity, SLURM's share and the container's limit."""
    limits = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1]
    slurm = os.environ.get("SLURM_CPUS_PER_TASK", "")
    if slurm.isdecimal():
        limits.append(int(slurm))
    limits += [math.floor(share) for share in _container_cores()]
    return max(1, min(limits))


def _container_cores(root: Path = Path("/sys/fs/cgroup")) -> list[float]:
    """CPU time, in cores, that control groups allow: version 2's `cpu.max`, version 1's quota and period."""
    found = []
    for names in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):
        try:
            quota, period = " ".join((root / name).read_text() for name in names).split()
            if int(quota) > 0:
                found.append(int(quota) / int(period))
        except (OSError, ValueError, ZeroDivisionError):  # no such file, or no limit ("max")
            continue
    return found


def _keep_freed_memory() -> None:
    """Make glibc's allocator keep freed memory, unless the environment says otherwise.

    A training step frees all memory that it allocated; otherwise the next step must get the same pages again.
    """
    chosen = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
    if any(name in os.environ for name in chosen):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return  # not glibc
    # Blocks smaller than this come from the heap, which is trimmed only when more than 2 GiB of it are unused.
    mallopt(M_MMAP_THRESHOLD, 1 << 30)
    mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def existing_device(device: str | torch.device) -> torch.device:
    """The torch device of this name, which this machine must have.

    Raises:
        ValueError: not the name of a device, or one that this machine does not have.
    """
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device = {device!r}. Use cpu, cuda or cuda:<index>.") from error
    require(found.type in ("cpu", "cuda"), f"device = {device}. Use cpu, cuda or cuda:<index>.")
    if found.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = found.index or 0
        require(index < count, f"device = {device}, but torch finds {count} CUDA devices here. Use device=cpu.")
    return found


def resolve_precision(device: torch.device, precision: str) -> str:
    """`float32` or `bfloat16`; `auto` is bfloat16 on CUDA devices that have it and float32 elsewhere.

    Raises:
        ValueError: unknown precision.
    """
    require_one_of("precision", precision, PRECISIONS)
    if precision == "auto":
        return "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    return precision


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Context of the forward pass: bfloat16 autocast, or nothing; see `resolve_precision`."""
    if resolve_precision(device, precision) == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def seed_step(seed: int, step: int, rank: int = 0) -> None:
    """Make all randomness that follows a pure function of (seed, step, rank).

    Called at the start of every training step, so that a resumed run draws the same dropout masks as an
    uninterrupted one, and no generator state needs to be saved.
    """
    torch.manual_seed(step_seed(seed, step, rank))


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """A number of 63 bits that mixes seed, step and rank by odd multipliers."""
    return (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB) % (1 << 63)


def reset_peak_memory(device: torch.device) -> int:
    """Start a measurement of peak memory; returns the bytes in use now, 0 if the system does not say."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        # Return freed memory to the system first, so that using it again is counted.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError, TypeError):
        return 0
    return _process_status("VmRSS") or 0


def peak_memory_bytes(device: torch.device) -> int | None:
    """Most bytes in use since `reset_peak_memory`: CUDA's allocator, or resident memory of the process (Linux)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _process_status("VmHWM")


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is not enough memory, of the machine or of a GPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # PyTorch raises a plain RuntimeError on a CPU, and where a library of the GPU cannot get memory.
    signs = ("DefaultCPUAllocator", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def _process_status(name: str) -> int | None:
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


@functools.cache
def code_version() -> tuple[str | None, bool | None]:
    """Commit of the source tree, and whether tracked files differ from it.

    Outside a checkout the environment variable `ALIBI_LM_COMMIT` may name the commit; otherwise (None, None).
    """
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) == root:
            return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        pass
    return os.environ.get("ALIBI_LM_COMMIT") or None, None


def environment(device: torch.device) -> dict[str, Any]:
    """The record of code, versions and machine that is written beside every run."""
    import numpy

    commit, dirty = code_version()
    return {
        "commit": commit,
        "dirty": dirty,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "device_type": device.type,
        "cpu_count": os.cpu_count(),
        "allowed_cores": allowed_cores(),
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
