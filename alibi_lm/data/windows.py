"""From a token stream to training batches and scoring windows: pure functions of their arguments.

Both cut the stream in the same way: the inputs of a block are the tokens before its targets *in the stream*, so
that every target has at least one token of context. Only the first target of the stream is predicted from the
start token (`</s>` or `<|endoftext|>`).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from alibi_lm.settings import require_at_least


def cut_windows(tokens: np.ndarray, start_id: int, starts: np.ndarray, width: int) -> tuple[Tensor, Tensor]:
    """Windows of a stream: each target with the token before it as input.

    Args:
        tokens: (N,) integers.
        start_id: input in front of the stream's first target.
        starts: (B,) integers, index of each window's first target.
        width: targets per window.

    Returns:
        inputs, targets: (B, width) int64, on the CPU.
    """
    chunk = tokens[starts[:, None] + np.arange(-1, width)].astype(np.int64)
    chunk[starts == 0, 0] = start_id
    both = torch.from_numpy(chunk)
    return both[:, :-1], both[:, 1:]


class TrainingBatches:
    """Batches of fixed blocks of the training stream, in the authors' order.

    The stream is cut into blocks of `length` targets at fixed borders (a shorter last block is left out). Which
    blocks share a batch is drawn once from the seed; the order of the batches is drawn in each epoch from
    (seed, epoch), as in fairseq. So batch n is a function of (seed, n) only.

    Args:
        tokens: (N,) integers.
        start_id: input in front of the stream's first target.
        length: targets per block.
        rows: blocks per batch.
        seed: >= 0.

    Raises:
        ValueError: the stream is too short for one batch.
    """

    def __init__(self, tokens: np.ndarray, start_id: int, length: int, rows: int, seed: int) -> None:
        self.tokens, self.start_id, self.length, self.rows, self.seed = tokens, start_id, length, rows, seed
        num_blocks = len(tokens) // length
        self.batches_per_epoch = num_blocks // rows
        if self.batches_per_epoch == 0:
            raise ValueError(
                f"tokens_per_step = {rows * length} is more than the training text holds in whole blocks of "
                f"train_length = {length}: {num_blocks * length} tokens. Use a smaller tokens_per_step or a "
                "longer text."
            )
        composition = np.random.default_rng([seed, 0]).permutation(num_blocks)
        self.composition = composition[: self.batches_per_epoch * rows].reshape(-1, rows)
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def blocks(self, step: int) -> np.ndarray:
        """Block numbers of the batch of a step (counted from 0): (rows,) int64."""
        epoch, index = divmod(step, self.batches_per_epoch)
        if epoch != self._epoch:
            self._order = np.random.default_rng([self.seed, 1 + epoch]).permutation(self.batches_per_epoch)
            self._epoch = epoch
        return self.composition[self._order[index]]

    def batch(self, step: int, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a step.

        Args:
            step: >= 0.
            rows: which rows of the batch.

        Returns:
            input_ids, target_ids: (rows, length) int64, on the CPU.
        """
        return cut_windows(self.tokens, self.start_id, self.blocks(step)[rows] * self.length, self.length)

    def targets(self, step: int) -> int:
        """How many targets a step has: all of them count."""
        return self.rows * self.length


def scoring_windows(num_tokens: int, length: int, stride: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Windows that score each target of a stream exactly once.

    Nonoverlapping (stride None or equal to length): window k has targets [k n, (k+1) n). Sliding: window k
    scores targets [k s, (k+1) s) and starts at max(0, k s - (n - s)). The last window may be shorter.

    Args:
        num_tokens: N.
        length: n, tokens per window.
        stride: s, targets scored per window; None: n.

    Returns:
        first target of each window, first scored target, and end (exclusive): three (windows,) int64.

    Raises:
        ValueError: length or stride out of range.
    """
    require_at_least("inference length", length, 1)
    stride = length if stride is None else stride
    if not 1 <= stride <= length:
        raise ValueError(f"stride = {stride} at inference length {length}. Allowed: 1 to {length}.")
    scored = np.arange(0, num_tokens, stride, dtype=np.int64)
    return np.maximum(0, scored - (length - stride)), scored, np.minimum(scored + stride, num_tokens)


def positions_in_window(num_tokens: int, length: int, stride: int | None = None) -> np.ndarray:
    """Position of every target in its window, counted from 1: the number of tokens that it is predicted from.

    Args:
        num_tokens: N.
        length: tokens per window.
        stride: targets scored per window; None: nonoverlapping windows.

    Returns:
        (N,) int64, from 1 to length.
    """
    starts, scored, ends = scoring_windows(num_tokens, length, stride)
    return np.arange(num_tokens) - np.repeat(starts, ends - scored) + 1
