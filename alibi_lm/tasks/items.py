"""Tasks made of items that are drawn from a seed and a number, in training and in tests.

Each item is one sequence. The loss and the score count only its answer, and an item is right if the model's
first choice is right at every target of the answer. This is equivalent to greedy decoding giving the answer,
because each target is predicted after the right ones before it.

    training item i        generator of (the run's seed, i)
    validation item i      generator of (a separate seed, i); lengths as in training
    test item i            likewise; lengths beyond those of training, the same items for every run
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from alibi_lm.distributed import World
from alibi_lm.files import short_digest
from alibi_lm.settings import require_at_least, setting
from alibi_lm.tasks.base import Batch, Task, TaskConfig

TRAINING, HELD_OUT = 0, {"validation": 1, "test": 2}
"""First number of every generator's seed, so that no test item comes from a training stream."""


class Item(NamedTuple):
    """One sequence."""

    input_ids: np.ndarray
    """(T,) int64."""
    target_ids: np.ndarray
    """(T,) int64; target t follows input t."""
    counted: np.ndarray
    """(T,) bool: the targets of the answer."""


@dataclass
class Synthetic(TaskConfig, ABC):
    """A task whose items are drawn, with its settings; its `name` is its entry in the config group `task`.

    Lengths are in the task's own unit, which its class names: symbols of the input, or tokens of the sequence.
    """

    name: str = ""
    validation_items: int = 500
    """Items per validation, of lengths as in training."""
    stop_when_solved: bool = True
    """End training when every item of a validation is right."""
    items: int = setting(2000, counts="no")
    """Items per test at each length."""

    least: ClassVar[int] = 1
    """Shortest length."""
    by_target: ClassVar[bool] = False
    """Whether each target of an answer is judged by itself."""

    def __post_init__(self) -> None:
        for name in ("validation_items", "items"):
            value = getattr(self, name)
            require_at_least(f"task.{name}", value, 1)

    @property
    def chance(self) -> float:
        """Accuracy of the best constant answer to long inputs."""
        return 0.0

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Tokens of the task; id 0 also fills the ends of short sequences."""

    @abstractmethod
    def width(self, length: int) -> int:
        """Largest number of input tokens in an item of this length."""

    @abstractmethod
    def lengths(self, length: int, train_length: int | None) -> Sequence[int]:
        """Lengths that items are drawn from: in training and validation (None), or in a test at `length`."""

    @abstractmethod
    def item(self, draw: np.random.Generator, length: int) -> Item:
        """Draw an item of exactly this length."""

    @abstractmethod
    def in_reach(self, item: Item, reach: int) -> np.ndarray:
        """Which answers are right that use only the end of the input, `reach` long in the unit of lengths.

        (1,) bool, or one for each target of the answer if they are judged by themselves.
        """

    def refuses(self, length: int) -> str:
        """Why there are no items of this length; empty if there are."""
        return f"{self.name} needs a length of {self.least} or more" if length < self.least else ""

    def draw(self, seed: Sequence[int], length: int, train_length: int | None = None) -> Item:
        """The item of a generator's seed, with one of the `lengths`."""
        draw = np.random.default_rng(seed)
        lengths = self.lengths(length, train_length)
        return self.item(draw, int(lengths[int(draw.integers(len(lengths)))]))


def answered(question: np.ndarray, answer: np.ndarray) -> Item:
    """The item of a question and its answer, (length,) int64 each; only the answer counts."""
    tokens = np.concatenate([question, answer]).astype(np.int64)
    counted = np.zeros(len(tokens) - 1, dtype=bool)
    counted[len(question) - 1 :] = True
    return Item(tokens[:-1], tokens[1:], counted)


def stack(items: Sequence[Item]) -> tuple[Tensor, Tensor, Tensor]:
    """A batch of items, padded with zeros that do not count: input ids, target ids (int64), bool; (B, longest)."""
    shape = len(items), max(len(item.input_ids) for item in items)
    both, counted = np.zeros((2, *shape), dtype=np.int64), np.zeros(shape, dtype=bool)
    for row, item in enumerate(items):
        width = len(item.input_ids)
        both[0, row, :width], both[1, row, :width], counted[row, :width] = item
    return torch.from_numpy(both[0]), torch.from_numpy(both[1]), torch.from_numpy(counted)


