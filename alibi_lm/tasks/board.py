"""Eight tasks with one layout, trained up to L symbols and tested beyond: majority, copy, sort, parity, addition.

Source: Huang et al. (2025), "A formal framework for understanding length generalization in transformers",
arXiv 2410.02140, and its code (github.com/lacoco-lab/length_generalization); after Zhou et al. (2024), arXiv
2310.16028.

    <bos> input <sep> answer <eos>

The loss is that of the answer and `<eos>`, and an item is right if all of these are. A length is the number of
input symbols. In training it is uniform from the shortest to L; in a test at n > L, in (n - L, n], but never below
the shortest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from alibi_lm.settings import require_at_least
from alibi_lm.tasks.items import Item, Synthetic, answered

BOS, SEP, EOS, FIRST = 0, 1, 2, 3
"""Ids of the layout's tokens, and of the first symbol."""


@dataclass
class BoardTask(Synthetic):
    """What the eight share: a subclass says what is asked (`ask`) and how long the answer may be (`answer`)."""

    alphabet: ClassVar[int] = 2
    """Symbols of input and answer together."""

    @property
    def vocab_size(self) -> int:
        return FIRST + self.alphabet

    def answer(self, length: int) -> int:
        """Largest number of symbols in an answer."""
        return 1

    def ask(self, draw: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Input and answer as symbols counted from 0: (length,) and (answer,) integers."""
        raise NotImplementedError

    def width(self, length: int) -> int:
        return length + self.answer(length) + 2  # <eos> is a target only

    def lengths(self, length: int, train_length: int | None) -> Sequence[int]:
        first = length - train_length + 1 if train_length is not None and length > train_length else self.least
        return range(max(first, self.least), length + 1)

    def item(self, draw: np.random.Generator, length: int) -> Item:
        symbols, answer = self.ask(draw, length)
        return answered(np.array([BOS, *(symbols + FIRST), SEP]), np.array([*(answer + FIRST), EOS]))


def bits(draw: np.random.Generator, length: int, tie: bool = False) -> np.ndarray:
    """Shuffled bits, (length,); the number of ones is uniform from 0 to length, without ties unless `tie`."""
    while True:
        ones = int(draw.integers(length + 1))
        if tie or 2 * ones != length:
            return draw.permutation((np.arange(length) < ones).astype(np.int64))


@dataclass
class BinMajority(BoardTask):
    """Which of two symbols occurs more often? The number of ones is uniform, without ties."""

    name: str = "bin_majority"
    chance: ClassVar[float] = 0.5

    def ask(self, draw: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        found = bits(draw, length)
        return found, np.array([int(2 * found.sum() > length)])


@dataclass
class Majority(BoardTask):
    """Which of 26 letters occurs most often? Letters are uniform; inputs with two such letters are redrawn."""

    name: str = "majority"
    alphabet: ClassVar[int] = 26
    chance: ClassVar[float] = 1 / 26

    def ask(self, draw: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        while True:
            found = draw.integers(self.alphabet, size=length)
            counts = np.bincount(found, minlength=self.alphabet)
            if (counts == counts.max()).sum() == 1:
                return found, np.array([counts.argmax()])


@dataclass
class InterleavedMajority(BoardTask):
    """Three bit strings of equal length take turns; the answer is the more frequent bit of each.

    A length that is not a multiple of 3 is rounded down.
    """

    name: str = "interleaved_majority"
    least: ClassVar[int] = 3
    chance: ClassVar[float] = 0.125

    def answer(self, length: int) -> int:
        return 3

    def ask(self, draw: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        strings = np.stack([bits(draw, length // 3) for _ in range(3)])
        return strings.T.ravel(), (2 * strings.sum(axis=1) > length // 3).astype(np.int64)


@dataclass
class UniqueCopy(BoardTask):
    """Repeat the input, n different symbols: each has one successor, which can be looked up in the input."""

    name: str = "unique_copy"
    symbols: int = 150
    """Number of different symbols, at least as many as in the longest input."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least("task.symbols", self.symbols, 2)

    @property
    def vocab_size(self) -> int:
        return FIRST + self.symbols

    def answer(self, length: int) -> int:
        return length

    def refuses(self, length: int) -> str:
        if length > self.symbols:
            return f"{self.name} has {self.symbols} symbols, which cannot make {length} different ones"
        return super().refuses(length)

    def ask(self, draw: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        found = draw.permutation(self.symbols)[:length]
        return found, found


@dataclass
class Sort(UniqueCopy):
    """Repeat n different numbers in ascending order."""

    name: str = "sort"

    def ask(self, draw: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        found = draw.permutation(self.symbols)[:length]
        return found, np.sort(found)


@dataclass
class RepeatCopy(BoardTask):
    """Repeat the input, n uniform bits: what follows a symbol depends on its position."""

    name: str = "repeat_copy"

    def answer(self, length: int) -> int:
        return length

    def ask(self, draw: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        found = draw.integers(2, size=length)
        return found, found


@dataclass
class Parity(BoardTask):
    """Is the number of ones even or odd? That number is uniform from 0 to n."""

    name: str = "parity"
    least: ClassVar[int] = 0
    alphabet: ClassVar[int] = 4  # 0, 1, even, odd
    chance: ClassVar[float] = 0.5

    def ask(self, draw: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        found = bits(draw, length, tie=True)
        return found, np.array([2 + found.sum() % 2])


@dataclass
class Addition(BoardTask):
    """The sum of two binary numbers, most significant bit first: `101+11=` has a length of 7.

    Neither number has leading zeros, and the split of the digits between them is uniform.
    """

    name: str = "addition"
    least: ClassVar[int] = 4
    alphabet: ClassVar[int] = 3  # 0, 1, +

    def answer(self, length: int) -> int:
        return length - 2

    def width(self, length: int) -> int:
        return super().width(length) - 1  # <sep> is the sign = of the length

    def ask(self, draw: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        first = int(draw.integers(1, length - 2))
        numbers = []
        for digits in (first, length - 2 - first):
            number = draw.integers(2, size=digits)
            number[0] = number[0] if digits == 1 else 1
            numbers.append(number)
        total = sum(int("".join(map(str, number)), 2) for number in numbers)
        return np.array([*numbers[0], 2, *numbers[1]]), np.array([int(digit) for digit in f"{total:b}"])


BOARD = (BinMajority, Majority, InterleavedMajority, UniqueCopy, RepeatCopy, Sort, Parity, Addition)
"""The board, in the order of its source."""
