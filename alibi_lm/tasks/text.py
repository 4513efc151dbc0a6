"""A stream of text as a task: every token of a split is a target, exactly once, in either mode."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from alibi_lm.data.windows import cut_windows, scoring_windows
from alibi_lm.distributed import World, shard
from alibi_lm.tasks.base import Batch, Task


@dataclass(frozen=True)
class TextTask(Task):
    """One split, in nonoverlapping or sliding windows. Attributes beyond these are as in `Task`.

    Args:
        tokens: (N,) integers; all are targets.
        start_id: input in front of the first target.
        stride: targets scored per window in sliding mode; None: nonoverlapping windows.
        documents: (D,) int64, where documents start; None: the stream is one document.
        sha256: hash of the tokens; empty: computed here.
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
        windows = scoring_windows(len(self.tokens), length, self.stride)
        share = shard(len(windows[0]), world or World())
        starts, scored, ends = (part[share.start : share.stop] for part in windows)
        # Windows of one shape (number of tokens, and how many are context only) are batched together.
        shapes = np.stack([ends - starts, scored - starts], axis=1)
        borders = np.flatnonzero((shapes[1:] != shapes[:-1]).any(axis=1)) + 1
        for group in np.split(np.arange(len(starts)), borders):
            if len(group):
                width, context = (int(v) for v in shapes[group[0]])
                yield from self._cut(starts[group], width, context, starts[group], tokens_per_forward)

    def windows(
        self, starts: np.ndarray, width: int, score_from: int = 0, tokens_per_forward: int = 8192
    ) -> Iterator[Batch]:
        """The last targets of windows that may lie anywhere in the stream, numbered window by window.

        Args:
            starts: (windows,) integers, first target of each window.
            width: tokens of a window.
            score_from: targets before this column are context only.
            tokens_per_forward: tokens per batch; at least one window.

        Raises:
            ValueError: a window that leaves the stream.
        """
        if len(starts) and (starts.min() < 0 or starts.max() + width > len(self.tokens)):
            raise ValueError(
                f"windows of {width} tokens reach from {starts.min()} to {starts.max() + width}, but the split "
                f"has {len(self.tokens)} tokens. Use shorter windows."
            )
        first = np.arange(len(starts)) * (width - score_from) - score_from
        return self._cut(starts, width, score_from, first, tokens_per_forward)

    def _cut(
        self, starts: np.ndarray, width: int, score_from: int, numbers: np.ndarray, tokens_per_forward: int
    ) -> Iterator[Batch]:
        """Batches of windows of one shape; `numbers` (windows,) are those of the targets of the first column."""
        rows = max(1, tokens_per_forward // width)
        for i in range(0, len(starts), rows):
            inputs, targets = cut_windows(self.tokens, self.start_id, starts[i : i + rows], width)
            yield Batch(inputs, targets, numbers[i : i + rows, None] + np.arange(score_from, width))
