"""Compiles `native.cpp` and `decode.cpp` for this machine's processor, once, and loads them as one library.

The library is kept in the user's cache folder ($XDG_CACHE_HOME/alibi_lm, or ~/.cache/alibi_lm) under a name that
depends on source, command, compiler and processor. So machines that share a home folder never share a library that
one of them could not run. The file ends with the sha256 of its content, which is checked before loading, because
loading half a library ends the process. If nothing can be kept, each process compiles its own library.
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
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from alibi_lm.files import whole_file

SOURCE = Path(__file__).with_name("native.cpp")
DECODE = Path(__file__).with_name("decode.cpp")
ROWS = 48
"""Queries of a tile of scores."""
COMPILERS = ("g++", "c++", "clang++")
"""Looked for in this order, unless CXX names one."""
SECONDS = 300
"""Seconds after which compilation is given up."""

log = logging.getLogger("alibi_lm")


@functools.cache
def find() -> ctypes.CDLL | str:
    """The library, compiled first if necessary, or the reason why there is none. Never raises."""
    try:
        command = [*_compiler(), *_flags()]
        return ctypes.CDLL(str(_compiled(command)))
    except subprocess.TimeoutExpired:
        return f"compiling it took more than {SECONDS} seconds"
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if "error" in line] or error.stderr.splitlines()
        reason = lines[0] if lines else f"exit status {error.returncode}"
        return f"compilation failed: {shlex.join(error.cmd[:1])}: {reason}"
    except Exception as error:
        # There is always another backend, so an unusual machine must not stop the run.
        return str(error) or type(error).__name__


class View(ctypes.Structure):
    """A (B, H, T, K) tensor whose last dimension is contiguous, as the library reads it."""

    _fields_ = [("data", ctypes.c_void_p), *((f"step_{n}", ctypes.c_int64) for n in "bht")]


def run(function: str, call: ctypes.Structure, tensors: Mapping[str, Tensor | None]) -> None:
    """Call the library with a structure whose first fields are B, H, T, after setting its tensors by name.

    Raises:
        RuntimeError: out of memory.
    """
    library = find()
    assert not isinstance(library, str)
    for name, x in tensors.items():
        if x is not None:
            is_view = isinstance(getattr(call, name), View)
            setattr(call, name, View(x.data_ptr(), *x.stride()[:3]) if is_view else x.data_ptr())
    if getattr(library, function)(ctypes.byref(call)):
        batch, heads, tokens = (getattr(call, name) for name in "BHT")
        raise RuntimeError(f"attention = native: no memory for {batch} x {heads} heads of {tokens} queries.")


def _compiler() -> list[str]:
    """The compiler and, if CXX names it, the arguments given there.

    Raises:
        ValueError: CXX cannot be read as a command.
        OSError: there is no compiler.
    """
    chosen = os.environ.get("CXX", "").strip()
    for name in [chosen] if chosen else COMPILERS:
        try:
            program, *arguments = shlex.split(name)
        except ValueError as error:
            raise ValueError(f"CXX = {chosen} cannot be read as a command ({error})") from error
        if path := shutil.which(program):
            return [path, *arguments]
    raise OSError(f"CXX = {chosen} is not there" if chosen else f"none of {', '.join(COMPILERS)} is there")


def _compiled(command: list[str]) -> Path:
    """The library's file, compiled if it is missing or not whole."""
    from filelock import FileLock

    name = _name(command)
    try:
        chosen = os.environ.get("XDG_CACHE_HOME")
        cache = (Path(chosen) if chosen else Path.home() / ".cache") / "alibi_lm"
        if _whole(cache / name):
            return cache / name
        cache.mkdir(parents=True, exist_ok=True)
        lock = FileLock(cache / f"{name}.lock")
        lock.acquire()
    except (OSError, NotImplementedError, RuntimeError) as error:  # RuntimeError: the user has no home folder
        log.info("the compiled attention kernel cannot be kept: %s", error)
        return _compile(command, Path(_own_folder().name) / name)
    with lock:
        return cache / name if _whole(cache / name) else _compile(command, cache / name)


def _whole(library: Path) -> bool:
    """Whether a library exists and ends with the digest of its content."""
    try:
        content = library.read_bytes()
    except FileNotFoundError:
        return False
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


@functools.cache
def _own_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder for this process's own library, removed when it ends; used if nothing can be kept."""
    return tempfile.TemporaryDirectory(prefix="alibi_lm-")


def _compile(command: list[str], target: Path) -> Path:
    log.info("compiling the attention kernel for this processor, once; it takes some seconds")
    with tempfile.TemporaryDirectory(prefix="alibi_lm-") as folder:
        made = Path(folder) / target.name
        subprocess.run(
            [*command, "-o", str(made), "-include", str(SOURCE), str(DECODE), *_openmp_of_torch()],
            check=True, capture_output=True, text=True, timeout=SECONDS,
        )  # fmt: skip
        content = made.read_bytes()
    with whole_file(target) as file:
        file.write(content + hashlib.sha256(content).digest())
    return target


def _flags() -> list[str]:
    # Not -ffast-math: it would undo how the exponential rounds, and lose NaN.
    processor = "-march=native" if platform.machine() in ("x86_64", "AMD64", "i686") else "-mcpu=native"
    numbers = ["-fno-math-errno", "-fno-trapping-math"]
    return ["-std=c++17", "-O3", processor, *numbers, "-fopenmp", "-shared", "-fPIC", f"-DROWS={ROWS}"]


def _openmp_of_torch() -> list[str]:
    """The copy of GNU's OpenMP in torch, if any: two copies would each keep threads waiting for work."""
    copies = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    # As needed: if torch's copy works, the system's is not linked.
    return [*map(str, copies), "-Wl,--as-needed"] if copies else []


def _name(command: list[str]) -> str:
    version = subprocess.run([command[0], "--version"], capture_output=True, text=True, timeout=SECONDS).stdout
    try:
        about = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        processor = "".join(sorted(set(re.findall(r"^(?:model name|flags|Features)\s*:.*$", about, re.MULTILINE))))
    except OSError:
        processor = platform.processor()
    sources = [path.read_text(encoding="utf-8") for path in (SOURCE, DECODE)]
    parts = [*sources, *command, version, platform.machine(), processor, *_openmp_of_torch(), "digest at the end"]
    return f"attention-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}.so"
