"""What a text source is, and the one that is on every machine: Python's standard library.

A source has three splits, each a long text in passages of consecutive lines. Lines are separated only by newline
characters, and a last line without one counts as a line. A byte order mark at the start of a file is not
part of its text.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from alibi_lm.settings import require

SPLITS = ("train", "validation", "test")
PASSAGE_LINES = 1024
"""Largest number of lines in a passage, which bounds memory if a text has no headings."""
BYTE_ORDER_MARK = "\ufeff"


class Passage(NamedTuple):
    """Consecutive lines of one document."""

    lines: list[str]
    """Lines without their line ends."""
    starts_document: bool
    """Whether the first line is the first line of a document."""

    @property
    def text(self) -> str:
        """The lines with their line ends."""
        return "\n".join(self.lines) + "\n"

    @property
    def characters(self) -> int:
        """Length of `text`."""
        return sum(map(len, self.lines)) + len(self.lines)


def passages_of(document: str, most_lines: int = PASSAGE_LINES) -> Iterator[Passage]:
    """A whole document in passages; a last line without a line end gets one."""
    lines = document.removesuffix("\n").split("\n")
    for start in range(0, len(lines), most_lines):
        yield Passage(lines[start : start + most_lines], start == 0)


class Source(ABC):
    """A text in three splits."""

    name: str
    borders: str
    """What a document is, as a sentence for the user."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Cheap data that identify this source; the prepared folder is named after them."""

    @abstractmethod
    def require(self, split: str, reason: str = "") -> None:
        """Raise ValueError, with what to do, unless the split can be read. `reason` says why it is needed."""

    @abstractmethod
    def passages(self, split: str) -> Iterator[Passage]:
        """The split's text in order. The first passage starts a document."""

    @abstractmethod
    def record(self, split: str) -> dict[str, Any]:
        """What the manifest keeps about the split's source, to detect later changes."""

    def check(self, split: str, record: dict[str, Any], full: bool = False) -> str | None:
        """Compare the source with its record; None if it is the same or no longer exists, else what differs.

        With `full` everything is read, instead of sizes, times and samples. A text of the hub is never looked at
        again, so that its prepared streams also serve offline.
        """
        return None

    def size(self, split: str) -> int | None:
        """Bytes of the split's text for a progress bar, None if not known beforehand."""
        return None


# --- Python's standard library --------------------------------------------------------------------

LEFT_OUT = frozenset(
    """site-packages dist-packages __pycache__ test tests idle_test
    lib2to3 idlelib turtledemo ensurepip encodings""".split()
)
"""Folders of the standard library that are not its actual code, that are near-copies of each other (the tables of
`encodings`), or that are not on every machine."""
LEAST_CHARACTERS = 4_000_000
"""A whole standard library has about 11 million characters of source; far less means that it was stripped."""


class StandardLibrarySource(Source):
    """The library sources of the running interpreter: text that is on every machine with Python.

    Files are assigned to splits by a hash of their path inside the library, in proportions 96 : 2 : 2, so a
    file has the same split on every machine. A document is a file; files are in the order of their paths.
    Files that are not UTF-8 are left out. The identity holds the Python version and a hash of the whole text.
    """

    name = "python_stdlib"
    borders = "A document is a file."

    def __init__(self) -> None:
        remedy = (
            "Use a Python installed with its sources, or data=wikitext103 data.path=<folder of .tokens files>."
        )
        self.folder = Path(sysconfig.get_paths()["stdlib"])
        require(
            (self.folder / "os.py").is_file(),
            f"data=python_stdlib: {self.folder} has no os.py, so this interpreter's standard library is zipped "
            f"or stripped. {remedy}",
        )
        self.files: dict[str, list[str]] = {split: [] for split in SPLITS}
        """Paths of each split's files inside the library, in the order of the text."""
        total = 0
        digests = {split: hashlib.sha256() for split in SPLITS}
        for relative in _library_files(self.folder):
            text = _read_text(self.folder / relative)
            if text is None or not text.strip():
                continue
            split = split_of_file(relative)
            self.files[split].append(relative)
            digests[split].update(f"{relative}\n{len(text)}\n{text}".encode())
            total += len(text)
        require(
            total >= LEAST_CHARACTERS,
            f"data=python_stdlib: {self.folder} holds only {total:,} characters of Python source, so "
            f"this interpreter's standard library is stripped, zipped or compiled away. {remedy}",
        )
        self._hashes = {split: digest.hexdigest() for split, digest in digests.items()}

    def identity(self) -> dict[str, Any]:
        return {
            "kind": "python_stdlib",
            "name": self.name,
            "python": platform.python_version(),
            "sha256": hashlib.sha256("".join(self._hashes.values()).encode()).hexdigest(),
        }

    def require(self, split: str, reason: str = "") -> None:
        require(bool(self.files[split]), f"data=python_stdlib: no file of {self.folder} is in the {split} split.")

    def passages(self, split: str) -> Iterator[Passage]:
        for relative in self.files[split]:
            text = _read_text(self.folder / relative)
            if text is None:
                raise ValueError(f"data=python_stdlib: {self.folder / relative} vanished while it was read.")
            yield from passages_of(text)

    def record(self, split: str) -> dict[str, Any]:
        return {"folder": str(self.folder), "files": len(self.files[split]), "sha256": self._hashes[split]}

    def check(self, split: str, record: dict[str, Any], full: bool = False) -> str | None:
        same = record.get("sha256") == self._hashes[split]
        return None if same else f"the standard library in {self.folder} has changed since it was prepared"

    def size(self, split: str) -> int | None:
        return sum((self.folder / relative).stat().st_size for relative in self.files[split])


def split_of_file(relative: str) -> str:
    """Split of a library file, 96 : 2 : 2 by a hash of its path inside the library ("json/decoder.py")."""
    part = int.from_bytes(hashlib.sha256(relative.encode()).digest()[:8], "big") % 100
    return "train" if part < 96 else "validation" if part < 98 else "test"


def _library_files(folder: Path) -> list[str]:
    """Paths of the library's sources relative to it, with "/" on every system, sorted."""
    found = []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in LEFT_OUT]
        # `_sysconfigdata...` is generated when Python is built.
        sources = (name for name in files if name.endswith(".py") and not name.startswith("_sysconfigdata"))
        found += [Path(root, name).relative_to(folder).as_posix() for name in sources]
    return sorted(found)


def _read_text(path: Path) -> str | None:
    """Text of a source file, line ends as newlines; None if it cannot be read as UTF-8."""
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return None
    return text.removeprefix(BYTE_ORDER_MARK)
