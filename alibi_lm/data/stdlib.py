"""The embedded text: the sources of the running Python's standard library, on every machine with Python."""

from __future__ import annotations

import hashlib
import os
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alibi_lm.data.text import PASSAGE_LINES, SPLITS, Passage, Source

LEFT_OUT = frozenset(
    """site-packages dist-packages __pycache__ test tests idle_test
    lib2to3 idlelib turtledemo ensurepip encodings""".split()
)
"""Folders of the standard library that are not its own working code, nearly copies of each other (the tables of
`encodings`), or not on every machine."""
LEAST_CHARACTERS = 4_000_000
"""A whole standard library has about 11 million characters of source; far less means that it was stripped."""
REMEDY = "Use a Python installed with its sources, or data=wikitext103 data.path=<folder of .tokens files>."


class StandardLibrarySource(Source):
    """The running interpreter's own library sources: text that is on every machine with Python.

    Files are dealt to the splits by a hash of their path inside the library, 96 to 2 to 2 in a hundred, so
    a file has the same split on every machine. A document is a file; files come in the order of their paths.
    Files that are not UTF-8 are left out. The identity holds the Python version and a hash of all the text.
    """

    name = "python_stdlib"

    def __init__(self) -> None:
        self.folder = _standard_library_folder()
        self._files: dict[str, list[str]] = {split: [] for split in SPLITS}
        total = 0
        digests = {split: hashlib.sha256() for split in SPLITS}
        for relative in _library_files(self.folder):
            text = _read_text(self.folder / relative)
            if text is None or not text.strip():
                continue
            split = split_of_file(relative)
            self._files[split].append(relative)
            digests[split].update(f"{relative}\n{len(text)}\n{text}".encode())
            total += len(text)
        if total < LEAST_CHARACTERS:
            raise ValueError(
                f"data=python_stdlib: {self.folder} holds only {total:,} characters of Python source, so "
                f"this interpreter's standard library is stripped, zipped or compiled away. {REMEDY}"
            )
        self._hashes = {split: digest.hexdigest() for split, digest in digests.items()}

    def identity(self) -> dict[str, Any]:
        """Kind, name and place of the text."""
        text = hashlib.sha256("".join(self._hashes.values()).encode()).hexdigest()
        return {
            "kind": "python_stdlib",
            "name": self.name,
            "python": platform.python_version(),
            "sha256": text,
        }

    def files(self, split: str) -> list[str]:
        """Paths of the split's files inside the library, in the order of the text."""
        return list(self._files[split])

    def require(self, split: str, reason: str = "") -> None:
        """Raise ValueError, with what to do, unless the split can be read."""
        if not self._files[split]:
            raise ValueError(f"data=python_stdlib: no file of {self.folder} falls in the {split} split.")

    def passages(self, split: str) -> Iterator[Passage]:
        """The split's text in order."""
        for relative in self._files[split]:
            text = _read_text(self.folder / relative)
            if text is None:
                raise ValueError(f"data=python_stdlib: {self.folder / relative} vanished while it was read.")
            lines = text.removesuffix("\n").split("\n")
            for start in range(0, len(lines), PASSAGE_LINES):
                yield Passage(lines[start : start + PASSAGE_LINES], start == 0)

    def record(self, split: str) -> dict[str, Any]:
        """What to remember of the split's source."""
        return {
            "folder": str(self.folder),
            "files": len(self._files[split]),
            "sha256": self._hashes[split],
        }

    def check(self, split: str, record: dict[str, Any], full: bool = False) -> str | None:
        """What differs from the record, or None."""
        same = record.get("sha256") == self._hashes[split]
        return None if same else f"the standard library in {self.folder} has changed since it was prepared"

    def size(self, split: str) -> int | None:
        """Bytes of the split's text, if known."""
        return sum((self.folder / relative).stat().st_size for relative in self._files[split])


def split_of_file(relative: str) -> str:
    """Split of a library file, 96 : 2 : 2 by a hash of its path inside the library ("json/decoder.py")."""
    part = int.from_bytes(hashlib.sha256(relative.encode()).digest()[:8], "big") % 100
    return "train" if part < 96 else "validation" if part < 98 else "test"


def _standard_library_folder() -> Path:
    folder = Path(sysconfig.get_paths()["stdlib"])
    if not (folder / "os.py").is_file():
        raise ValueError(
            f"data=python_stdlib: {folder} has no os.py, so this interpreter's standard library is zipped "
            f"or stripped. {REMEDY}"
        )
    return folder


def _library_files(folder: Path) -> list[str]:
    """Paths of the library's sources relative to it, with "/" on every system, sorted."""
    found = []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in LEFT_OUT]
        found += [Path(root, name).relative_to(folder).as_posix() for name in files if _is_source(name)]
    return sorted(found)


def _is_source(name: str) -> bool:
    """Whether a person wrote it: `_sysconfigdata...` is generated when Python is built."""
    return name.endswith(".py") and not name.startswith("_sysconfigdata")


def _read_text(path: Path) -> str | None:
    """Text of a source file, line ends as newlines; None if it cannot be read as UTF-8."""
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return None
    return text.removeprefix("\ufeff")
