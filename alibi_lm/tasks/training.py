"""What a run is trained on and validated with: a text, or the items of a task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from alibi_lm.data.corpus import Corpus
from alibi_lm.data.tokenizers import TextTokenizer
from alibi_lm.data.windows import TrainingBatches
from alibi_lm.files import short_digest
from alibi_lm.settings import require
from alibi_lm.tasks.base import Task, TaskConfig
from alibi_lm.tasks.items import ItemBatches, ItemTask, Synthetic
from alibi_lm.tasks.needle import NeedleBatches, NeedleConfig, refuses
from alibi_lm.tasks.text import TextTask


class Batches(Protocol):
    """Training batches, each a function of seed and step only."""

    def batch(self, step: int, rows: slice = ...) -> tuple[Tensor, ...]:
        """Inputs and targets, (B, T) int64 each, and, where only some targets count, which: (B, T) bool."""
        ...

    def targets(self, step: int) -> int:
        """How many targets of a step count, over all rows."""
        ...


@dataclass(frozen=True)
class TrainingData:
    """What a run learns from.

    Attributes:
        name: description for the user.
        vocab_size: number of tokens of the model.
        manifest: contents of corpus.json; its digests are part of the run's identity.
        tokenizer: that of a text; None for a task.
        hash: hash of all data, for checkpoints.
        train_hash: hash of the data to train on, for finished.json.
        validation: the task to score at the training length.
        make_batches: (rows, seed) -> batches.
    """

    name: str
    vocab_size: int
    manifest: Mapping[str, Any]
    tokenizer: TextTokenizer | None
    hash: str
    train_hash: str
    validation: Task
    make_batches: Callable[[int, int], Batches]


def of_text(corpus: Corpus, length: int, task: TaskConfig) -> TrainingData:
    """A text in windows of `length` tokens, some with needles where that is the task.

    Raises:
        ValueError: the text is shorter than a window, or a window than a needle.
    """
    train, validation = corpus.split("train"), corpus.split("validation")
    require(
        length <= train.num_tokens,
        f"train_length = {length} is longer than the training text: {train.num_tokens} tokens.",
    )

    why = refuses(length) if isinstance(task, NeedleConfig) else ""
    require(not why, f"train_length = {length} with task=needle: {why}. Use a longer train_length.")

    def batches(rows: int, seed: int) -> Batches:
        if isinstance(task, NeedleConfig):
            return NeedleBatches(task, train.tokens, corpus.start_id, length, rows, seed, corpus.vocab_size)
        return TrainingBatches(train.tokens, corpus.start_id, length, rows, seed)

    return TrainingData(
        corpus.name,
        corpus.vocab_size + task.added_tokens,
        corpus.manifest,
        corpus.tokenizer,
        corpus.hash,
        train.hash,
        TextTask(validation.tokens, corpus.start_id),
        batches,
    )


def of_task(task: Synthetic, length: int) -> TrainingData:
    """Items of a task of up to `length`.

    Raises:
        ValueError: there are no such items.
    """
    why = task.refuses(length)
    require(not why, f"train_length = {length} with task={task.name}: {why}. Use another train_length or task.")
    validation = ItemTask(task, length, "validation")
    digest = short_digest(validation.identity)
    manifest = {"description": f"items of {task.name}", "task": validation.identity}
    return TrainingData(
        f"items of {task.name}",
        task.vocab_size,
        manifest,
        None,
        digest,
        digest,
        validation,
        lambda rows, seed: ItemBatches(task, length, rows, seed),
    )
