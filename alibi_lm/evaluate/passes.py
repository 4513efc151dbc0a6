"""Forward passes that rows and views are made of: standard, windowed, reset, fixed context, shifted positions.

Each gives the nats of single targets. Passes are kept in the token store by what they depend on, so that
evaluations and analyses never compute the same pass twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch

from alibi_lm import runtime
from alibi_lm.data.windows import positions_in_window
from alibi_lm.distributed import World, gather_objects
from alibi_lm.evaluate.score import score
from alibi_lm.evaluate.store import Scoring, Stored, TokenStore
from alibi_lm.model.interface import LanguageModel
from alibi_lm.tasks.base import Batch, Task
from alibi_lm.tasks.text import TextTask


class OutOfMemory(ValueError):
    """A pass needs more memory than there is; the message says at which length, and what the system said."""


class NotServed(ValueError):
    """The position scheme refuses a length, as xpos does where its powers overflow; the message is its own."""


@contextmanager
def enough_memory(what: str) -> Iterator[None]:
    """Turn an error about memory into one that says what did not fit.

    Raises:
        OutOfMemory: there was not enough memory for what is done inside.
    """
    message = ""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not runtime.out_of_memory(error):
            raise
        said = str(error).strip() or "no details"
        message = f"out of memory {what}: {said.splitlines()[0]}"
    if message:  # outside of the except clause: the first error would keep the tensors of the pass alive
        torch.cuda.empty_cache()
        raise OutOfMemory(message)


@dataclass
class Passes:
    """The passes of one model over one task.

    Attributes:
        model: ready to score.
        task: a text, for all passes except `result`.
        store: where results are kept and looked up; None: nowhere.
        tokens_per_forward: tokens per forward pass; at least one sequence.
        world: processes that share a pass.
        scheme: name of the model's position scheme, for messages; empty: not known.
    """

    model: LanguageModel
    task: Task
    store: TokenStore | None = None
    tokens_per_forward: int = 8192
    world: World | None = None
    scheme: str = ""

    @property
    def text(self) -> TextTask:
        """The task, which must be a text."""
        assert isinstance(self.task, TextTask)
        return self.task

    def refuses(self, length: int, window: bool = False, positions: bool = False) -> str:
        """Why sequences cannot be scored in this way; empty if they can.

        Args:
            length: tokens of a sequence, or highest position + 1.
            window: whether attention is limited.
            positions: whether positions begin elsewhere than at 0.
        """
        limit = self.model.max_length
        if limit is not None and length > limit:
            name = f"position={self.scheme}" if self.scheme else self.model.label
            return f"{name} has {limit} positions"
        for capability, wanted in (("window", window), ("positions", positions)):
            if wanted and (reason := self.model.refuses(capability)):
                return reason
        return ""

    def result(self, length: int, window: int | None = None, task: Task | None = None) -> Stored:
        """All targets of the task (or of `task`, another way of cutting the same text) at a length.

        With a `window` each layer sees only keys at distances below it.
        """
        task = task or self.task
        return self.kept(
            Scoring(task.split, task.mode, length, task.stride, window, task=task.name),
            lambda: task.batches(length, self.tokens_per_forward, self.world),
            task.num_targets(length),
            window=window,
            hits="accuracy" in task.metrics,
            world=self.world,
        )

    def nats(self, length: int, stride: int | None = None, window: int | None = None) -> np.ndarray:
        """Nats of every target in a standard evaluation, or with each layer's attention limited: (N,) float32."""
        return self.result(length, window, replace(self.text, stride=None if stride == length else stride)).nats

    def reset(self, length: int, train_length: int, stride: int = 1) -> np.ndarray:
        """Nats of every target of nonoverlapping windows, with at most the last tokens as input.

        A target at position p <= train_length (counted from 1) has the p tokens of its window as input, as
        in the full pass. A later target has the last train_length tokens, with positions from 0. With a
        stride it has between train_length - stride + 1 and train_length, as in a sliding evaluation. The stride
        does not affect targets at p <= train_length.

        Args:
            length: n, tokens per window.
            train_length: L, the largest number of input tokens.
            stride: targets that share a forward pass, from 1 to L.

        Returns:
            (N,) float32.
        """
        positions = positions_in_window(len(self.text.tokens), length)
        beyond = positions > train_length
        # A sliding window never reaches back past train_length tokens, so never past the longer window's start.
        nats = np.array(self.nats(train_length, stride)) if beyond.any() else np.zeros(len(beyond), np.float32)
        nats[~beyond] = self._heads(length, train_length, ~beyond)
        return nats

    def _heads(self, length: int, train_length: int, early: np.ndarray) -> np.ndarray:
        """Nats of the first train_length targets of every window of `length`: (early.sum(),)."""
        if length % train_length == 0 or length < train_length:
            # These windows begin where windows of the shorter length begin.
            return self.nats(min(length, train_length))[early]
        num_tokens = len(self.text.tokens)
        starts = np.arange(0, num_tokens, length)
        whole = starts[starts + train_length <= num_tokens]
        scored = len(whole) * train_length
        rest = num_tokens - int(starts[-1]) if len(whole) < len(starts) else 0

        def batches() -> Iterable[Batch]:
            yield from self.text.windows(whole, train_length, tokens_per_forward=self.tokens_per_forward)
            if rest:
                for one in self.text.windows(starts[-1:], rest):
                    yield replace(one, numbers=one.numbers + scored)

        return self.kept(Scoring(self.text.split, "heads", train_length, length), batches, scored + rest).nats

    def fixed(self, context: int, targets: np.ndarray, every: int) -> np.ndarray:
        """Nats of single targets, each with exactly `context` tokens of input.

        Args:
            context: tokens of input, positions 0 to context - 1.
            targets: (M,) integers, at least context - 1, evenly spaced in the stream.
            every: their spacing.

        Returns:
            (M,) float32.
        """
        return self.kept(
            Scoring(self.text.split, "fixed", context, every, first=int(targets[0])),
            lambda: self.text.windows(targets - context + 1, context, context - 1, self.tokens_per_forward),
            len(targets),
        ).nats

    def shifted(self, width: int, starts: np.ndarray, offset: int) -> np.ndarray:
        """Nats of all targets of some windows whose positions begin at `offset`: (windows, width) float32."""
        self.model.serve(width)
        batches = self.text.windows(starts, width, tokens_per_forward=self.tokens_per_forward)
        return score(self.model, batches, width * len(starts), offset=offset).nats.reshape(-1, width)

    def kept(
        self,
        scoring: Scoring,
        batches: Callable[[], Iterable[Batch]],
        num_targets: int,
        window: int | None = None,
        hits: bool = False,
        world: World | None = None,
    ) -> Stored:
        """The stored result, or a new one; `world` is given if the batches are this process's share.

        Raises:
            NotServed: the position scheme is not defined at this length.
            OutOfMemory: there is not enough memory for the pass.
        """
        model = self.model
        identity = {"model": model.identity, "targets": self.task.identity}
        store = self.store if model.identity else None
        found = store.read(model.label, scoring, identity, hits) if store else None
        # Processes may see different disks, and a pass needs all of them.
        if all(gather_objects(found is not None, self.world or World())):
            assert found is not None
            return found
        started = time.perf_counter()
        runtime.reset_peak_memory(model.device)
        label = f"{model.label}: {scoring.mode} @ {scoring.length}"
        with enough_memory(f"at {scoring.length} tokens"):
            try:
                model.serve(self.task.width(scoring.length))
            except ValueError as error:
                raise NotServed(str(error)) from None
            scored = score(model, batches(), num_targets, hits=hits, window=window, world=world, progress=label)
        seconds, memory = time.perf_counter() - started, runtime.peak_memory_bytes(model.device)
        result = Stored(scored.nats.astype(np.float32), scored.hits, seconds, memory, runtime.code_version()[0])
        # Results that are not finite are not kept: their cause may be gone by the next call.
        if store and (self.world or World()).is_main and bool(np.isfinite(result.nats).all()):
            store.write(model.label, scoring, identity, result)
        return result
