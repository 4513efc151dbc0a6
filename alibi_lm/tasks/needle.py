"""Needles in text: a fact that occurs once in a long text, and a question about it at the end.

`needle` is for language models that are trained here, even small ones: a share of their training sequences holds
a needle, in special tokens. It follows the single needle of RULER (Hsieh et al. 2024, arXiv 2404.06654) and the
passkey task, which both need a model that can answer a question in words.

    text ... <key> k1 k2 <is> v1 v2 v3 v4 ... text <ask> k1 k2 <is> v1 v2 v3 v4

`passkey` asks in words, as Mohtashami and Jaggi (2023, arXiv 2305.16300) and YaRN (Peng et al. 2023, arXiv
2309.00071) do; it needs a model that has learned to answer.

A length is the number of input tokens. An item is right if its whole answer is the model's first choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from alibi_lm.data.tokenizers import TextTokenizer
from alibi_lm.data.windows import TrainingBatches
from alibi_lm.files import short_digest
from alibi_lm.settings import require, require_at_least, setting
from alibi_lm.tasks.base import TaskConfig
from alibi_lm.tasks.items import HELD_OUT, Item, Items

SYMBOLS, VALUES = 10, 4
KEY, IS, ASK = SYMBOLS, SYMBOLS + 1, SYMBOLS + 2
"""Ids of the needle's other tokens, after the ten symbols; ids count from the end of the text's vocabulary."""
FRAME = 2 * (4 + VALUES)
"""Tokens of needle and question with its answer."""
NEEDLES = 3
"""First number in the seed of each training needle."""


@dataclass
class NeedleConfig(TaskConfig):
    """Language modelling in which some training sequences hold a needle."""

    name: str = "needle"
    share: float = 0.05
    """Share of the training sequences that hold a needle, in (0, 1]."""
    training_depths: int | None = setting(None, counts="run", before=11)
    """Number of evenly spaced depths at which needles stand in training; null: anywhere. With few depths a model
    can learn their distances by heart instead of looking for the needle."""
    depths: int = setting(11, counts="no")
    """Number of evenly spaced depths in tests, from the beginning (0) to the end of the text (1)."""
    draws: int = setting(20, counts="no")
    """Items per test at each depth and length."""

    added_tokens: ClassVar[int] = SYMBOLS + 3

    def __post_init__(self) -> None:
        require(0 < self.share <= 1, f"task.share = {self.share}. Use a number above 0, up to 1.")
        require_at_least("task.training_depths", self.training_depths, 2)
        require_at_least("task.depths", self.depths, 2)
        require_at_least("task.draws", self.draws, 1)


def refuses(length: int) -> str:
    """Why a sequence of this length cannot hold a needle; empty if it can."""
    return f"a needle and its question need {FRAME + 1} tokens or more" if length <= FRAME else ""


def with_needle(text: np.ndarray, first: int, depth: float, draw: np.random.Generator) -> np.ndarray:
    """Put a needle into a text and the question after it.

    Args:
        text: (n,) integers; its last tokens are dropped to make room.
        first: id of the first symbol.
        depth: 0 (the needle begins the sequence) to 1 (it comes right before the question).
        draw: generator of key and values.

    Returns:
        (n,) int64.
    """
    key, value = draw.integers(SYMBOLS, size=2), draw.integers(SYMBOLS, size=VALUES)
    filler = text[: len(text) - FRAME]
    place = round(depth * len(filler))
    fact, question = (np.array([sign, *key, IS, *value]) + first for sign in (KEY, ASK))
    return np.concatenate([filler[:place], fact, filler[place:], question]).astype(np.int64)


class NeedleBatches(TrainingBatches):
    """Training batches of a text in which a share of the sequences holds a needle, at all depths alike.

    Which ones, and what they hold, is a function of (seed, number of the sequence).

    Args:
        task: its settings.
        tokens, start_id, length, rows, seed: as in `TrainingBatches`.
        first: id of the first symbol.
    """

    def __init__(
        self, task: NeedleConfig, tokens: np.ndarray, start_id: int, length: int, rows: int, seed: int, first: int
    ) -> None:
        super().__init__(tokens, start_id, length, rows, seed)
        self.share, self.first = task.share, first
        self.steps = length - FRAME if task.training_depths is None else task.training_depths - 1
        """Depths are multiples of 1 / steps."""

    def batch(self, step: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        inputs, targets = (tensor.numpy().copy() for tensor in super().batch(step, rows))
        for row, number in enumerate(range(step * self.rows, (step + 1) * self.rows)[rows]):
            draw = np.random.default_rng([NEEDLES, self.seed, number])
            if draw.random() < self.share:
                depth = draw.integers(self.steps + 1) / self.steps
                targets[row] = with_needle(targets[row], self.first, depth, draw)
                inputs[row, 1:] = targets[row, :-1]
        return torch.from_numpy(inputs), torch.from_numpy(targets)


@dataclass(eq=False)
class NeedleTask(Items):
    """Needles at evenly spaced depths of a text that was not trained on."""

    task: NeedleConfig
    tokens: np.ndarray
    """(N,) integers, of the split."""
    start_id: int
    """Input in front of a sequence."""
    first: int
    """Id of the first symbol."""
    split: str
    """`validation` or `test`."""
    corpus: str
    """Hash of the text."""

    name = "needle"

    @property
    def identity(self) -> str:
        items = f"{self.task.draws} {self.task.depths}"
        return f"needles {items} in {self.corpus} after {self.start_id}, from {self.first}"

    def refuses(self, length: int) -> str:
        if length > len(self.tokens):
            return f"the split has {len(self.tokens):,} tokens: no window of {length:,} is full"
        return refuses(length)

    def draw(self, length: int) -> list[Item]:
        found = []
        for number in range(self.task.depths * self.task.draws):
            draw = np.random.default_rng([HELD_OUT[self.split], length, number])
            start = int(draw.integers(len(self.tokens) - length + 1))
            depth = number // self.task.draws / (self.task.depths - 1)
            targets = with_needle(self.tokens[start : start + length], self.first, depth, draw)
            counted = np.arange(length) >= length - VALUES
            found.append(Item(np.array([self.start_id, *targets[:-1]]), targets, counted))
        return found

    def in_reach(self, length: int, reach: int) -> np.ndarray:
        # When the first value is asked for, the needle's first token must be within reach.
        asked = length - VALUES
        starts = [int(np.flatnonzero(item.input_ids == self.first + KEY)[0]) for item in self.items(length)]
        return asked - np.array(starts) < reach

    def parts(self, length: int) -> dict[str, np.ndarray]:
        """Items by depth."""
        numbers, last = np.arange(self.task.depths * self.task.draws), self.task.depths - 1
        return {
            str(round(number / last, 3)): members
            for number, members in enumerate(numbers.reshape(self.task.depths, -1))
        }


class PasskeyTask(Items):
    """A number among repeated sentences, and a question about it: for models that can answer in words.

    Twenty items per length, each at a random depth; the number is uniform in 1 to 50,000 and stated twice.

    Args:
        tokenizer: the model's.
        split: `validation` or `test`, which have other items.
    """

    name = "passkey"
    COUNT = 20
    NUMBERS = range(10_007, 50_001, 101)
    """Numbers of five digits, of which the longest in tokens is taken for the longest of all."""
    BEFORE = "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it.\n"
    FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
    FACT = "The pass key is {number}. Remember it. {number} is the pass key.\n"
    QUESTION = "What is the pass key? The pass key is"

    def __init__(self, tokenizer: TextTokenizer, split: str) -> None:
        self.tokenizer, self.split = tokenizer, split
        self.corpus = short_digest(self.identity)
        # The room is that of the longest number: 50000 may be one token where 37281 is five.
        told = tokenizer.encode_batch([f" {number}" for number in self.NUMBERS])
        number = max(zip(map(len, told), self.NUMBERS, strict=True))[1]
        texts = [self.BEFORE, self.FILLER, self.FACT.format(number=number), self.QUESTION, f" {number}"]
        encoded = tokenizer.encode_batch(texts)
        self.sizes = [len(ids) for ids in encoded]
        self.unknown = any(tokenizer.unknown_id in ids for ids in encoded if tokenizer.unknown_id is not None)

    @property
    def identity(self) -> str:
        return f"passkey {self.COUNT} {self.split} of {self.tokenizer.hash}"

    def refuses(self, length: int) -> str:
        if self.unknown:
            return "the tokenizer has no words for the passkey task"
        least = sum(self.sizes) + 1
        return f"passkey needs {least} tokens or more with this tokenizer" if length < least else ""

    def draw(self, length: int) -> list[Item]:
        before, filler, fact, question, answer = self.sizes
        fillers = (length - before - fact - question - answer - 1) // filler
        found = []
        for number in range(self.COUNT):
            draw = np.random.default_rng([HELD_OUT[self.split], length, number])
            key, place = int(draw.integers(1, 50_001)), int(draw.integers(fillers + 1))
            text = self.BEFORE + self.FILLER * place + self.FACT.format(number=key)
            asked, told = self.tokenizer.encode_batch(
                [text + self.FILLER * (fillers - place) + self.QUESTION, f" {key}"]
            )
            tokens = np.concatenate([[self.tokenizer.start_id], asked, told]).astype(np.int64)
            counted = np.arange(len(tokens) - 1) >= len(asked)
            found.append(Item(tokens[:-1], tokens[1:], counted))
        return found
