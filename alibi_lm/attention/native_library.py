"""Compiles `native.cpp` for this machine's processor, once, and loads it.

The library lies in the user's cache folder ($XDG_CACHE_HOME/alibi_lm, or ~/.cache/alibi_lm) under a name made of
all that it depends on: source, command, compiler and processor. Machines that share a home folder share no library
that one of them could not run.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

SOURCE = Path(__file__).with_name("native.cpp")
ROWS = 48
"""Queries of a tile of scores."""
COMPILERS = ("g++", "c++", "clang++")
"""Looked for in this order, unless CXX names one."""
SECONDS = 300
"""After this time a compiler is given up."""

log = logging.getLogger("alibi_lm")


class Found(NamedTuple):
    """The library, or why there is none."""

    library: ctypes.CDLL | None
    reason: str = ""


@functools.cache
def find() -> Found:
    """Load the library; compile it first where that has not been done."""
    compiler = _compiler()
    if compiler is None:
        chosen = os.environ.get("CXX")
        return Found(
            None, f"CXX = {chosen} is not there" if chosen else f"none of {', '.join(COMPILERS)} is there"
        )
    try:
        return Found(ctypes.CDLL(str(_compiled(compiler))))
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if "error" in line] or error.stderr.splitlines()
        reason = lines[0] if lines else f"exit status {error.returncode}"
        return Found(None, f"{shlex.join(compiler)} failed: {reason}")
    except (OSError, subprocess.SubprocessError) as error:
        return Found(None, f"{shlex.join(compiler)}: {error}")


def _compiler() -> list[str] | None:
    """The compiler, and what CXX says it is called with."""
    chosen = os.environ.get("CXX", "").strip()
    for name in [chosen] if chosen else COMPILERS:
        program, *arguments = shlex.split(name)
        if path := shutil.which(program):
            return [path, *arguments]
    return None


def _compiled(compiler: list[str]) -> Path:
    """The library's file.

    Raises:
        OSError: the compiler does not start, or there is no room.
        subprocess.SubprocessError: it fails.
    """
    from filelock import FileLock

    command = [*compiler, *_flags()]
    name = _name(command)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alibi_lm"
    if (cache / name).exists():
        return cache / name
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = FileLock(cache / f"{name}.lock")
        lock.acquire()
    except (OSError, NotImplementedError):
        return _compile(command, Path(_own_folder().name) / name)
    with lock:
        return cache / name if (cache / name).exists() else _compile(command, cache / name)


@functools.cache
def _own_folder() -> tempfile.TemporaryDirectory[str]:
    """Where nothing can be kept each process has its own library, and takes it away at its end."""
    return tempfile.TemporaryDirectory(prefix="alibi_lm-")


def _compile(command: list[str], target: Path) -> Path:
    log.info("compiling the attention kernel for this processor, once; it takes some seconds")
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        subprocess.run(
            [*command, "-o", str(made), str(SOURCE), *_openmp_of_torch()],
            check=True, capture_output=True, text=True, timeout=SECONDS,
        )  # fmt: skip
        made.replace(target)  # at once, so that another process never loads half of it
    return target


def _flags() -> list[str]:
    # Not -ffast-math: it would undo how the exponential rounds, and lose what is not a number.
    processor = "-march=native" if platform.machine() in ("x86_64", "AMD64", "i686") else "-mcpu=native"
    numbers = ["-fno-math-errno", "-fno-trapping-math"]
    return ["-std=c++17", "-O3", processor, *numbers, "-fopenmp", "-shared", "-fPIC", f"-DROWS={ROWS}"]


def _openmp_of_torch() -> list[str]:
    """The copy of GNU's OpenMP that torch has, if any: two of them would each keep threads waiting for work."""
    copies = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    # As needed: where torch's copy serves, the system's is not asked for.
    return [*map(str, copies), "-Wl,--as-needed"] if copies else []


def _name(command: list[str]) -> str:
    version = subprocess.run([command[0], "--version"], capture_output=True, text=True, timeout=SECONDS).stdout
    try:
        about = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        processor = "".join(sorted(set(re.findall(r"^(?:model name|flags|Features)\s*:.*$", about, re.MULTILINE))))
    except OSError:
        processor = platform.processor()
    parts = [
        SOURCE.read_text(encoding="utf-8"),
        *command,
        version,
        platform.machine(),
        processor,
        *_openmp_of_torch(),
    ]
    return f"attention-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}.so"
