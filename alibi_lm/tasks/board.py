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

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from alibi_lm.settings import require_at_least
from alibi_lm.tasks.items import Item, Synthetic, answered

BOS, SEP, EOS, FIRST = 0, 1, 2, 3
"""Ids of the layout's tokens, and of the first symbol."""
PLUS = 2
"""The sign + among the symbols of an addition."""


@dataclass
class BoardTask(Synthetic):
    """What the eight share. A subclass says what is asked, what is right, and how long an answer may be."""

    alphabet: ClassVar[int] = 2
    """Symbols of input and answer together."""

    @property
    def vocab_size(self) -> int:
        return FIRST + self.alphabet

    def answer(self, length: int) -> int:
        """Largest number of symbols in an answer."""
        return 1

    @abstractmethod
    def question(self, draw: np.random.Generator, length: int) -> np.ndarray:
        """An input as symbols counted from 0: (length,) integers."""

    @abstractmethod
    def solve(self, symbols: np.ndarray) -> np.ndarray:
        """The answer to an input, or the best one that the end of an input allows: (n,) -> (answer,) integers."""

    def width(self, length: int) -> int:
        return length + self.answer(length) + 2  # <eos> is a target only

    def lengths(self, length: int, train_length: int | None) -> Sequence[int]:
        first = length - train_length + 1 if train_length is not None and length > train_length else self.least
        return range(max(first, self.least), length + 1)

    def item(self, draw: np.random.Generator, length: int) -> Item:
        symbols = self.question(draw, length)
        answer = self.solve(symbols)
        return answered(np.array([BOS, *(symbols + FIRST), SEP]), np.array([*(answer + FIRST), EOS]))

    def in_reach(self, item: Item, reach: int) -> np.ndarray:
        symbols = item.input_ids[1 : len(item.input_ids) - int(item.counted.sum())] - FIRST
        answer = item.target_ids[item.counted][:-1] - FIRST
        return np.array([np.array_equal(self.solve(symbols[-reach:]), answer)])


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

    def question(self, draw: np.random.Generator, length: int) -> np.ndarray:
        return bits(draw, length)

    def solve(self, symbols: np.ndarray) -> np.ndarray:
        return np.array([int(2 * symbols.sum() > len(symbols))])

    @property
    def chance(self) -> float:
        return 0.5


@dataclass
class Majority(BoardTask):
    """Which of 26 letters occurs most often? Letters are uniform; inputs with two such letters are redrawn."""

    name: str = "majority"
    alphabet: ClassVar[int] = 26

    def question(self, draw: np.random.Generator, length: int) -> np.ndarray:
        while True:
            found = draw.integers(self.alphabet, size=length)
            counts = np.bincount(found, minlength=self.alphabet)
            if (counts == counts.max()).sum() == 1:
                return found

    def solve(self, symbols: np.ndarray) -> np.ndarray:
        return np.array([np.bincount(symbols, minlength=self.alphabet).argmax()])

    @property
    def chance(self) -> float:
        return 1 / self.alphabet


@dataclass
class InterleavedMajority(BoardTask):
    """Three bit strings of equal length take turns; the answer is the more frequent bit of each.

    A length that is not a multiple of 3 is rounded down.
    """

    name: str = "interleaved_majority"
    least: ClassVar[int] = 3

    def answer(self, length: int) -> int:
        return 3

    def question(self, draw: np.random.Generator, length: int) -> np.ndarray:
        return np.stack([bits(draw, length // 3) for _ in range(3)]).T.ravel()

    def solve(self, symbols: np.ndarray) -> np.ndarray:
        strings = symbols[len(symbols) % 3 :].reshape(-1, 3)
        return (2 * strings.sum(axis=0) > len(strings)).astype(np.int64)

    @property
    def chance(self) -> float:
        return 0.125


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

    def question(self, draw: np.random.Generator, length: int) -> np.ndarray:
        return draw.permutation(self.symbols)[:length]

    def solve(self, symbols: np.ndarray) -> np.ndarray:
        return symbols


@dataclass
class Sort(UniqueCopy):
    """Repeat n different numbers in ascending order."""

    name: str = "sort"

    def solve(self, symbols: np.ndarray) -> np.ndarray:
        return np.sort(symbols)


@dataclass
class RepeatCopy(BoardTask):
    """Repeat the input, n uniform bits: what follows a symbol depends on its position."""

    name: str = "repeat_copy"

    def answer(self, length: int) -> int:
        return length

    def question(self, draw: np.random.Generator, length: int) -> np.ndarray:
        return draw.integers(2, size=length)

    def solve(self, symbols: np.ndarray) -> np.ndarray:
        return symbols


@dataclass
class Parity(BoardTask):
    """Is the number of ones even or odd? That number is uniform from 0 to n."""

    name: str = "parity"
    least: ClassVar[int] = 0
    alphabet: ClassVar[int] = 4  # 0, 1, even, odd

    def question(self, draw: np.random.Generator, length: int) -> np.ndarray:
        return bits(draw, length, tie=True)

    def solve(self, symbols: np.ndarray) -> np.ndarray:
        return np.array([2 + symbols.sum() % 2])

    @property
    def chance(self) -> float:
        return 0.5


@dataclass
class Addition(BoardTask):
    """The sum of two binary numbers, most significant bit first: `101+11=` has a length of 7.

    Neither number has leading zeros, and the split of the digits between them is uniform.
    """

    name: str = "addition"
    least: ClassVar[int] = 4
    alphabet: ClassVar[int] = 3  # 0, 1, PLUS

    def answer(self, length: int) -> int:
        return length - 2

    def width(self, length: int) -> int:
        return super().width(length) - 1  # <sep> is the sign = of the length

    def question(self, draw: np.random.Generator, length: int) -> np.ndarray:
        first = int(draw.integers(1, length - 2))
        numbers = []
        for digits in (first, length - 2 - first):
            number = draw.integers(2, size=digits)
            number[0] = number[0] if digits == 1 else 1
            numbers.append(number)
        return np.array([*numbers[0], PLUS, *numbers[1]])

    def solve(self, symbols: np.ndarray) -> np.ndarray:
        numbers = "".join("+" if symbol == PLUS else str(symbol) for symbol in symbols).split("+")
        return np.array([int(digit) for digit in f"{sum(int(number or '0', 2) for number in numbers):b}"])


BOARD = (BinMajority, Majority, InterleavedMajority, UniqueCopy, RepeatCopy, Sort, Parity, Addition)
"""The board, in the order of its source."""