class ItemBatches:
    """Training batches of a task: batch n holds items n * rows to (n + 1) * rows - 1 of the seed."""

    def __init__(self, task: Synthetic, length: int, rows: int, seed: int) -> None:
        self.task, self.length, self.rows, self.seed = task, length, rows, seed
        self._kept: tuple[int, tuple[Tensor, ...]] = (-1, ())

    def batch(self, step: int, rows: slice = slice(None)) -> tuple[Tensor, ...]:
        """Inputs, targets and which targets count, as in `stack`, of some rows of a step."""
        if self._kept[0] != step:
            numbers = range(step * self.rows, (step + 1) * self.rows)
            self._kept = step, stack([self.task.draw([TRAINING, self.seed, n], self.length) for n in numbers])
        return tuple(tensor[rows] for tensor in self._kept[1])

    def targets(self, step: int) -> int:
        """How many targets of a step count, over all rows."""
        return int(self.batch(step)[2].sum())


class Items(Task):
    """A list of items at each length, as a task for the scorer. A subclass makes the list (`draw`)."""

    metrics = ("accuracy",)
    mode = "items"
    by_target = False
    """Whether each target of an answer is judged by itself."""
    _kept: tuple[int, list[Item]] = (0, [])

    @abstractmethod
    def draw(self, length: int) -> list[Item]:
        """All items at a length."""

    def in_reach(self, length: int, reach: int) -> np.ndarray | None:
        """Which answers a perfect reader of only the last `reach` tokens gives: (G,) bool, like `groups`.

        None if that is not known. Such a reader needs no reach to score their mean, so what shows the reach of a
        model is its accuracy on the other answers.
        """
        return None

    def items(self, length: int) -> list[Item]:
        """The same; the items of the last length asked for are cached."""
        if self._kept[0] != length:
            self._kept = length, self.draw(length)
        return self._kept[1]

    def num_targets(self, length: int) -> int:
        return 1 if self.refuses(length) else int(sum(item.counted.sum() for item in self.items(length)))

    def groups(self, length: int) -> np.ndarray:
        counts = [int(item.counted.sum()) for item in self.items(length)]
        return np.arange(sum(counts)) if self.by_target else np.cumsum([0, *counts[:-1]])

    def batches(self, length: int, tokens_per_forward: int = 8192, world: World | None = None) -> Iterator[Batch]:
        world = world or World()
        items = self.items(length)
        firsts = np.cumsum([0, *(item.counted.sum() for item in items[:-1])])
        own = range(world.rank, len(items), world.world_size)
        rows = max(1, tokens_per_forward // self.width(length))
        for start in range(0, len(own), rows):
            indices = own[start : start + rows]
            inputs, targets, counted = stack([items[index] for index in indices])
            mask = counted.numpy()
            numbers = np.where(mask, np.cumsum(mask, axis=1) - 1 + firsts[list(indices)][:, None], -1)
            # Targets before the first answer of the batch need no scores.
            yield Batch(inputs, targets, numbers[:, int(mask.any(axis=0).argmax()) :])


class ItemTask(Items):
    """The items of a validation or of a test.

    Args:
        task: its settings.
        train_length: L.
        split: `validation`, whose items are of training lengths, or `test`.
    """

    def __init__(self, task: Synthetic, train_length: int, split: str = "test") -> None:
        self.task, self.train_length, self.split, self.name = task, train_length, split, task.name
        self.by_target = task.by_target
        self.count = task.items if split == "test" else task.validation_items
        self.corpus = short_digest(self.identity)

    @property
    def identity(self) -> str:
        settings = {k: v for k, v in asdict(self.task).items() if k not in ("items", "validation_items")}
        return f"{settings} {self.split} {self.count} items, trained at {self.train_length}"

    def width(self, length: int) -> int:
        return self.task.width(length)

    def draw(self, length: int) -> list[Item]:
        first, beyond = HELD_OUT[self.split], self.train_length if self.split == "test" else None
        return [self.task.draw([first, length, index], length, beyond) for index in range(self.count)]

    def in_reach(self, length: int, reach: int) -> np.ndarray:
        return np.concatenate([self.task.in_reach(item, reach) for item in self.items(length)])

    def refuses(self, length: int) -> str:
        return self.task.refuses(length)
