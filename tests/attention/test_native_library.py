"""Compiling the kernel: once a machine, from nothing else than a compiler, and a clear word where that fails."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from alibi_lm.attention import build_backend, native, native_library

ROOT = Path(__file__).resolve().parents[2]
needs_compiler = pytest.mark.skipif(bool(native.why_not()), reason=f"attention=native: {native.why_not()}")
BUILD = """
import logging, sys, torch
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
from alibi_lm.attention import build_backend
print(build_backend("native").name)
"""


@pytest.fixture
def anew(tmp_path, monkeypatch):
    """A user who has compiled nothing; gives the cache folder."""
    functions = (native_library.find, native.why_not)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for function in functions:
        function.cache_clear()
    yield tmp_path / "cache" / "alibi_lm"
    for function in functions:
        function.cache_clear()


def message_of_native() -> str:
    with pytest.raises(ValueError, match="attention = native") as caught:
        build_backend("native")
    return str(caught.value)


@needs_compiler
def test_it_is_compiled_once(anew, caplog):
    with caplog.at_level("INFO", logger="alibi_lm"):
        assert build_backend("auto").name == build_backend("native").name == "native"
        (library,) = anew.glob("*.so")
        made = library.stat().st_mtime_ns
        native_library.find.cache_clear()
        assert native_library.find().library is not None
    assert library.stat().st_mtime_ns == made
    assert [record.message for record in caplog.records if "compiling" in record.message] == [
        "compiling the attention kernel for this processor, once; it takes some seconds"
    ]


@needs_compiler
@pytest.mark.slow
def test_of_processes_that_start_together_one_compiles(tmp_path):
    variables = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", BUILD]
    together = [subprocess.Popen(command, env=variables, text=True, stdout=subprocess.PIPE) for _ in range(3)]
    printed = [process.communicate(timeout=300)[0].splitlines() for process in together]
    assert all(lines[-1:] == ["native"] for lines in printed), printed
    assert sum("compiling" in line for lines in printed for line in lines) == 1
    assert len(list((tmp_path / "alibi_lm").glob("*.so"))) == 1


@needs_compiler
def test_without_a_place_to_keep_it_each_process_has_its_own(anew, monkeypatch, tmp_path):
    anew.parent.write_text("a file where the folder would be")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    native_library._own_folder.cache_clear()
    assert build_backend("native").name == "native"
    assert len(list(tmp_path.glob("alibi_lm-*/*.so"))) == 1
    native_library._own_folder().cleanup()  # as the end of the process does
    native_library._own_folder.cache_clear()
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


@needs_compiler
def test_the_compiler_may_come_with_arguments(anew, monkeypatch):
    monkeypatch.setenv("CXX", f"{shutil.which('c++') or shutil.which('g++')} -g0")
    assert native_library._compiler()[1:] == ["-g0"]
    assert build_backend("native").name == "native"


def test_without_a_compiler(anew, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "/nonexistent")
    message = message_of_native()
    assert "none of g++, c++, clang++ is there" in message and "use attention=sdpa" in message
    assert build_backend("auto").name == "sdpa"


def test_the_compiler_that_is_asked_for_is_not_there(anew, monkeypatch):
    monkeypatch.setenv("CXX", "/no/such/compiler")
    assert "CXX = /no/such/compiler is not there" in message_of_native()
    assert build_backend("auto").name == "sdpa"


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'native.cpp:1: error: no room' >&2; exit 1", "failed: native.cpp:1: error: no room"),
        ("exit 3", "failed: exit status 3"),
        ("echo 'no library' > \"$3\"", "file too short"),
    ],
)
def test_a_compiler_that_fails_is_quoted(anew, tmp_path, monkeypatch, script, reason):
    compiler = tmp_path / "broken++"
    # The file to write follows -o.
    find = 'while [ "$1" != -o ]; do shift; done; set -- x "$1" "$2"'
    compiler.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exit 0\n{find}\n{script}\n')
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(compiler))
    assert reason in message_of_native()
    assert build_backend("auto").name == "sdpa"


@needs_compiler
def test_what_computes_something_else_is_refused(anew, tmp_path, monkeypatch):
    text = native_library.SOURCE.read_text()
    assert text.count("load(scores + j) + load(line + j)") == 1
    wrong = tmp_path / "native.cpp"
    wrong.write_text(text.replace("load(scores + j) + load(line + j)", "load(scores + j) - load(line + j)"))
    monkeypatch.setattr(native_library, "SOURCE", wrong)
    assert "does not compute attention" in message_of_native()
    assert build_backend("auto").name == "sdpa"


@needs_compiler
def test_another_processor_compiler_or_source_has_a_library_of_its_own(tmp_path, monkeypatch):
    command = [*(native_library._compiler() or []), *native_library._flags()]
    first = native_library._name(command)
    assert native_library._name(command) == first
    assert native_library._name([*command, "-O1"]) != first
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    source = native_library.SOURCE.read_text()
    monkeypatch.setattr(Path, "read_text", lambda self, **_: source + (cpuinfo if self.name == "cpuinfo" else ""))
    same = native_library._name(command)
    monkeypatch.setattr(
        Path, "read_text", lambda self, **_: source + ("flags : fewer\n" * (self.name == "cpuinfo"))
    )
    assert native_library._name(command) != same
    monkeypatch.setattr(Path, "read_text", lambda self, **_: "//" + (cpuinfo if self.name == "cpuinfo" else ""))
    assert native_library._name(command) != same
