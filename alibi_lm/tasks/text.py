"""A stream of text as a task: every token of a split is a target, exactly once, in either mode."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from alibi_lm.data.windows import cut_windows, scoring_batches, scoring_windows
from alibi_lm.distributed import World, shard
from alibi_lm.tasks.base import Batch, Task


@dataclass(frozen=True)
class TextTask(Task):
    """One split, in nonoverlapping or sliding windows.

    Args:
        tokens: (N,) integers; all are targets.
        start_id: input in front of the first target.
        stride: targets scored per window in sliding mode; None: nonoverlapping windows.
        documents: (D,) int64, where documents start; None: the stream is one document.
        split: name of the stream.
        corpus: 12 hex digits: text and tokenizer.
        sha256: of the tokens; empty: they are hashed.
        words: of the text, whatever the tokenizer.
        bytes: of the text.
    """

    tokens: np.ndarray
    start_id: int
    stride: int | None = None
    documents: np.ndarray | None = None
    split: str = "validation"
    corpus: str | None = None
    sha256: str = ""
    words: int | None = None
    bytes: int | None = None

    name = "text"
    about = (
        "Predict each token of a text from the tokens before it in a window. The value is the perplexity, exp of "
        "the mean nats per token. Nonoverlapping windows follow one another, so the first targets of each have "
        "little context. Sliding windows overlap, and each scores its last `stride` targets."
    )
    metrics = ("perplexity",)

    @property
    def mode(self) -> str:  # type: ignore[override]
        """`nonoverlapping` or `sliding`."""
        return "nonoverlapping" if self.stride is None else "sliding"

    @property
    def identity(self) -> str:
        digest = self.sha256 or hashlib.sha256(np.ascontiguousarray(self.tokens).tobytes()).hexdigest()
        return f"{digest} after {self.start_id}"

    def num_targets(self, length: int) -> int:
        return len(self.tokens)

    def groups(self, length: int) -> np.ndarray:
        return np.zeros(1, dtype=np.int64) if self.documents is None else np.asarray(self.documents)

    def refuses(self, length: int) -> str:
        if length > len(self.tokens):
            return f"the split has {len(self.tokens):,} tokens: no window of {length:,} is full"
        if self.stride is not None and self.stride > length:
            return f"stride = {self.stride} is longer than the window"
        return ""

    def batches(self, length: int, tokens_per_forward: int = 8192, world: World | None = None) -> Iterator[Batch]:
        share = shard(len(scoring_windows(len(self.tokens), length, self.stride)[0]), world or World())
        part = slice(share.start, share.stop)
        for one in scoring_batches(self.tokens, self.start_id, length, self.stride, tokens_per_forward, part):
            columns = np.arange(one.score_from, one.input_ids.shape[1])
            yield Batch(one.input_ids, one.target_ids, one.starts[:, None] + columns)

    def windows(
        self, starts: np.ndarray, width: int, score_from: int = 0, tokens_per_forward: int = 8192
    ) -> Iterator[Batch]:
        """The last targets of windows that may lie anywhere in the stream, numbered window by window.

        Args:
            starts: (windows,) integers, first target of each window.
            width: tokens of a window.
            score_from: targets before this column are context only.
            tokens_per_forward: tokens of a batch; one window at least.

        Raises:
            ValueError: a window that leaves the stream.
        """
        if len(starts) and (starts.min() < 0 or starts.max() + width > len(self.tokens)):
            raise ValueError(
                f"windows of {width} tokens reach from {starts.min()} to {starts.max() + width}, but the split "
                f"has {len(self.tokens)} tokens. Use shorter windows."
            )
        rows, scored = max(1, tokens_per_forward // width), width - score_from
        numbers = np.arange(len(starts) * scored).reshape(-1, scored)
        for i in range(0, len(starts), rows):
            inputs, targets = cut_windows(self.tokens, self.start_id, starts[i : i + rows], width)
            yield Batch(inputs, targets, numbers[i : i + rows])
