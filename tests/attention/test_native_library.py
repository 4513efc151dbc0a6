"""Compiling the kernel: once a machine, from nothing else than a compiler, and a clear word where that fails."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from alibi_lm import attention
from alibi_lm.attention import build_backend, native, native_library
from alibi_lm.positions.base import PositionScheme, PositionShape

ROOT = Path(__file__).resolve().parents[2]
SCHEME = PositionScheme(PositionShape(24, 8, 3, 2, 64, 64))
needs_compiler = pytest.mark.skipif(bool(native.why_not()), reason=f"attention=native: {native.why_not()}")
BUILD = """
import logging, sys
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
from alibi_lm.attention import chosen_backend
print(chosen_backend("auto"))
"""


@pytest.fixture
def anew(tmp_path, monkeypatch):
    """A user who has compiled nothing; gives the cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    forget()
    yield tmp_path / "cache" / "alibi_lm"
    forget()


def forget() -> None:
    """As a new process begins."""
    for function in (native_library.find, native.why_not, native_library._own_folder, attention._warn_once):
        function.cache_clear()


def backend(name: str = "native") -> str:
    return build_backend(name, SCHEME, "none").name


def message_of_native() -> str:
    with pytest.raises(ValueError, match="attention = native") as caught:
        backend()
    return str(caught.value)


@pytest.fixture
def fake_compiler(tmp_path, monkeypatch):
    """A compiler that does what a script says; the file to write is $2."""

    def write(script: str) -> None:
        compiler = tmp_path / "broken++"
        find = 'while [ "$1" != -o ]; do shift; done'
        compiler.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exit 0\n{find}\n{script}\n')
        compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("CXX", str(compiler))

    return write


@pytest.fixture
def quick_compiler(fake_compiler, request):
    """A compiler that copies what the real one has made before."""
    library = Path(native_library.find()._name)
    request.getfixturevalue("anew")
    fake_compiler(f'cp {library} "$2"')


@needs_compiler
def test_it_is_compiled_once(quick_compiler, anew, logged):
    assert backend("auto") == backend("native") == "native"
    (library,) = anew.glob("*.so")
    made = library.stat().st_mtime_ns
    forget()
    assert not isinstance(native_library.find(), str)
    assert library.stat().st_mtime_ns == made
    assert [record.getMessage() for record in logged] == [
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
@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda content: content[: len(content) // 2], id="cut short"),
        pytest.param(lambda content: b"", id="empty"),
        pytest.param(lambda content: content[:-1] + bytes([content[-1] ^ 1]), id="one bit"),
    ],
)
def test_a_damaged_library_is_compiled_anew_and_never_loaded(quick_compiler, anew, logged, damage):
    """Loading a file cut short ends the process with SIGBUS."""
    assert native.why_not() == ""
    (library,) = anew.glob("*.so")
    content = library.read_bytes()
    broken = library.with_suffix(".broken")
    broken.write_bytes(damage(content))
    broken.replace(library)  # another file: this process has the old one in use
    forget()
    logged.clear()
    assert native.why_not() == ""
    assert library.read_bytes() == content
    assert ["compiling" in record.getMessage() for record in logged] == [True]


@needs_compiler
@pytest.mark.parametrize("obstacle", ["a file where the folder would be", "no home folder", "a locked folder"])
def test_without_a_place_to_keep_it_each_process_has_its_own(
    quick_compiler, anew, monkeypatch, tmp_path, obstacle, logged
):
    if obstacle == "no home folder":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home directory")))
    elif obstacle == "a locked folder":
        monkeypatch.setattr(Path, "mkdir", lambda *_, **__: (_ for _ in ()).throw(PermissionError("locked")))
    else:
        anew.parent.write_text("a file")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert backend() == backend("auto") == "native"
    assert len(list(tmp_path.glob("alibi_lm-*/*.so"))) == 1
    assert "WARNING" not in [record.levelname for record in logged]
    native_library._own_folder().cleanup()  # as the end of the process does
    assert not list(tmp_path.glob("alibi_lm-*"))


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        (None, "none of g++, c++, clang++ is there"),
        ("/no/such/compiler", "CXX = /no/such/compiler is not there"),
        ('g++ "-O2', 'CXX = g++ "-O2 cannot be read as a command (No closing quotation)'),
        ("/bin/false", "compilation failed: /bin/false: exit status 1"),
    ],
)
def test_no_compiler(anew, monkeypatch, logged, compiler, reason):
    monkeypatch.setenv("CXX", compiler or "")
    if compiler != "/bin/false":
        monkeypatch.setenv("PATH", "/nonexistent")
    message = message_of_native()
    assert reason in message and "use attention=sdpa" in message
    assert backend("auto") == "sdpa"
    (record,) = (r for r in logged if r.levelname == "WARNING")
    assert reason in record.getMessage()


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'native.cpp:1: error: no room' >&2; exit 1", "native.cpp:1: error: no room"),
        ("exit 3", "exit status 3"),
        ("echo 'no library' > \"$2\"", "file too short"),
        ("true", "No such file"),
    ],
)
def test_a_compiler_that_fails_is_quoted(anew, fake_compiler, script, reason):
    fake_compiler(script)
    assert reason in message_of_native()
    assert backend("auto") == "sdpa"


def test_a_compiler_works_outside_of_the_cache(anew, fake_compiler):
    """So that one that is killed leaves nothing there."""
    fake_compiler("exit 3")
    message_of_native()
    assert {path.suffix for path in anew.iterdir()} == {".lock"}


@needs_compiler
@pytest.mark.parametrize(
    "wrong",
    [
        lambda q, k, v, bias, window, by_key: (q, k, v, None if bias is None else -bias, window, by_key),
        lambda q, k, v, bias, window, by_key: (q, k, v, bias, 70, by_key),
        lambda q, k, v, bias, window, by_key: (q, k, v, bias, window, None if by_key is None else -by_key),
        lambda q, k, v, bias, window, by_key: (q, k, v.detach() + 0 * v, bias, window, by_key),
    ],
    ids=["sign of the bias", "no window", "sign of the bias per key", "no gradient of values"],
)
def test_what_computes_something_else_is_refused(monkeypatch, wrong):
    attend = native.attend
    monkeypatch.setattr(native, "attend", lambda *arguments: attend(*wrong(*arguments)))
    assert native.why_not.__wrapped__() == "what was compiled does not compute attention"


@needs_compiler
def test_another_processor_compiler_or_source_has_a_library_of_its_own(
    quick_compiler, anew, monkeypatch, tmp_path
):
    """The compiler may come with arguments, which count too."""
    read, command = Path.read_text, os.environ["CXX"]
    changes = [
        lambda changed: None,
        lambda changed: changed.setenv("CXX", f"{command} -g0"),
        lambda changed: changed.setattr(native_library, "SOURCE", tmp_path / "native.cpp"),
        lambda changed: changed.setattr(
            Path, "read_text", lambda self, **_: read(self) + "flags : fewer\n" * (self.name == "cpuinfo")
        ),
    ]
    (tmp_path / "native.cpp").write_text(read(native_library.SOURCE) + "//")
    for number, change in enumerate(changes, start=1):
        with monkeypatch.context() as changed:
            change(changed)
            forget()
            assert backend() == "native" and len(list(anew.glob("*.so"))) == number
