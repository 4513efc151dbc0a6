"""Recall from the context: many key-value pairs among filler (MQAR), and one pair (induction).

A length is the number of input tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from alibi_lm.settings import require, require_at_least
from alibi_lm.tasks.items import Item, Synthetic

GAP_POWER = 0.01
"""Exponent of the power law of the gaps between the pairs and their queries."""


@dataclass
class OverTokens(Synthetic):
    """Items whose length is their number of tokens; all items at a length are equally long."""

    vocabulary: int = 16
    """Number of different tokens."""

    @property
    def vocab_size(self) -> int:
        return self.vocabulary

    def width(self, length: int) -> int:
        return length

    def lengths(self, length: int, train_length: int | None) -> Sequence[int]:
        return [length]


@dataclass
class MQAR(OverTokens):
    """Multi-query associative recall: n pairs of a key and a value, then each key again somewhere in filler.

    All keys differ, and so do all values. Slots of two tokens follow the pairs; n of them hold a key each, chosen
    without replacement with probability proportional to a g^(a - 1) at the g-th slot, a = 0.01. The target at the
    key is its value. All other tokens there are uniform over the vocabulary.

    Source: Arora et al. (2023), "Zoology", arXiv 2312.04927, and its code (github.com/HazyResearch/zoology).
    Every query is judged separately, as there.
    """

    name: str = "mqar"
    vocabulary: int = 8192
    """Number of different tokens: keys in the lower half, values in the upper."""
    pairs: int = 8
    """Key-value pairs per sequence."""
    by_target: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least("task.pairs", self.pairs, 1)
        require(
            self.vocabulary >= 2 * self.pairs + 2,
            f"task.vocabulary = {self.vocabulary} has no {self.pairs} different keys and values. "
            f"Use at least {2 * self.pairs + 2}, or fewer pairs.",
        )

    @property
    def chance(self) -> float:
        return 1 / (self.vocabulary - self.vocabulary // 2)

    def in_reach(self, item: Item, reach: int) -> np.ndarray:
        found = []
        for place in np.flatnonzero(item.counted):
            # A key occurs first in its pair; its value follows.
            pair = int(np.flatnonzero(item.input_ids == item.input_ids[place])[0])
            found.append(place - pair < reach)
        return np.array(found)

    def refuses(self, length: int) -> str:
        least = 4 * self.pairs  # the pairs, and a slot of two tokens for each query
        return f"{self.name} with {self.pairs} pairs needs {least} tokens or more" if length < least else ""

    def item(self, draw: np.random.Generator, length: int) -> Item:
        return self.recall(draw, length, self.pairs)

    def recall(self, draw: np.random.Generator, length: int, pairs: int) -> Item:
        """Draw an item with a number of pairs."""
        half = self.vocabulary // 2
        keys = 1 + draw.choice(half - 1, pairs, replace=False)
        values = half + draw.choice(self.vocabulary - half, pairs, replace=False)
        slots = (length - 2 * pairs) // 2
        weights = GAP_POWER * np.arange(1, slots + 1) ** (GAP_POWER - 1)
        # The n smallest of exponential variables with these rates: equal to drawing without replacement.
        places = 2 * pairs + 2 * np.argsort(draw.exponential(size=slots) / weights)[:pairs]
        tokens = draw.integers(self.vocabulary, size=length + 1)
        tokens[: 2 * pairs : 2], tokens[1 : 2 * pairs : 2] = keys, values
        tokens[places] = keys
        targets, counted = tokens[1:].copy(), np.zeros(length, dtype=bool)
        targets[places], counted[places] = values, True
        return Item(tokens[:-1], targets, counted)


@dataclass
class MQARExtrapolate(MQAR):
    """MQAR longer than trained: the same pairs, more filler.

    Half of the training sequences have L / 2 tokens and half of the pairs, the others L tokens and all pairs. A
    test has all pairs.
    """

    name: str = "mqar_extrapolate"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.pairs >= 2, f"task.pairs = {self.pairs}. Use at least 2: short sequences have half of them.")

    def draw(self, seed: Sequence[int], length: int, train_length: int | None = None) -> Item:
        draw = np.random.default_rng(seed)
        # Half the length goes with half the pairs, so `item`, which knows only the length, cannot be used.
        short = train_length is None and bool(draw.integers(2))
        return self.recall(draw, length // 2 if short else length, self.pairs // 2 if short else self.pairs)


@dataclass
class Induction(OverTokens):
    """Induction: a special token occurs in uniform tokens and again at the end; what followed it is the answer.

    Source: Fu et al. (2023), "Hungry Hungry Hippos", arXiv 2212.14052, section 3.1, with the settings of Gu and
    Dao (2023), arXiv 2312.00752, section 4.1.2: 16 tokens, trained at 256, tested at multiples of it.
    """

    name: str = "induction"
    vocabulary: int = 16
    """Number of different tokens, including the special one (0)."""
    least: ClassVar[int] = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.vocabulary >= 3,
            f"task.vocabulary = {self.vocabulary}. Use at least 3: the special one and two answers.",
        )

    @property
    def chance(self) -> float:
        return 1 / (self.vocabulary - 1)

    def in_reach(self, item: Item, reach: int) -> np.ndarray:
        first, last = np.flatnonzero(item.input_ids == 0)
        return np.array([last - first < reach])

    def item(self, draw: np.random.Generator, length: int) -> Item:
        tokens = draw.integers(1, self.vocabulary, size=length)
        place = int(draw.integers(length - 2))
        tokens[place] = tokens[-1] = 0
        targets, counted = np.append(tokens[1:], tokens[place + 1]), np.zeros(length, dtype=bool)
        counted[-1] = True
        return Item(tokens, targets, counted)
