"""What the evaluator asks of a task: sequences, which of their targets count, and what its result is called.

A task numbers its targets 0, 1, ... and gives them out in batches of any shape; by the numbers the scorer checks
that each is scored exactly once. Targets that are judged together (a document of a text, the answer of an item)
have consecutive numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from alibi_lm.distributed import World


@dataclass
class TaskConfig:
    """What a run is trained on: here its text alone. Tasks have subclasses of this class."""

    name: str = "text"

    added_tokens: ClassVar[int] = 0
    """Tokens that a model has besides those of its text."""

    def width(self, length: int) -> int:
        """Largest number of input tokens in a training sequence of this length."""
        return length


@dataclass(frozen=True)
class Batch:
    """Sequences of one length.

    Attributes:
        input_ids: (B, T) int64, on the CPU.
        target_ids: (B, T) int64; target t follows input t.
        numbers: (B, T') int64: numbers of the last T' targets of each row, -1 for one that does not count. Earlier
            targets are context only.
    """

    input_ids: Tensor
    target_ids: Tensor
    numbers: np.ndarray

    @property
    def score_from(self) -> int:
        """Targets before this column are context only."""
        return self.input_ids.shape[1] - self.numbers.shape[1]


class Task(ABC):
    """One task, with everything that its targets depend on.

    Attributes:
        name: in result rows and file names.
        metrics: `perplexity` (per target), `accuracy` (share of groups whose targets are all the model's first
            choice), or both.
        mode: how targets get their context, see `ResultRow.mode`.
        stride: in sliding mode, else None.
        split: `validation` or `test`.
        corpus: 12 hex digits, a hash of the text or of what the items are drawn from.
        words: number of words of the text, separated by white space; None if that means nothing.
        bytes: number of bytes of the text, likewise.
    """

    name: str
    metrics: tuple[str, ...] = ("perplexity",)
    mode: str = "items"
    stride: int | None = None
    split: str = "validation"
    corpus: str | None = None
    words: int | None = None
    bytes: int | None = None

    @property
    @abstractmethod
    def identity(self) -> str:
        """What targets and inputs depend on besides the length; part of the key of stored results."""

    def width(self, length: int) -> int:
        """Largest number of input tokens at an inference length, which a task may count in its own units."""
        return length

    @abstractmethod
    def num_targets(self, length: int) -> int:
        """How many targets count at an inference length."""

    @abstractmethod
    def groups(self, length: int) -> np.ndarray:
        """(G,) int64, rising from 0: the first target of each document or item."""

    @abstractmethod
    def batches(self, length: int, tokens_per_forward: int = 8192, world: World | None = None) -> Iterator[Batch]:
        """All targets, each in exactly one batch; with several processes, this one's share.

        Args:
            length: the inference length.
            tokens_per_forward: tokens per batch; at least one sequence.
            world: the processes that share the work.
        """

    def parts(self, length: int) -> dict[str, np.ndarray]:
        """Subsets of groups that are also reported, by name: (n,) int64 indices into `groups`; mostly none."""
        return {}

    def refuses(self, length: int) -> str:
        """Why there is nothing to measure at this length; empty if there is something."""
        return ""
