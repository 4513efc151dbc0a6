"""Compiling the kernel: once a machine, from nothing else than a compiler, and a clear word where that fails."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from alibi_lm.attention import native

ROOT = Path(__file__).resolve().parents[2]
needs_compiler = pytest.mark.skipif(bool(native.why_not()), reason=f"attention=native: {native.why_not()}")
BUILD = """
import logging, sys, torch
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
from alibi_lm.attention import build_backend
print(build_backend(sys.argv[1]).name)
"""


def build(name: str, cache: Path, **environment: str) -> subprocess.Popen[str]:
    variables = {**os.environ, "XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(ROOT), **environment}
    return subprocess.Popen(
        [sys.executable, "-c", BUILD, name],
        env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> tuple[list[str], str]:
    out, err = process.communicate(timeout=300)
    return out.splitlines(), err


@needs_compiler
def test_processes_that_start_together_compile_once_and_later_ones_not_at_all(tmp_path):
    together = [build("native", tmp_path) for _ in range(3)]
    printed = [finish(process) for process in together]
    assert all(lines[-1:] == ["native"] for lines, _ in printed), printed
    assert sum("compiling" in line for lines, _ in printed for line in lines) == 1
    assert finish(build("native", tmp_path))[0] == ["native"]
    assert len(list((tmp_path / "alibi_lm").glob("*.so"))) == 1


@needs_compiler
def test_without_a_place_to_keep_it_each_process_has_its_own(tmp_path):
    (tmp_path / "file").write_text("")
    lines, err = finish(build("native", tmp_path / "file", TMPDIR=str(tmp_path)))
    assert lines[-1:] == ["native"] and "compiling" in lines[0], err
    assert [p.name for p in tmp_path.iterdir()] == ["file"]  # and takes it away


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"PATH": "/nonexistent", "CXX": ""}, "none of g++, c++, clang++ is there"),
        ({"CXX": "/no/such/compiler"}, "CXX = /no/such/compiler is not there"),
    ],
)
def test_without_a_compiler(tmp_path, environment, reason):
    explicit, automatic = build("native", tmp_path, **environment), build("auto", tmp_path, **environment)
    lines, err = finish(explicit)
    message = " ".join(err.split())
    assert not lines and "attention = native, but its kernel cannot be compiled here" in message
    assert reason in message and "use attention=sdpa" in message
    assert finish(automatic) == (["sdpa"], "")


def test_a_compiler_that_fails_is_quoted(tmp_path):
    script = tmp_path / "broken++"
    script.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "native.cpp:1: error: no room" >&2\nexit 1\n'
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    _, err = finish(build("native", tmp_path, CXX=str(script)))
    assert "broken++ failed: native.cpp:1: error: no room" in " ".join(err.split())
    assert finish(build("auto", tmp_path, CXX=str(script)))[0][-1] == "sdpa"
    assert not list((tmp_path / "alibi_lm").glob("*.so"))


@needs_compiler
def test_another_processor_or_compiler_has_a_library_of_its_own(tmp_path, monkeypatch):
    from alibi_lm.attention import native_library

    compiler = native_library._compiler()
    first = native_library._name([compiler, *native_library._flags()])
    assert native_library._name([compiler, *native_library._flags()]) == first
    assert native_library._name([compiler, "-O1"]) != first
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    monkeypatch.setattr(Path, "read_text", lambda self, **_: f"{cpuinfo}\nflags : fewer\n")
    assert native_library._name([compiler, *native_library._flags()]) != first
