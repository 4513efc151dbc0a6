"""What a text source is: three splits, each a long text in passages of consecutive lines.

Lines are separated by newline characters alone, and a last line without one counts as a line. Grouping them in
passages keeps memory bounded whatever the size of the text, and marks where a document starts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

SPLITS = ("train", "validation", "test")
PASSAGE_LINES = 1024
"""Most lines in a passage: bounds memory where a text has no headings."""


class Passage(NamedTuple):
    """Consecutive lines of one document."""

    lines: list[str]
    """Lines without their line ends."""
    starts_document: bool
    """Whether the first of them is the first line of a document."""


class Source(ABC):
    """A text in three splits."""

    name: str

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What tells this source from others, cheap to find: the prepared folder is named after it."""

    @abstractmethod
    def require(self, split: str, reason: str = "") -> None:
        """Raise ValueError, with what to do, unless the split can be read. `reason` says why it is needed."""

    @abstractmethod
    def passages(self, split: str) -> Iterator[Passage]:
        """The split's text in order. The first passage starts a document."""

    @abstractmethod
    def record(self, split: str) -> dict[str, Any]:
        """What the manifest keeps about the split's source, to notice later that it changed."""

    @abstractmethod
    def check(self, split: str, record: dict[str, Any], full: bool = False) -> str | None:
        """Compare the source with its record; None if it is the same or gone, else what differs.

        Args:
            split: one of `SPLITS`.
            record: what `record` gave when the split was prepared.
            full: read everything instead of sizes, times and samples.
        """

    def size(self, split: str) -> int | None:
        """Bytes of the split's text for a progress bar, if that is known beforehand."""
        return None


def wikitext_passages(lines: Iterable[str]) -> Iterator[Passage]:
    """Group WikiText lines in passages; documents begin at ` = Title = ` lines.

    A line is such a heading if it has one "=" at each end and stands between blank lines (or at the border of
    the text), which tells it from formulas such as ` = 1 henry = `. Blank lines before the first heading
    belong to the first document.
    """
    block: list[str] = []
    starts, has_words, blank_before = True, False, True
    for line, following in _with_next(lines):
        if blank_before and has_words and _is_title(line) and (following is None or not following.strip()):
            if block:
                yield Passage(block, starts)
            block, starts, has_words = [], True, False
        elif len(block) >= PASSAGE_LINES:
            yield Passage(block, starts)
            block, starts = [], False
        block.append(line)
        blank_before = not line.strip()
        has_words = has_words or not blank_before
    if block:
        yield Passage(block, starts)


def _is_title(line: str) -> bool:
    if "=" not in line[:3]:
        return False
    words = line.split()
    return len(words) >= 3 and words[0] == words[-1] == "=" and words[1] != "=" and words[-2] != "="


def _with_next(lines: Iterable[str]) -> Iterator[tuple[str, str | None]]:
    iterator = iter(lines)
    for current in iterator:
        for following in iterator:
            yield current, following
            current = following
        yield current, None
