"""Forward passes that analyses are made of: standard, windowed, reset, fixed context, shifted positions.

Each gives the nats of single targets. Passes over a run are kept in the token store under what they are, so that
no analysis computes again what an evaluation or another analysis has computed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch

from alibi_lm.data.windows import cut_windows, scoring_windows
from alibi_lm.evaluate.score import score_tokens
from alibi_lm.evaluate.store import Scoring
from alibi_lm.model.transformer import TransformerLM
from alibi_lm.results.statistics import mean_nats_interval

BINS_PER_OCTAVE = 4
"""Of the smoothed curve: each bin is 19% wide in position."""

Keep = Callable[[Scoring, Callable[[], np.ndarray]], np.ndarray]


@torch.inference_mode()
def score_windows(
    model: TransformerLM,
    tokens: np.ndarray,
    start_id: int,
    starts: np.ndarray,
    width: int,
    score_from: int = 0,
    offset: int = 0,
    tokens_per_forward: int = 8192,
    autocast: AbstractContextManager[Any] | None = None,
) -> np.ndarray:
    """Nats of the last targets of windows that may lie anywhere in the stream.

    Args:
        model: in evaluation mode.
        tokens: (N,) integers.
        start_id: input in front of the first target.
        starts: (windows,) integers, first target of each window.
        width: tokens of a window.
        score_from: targets before this column are context only.
        offset: position of a window's first token.
        tokens_per_forward: tokens of a forward pass; one window at least.
        autocast: context of the forward pass.

    Returns:
        (windows, width - score_from) float32, natural-log units.

    Raises:
        ValueError: a window that leaves the stream.
    """
    if len(starts) and (starts.min() < 0 or starts.max() + width > len(tokens)):
        raise ValueError(
            f"windows of {width} tokens reach from {starts.min()} to {starts.max() + width}, but the split has "
            f"{len(tokens)} tokens. Use shorter windows."
        )
    device = next(model.parameters()).device
    positions = torch.arange(offset, offset + width, device=device)
    nats = np.zeros((len(starts), width - score_from), dtype=np.float32)
    rows = max(1, tokens_per_forward // width)
    for i in range(0, len(starts), rows):
        first = starts[i : i + rows]
        inputs, targets = (x.to(device) for x in cut_windows(tokens, start_id, first, width))
        targets = targets[:, score_from:]
        with nullcontext() if autocast is None else autocast:
            hidden = model(inputs, positions=positions)[:, score_from:]
            scored = model.vocabulary.nats(hidden.flatten(0, 1), targets.flatten())
        nats[i : i + rows] = scored.view_as(targets).float().cpu().numpy()
    return nats


class Passes:
    """The passes of one model over one stream.

    Args:
        load: the model for a window length (schemes with automatic scaling depend on it), in evaluation mode.
        tokens: (N,) integers; all are targets.
        start_id: input in front of the first target.
        split: name of the stream.
        tokens_per_forward: tokens of a forward pass.
        autocast: makes the context of a forward pass.
        keep: (scoring, compute) -> nats; where results are kept and looked up. None: nowhere.
    """

    def __init__(
        self,
        load: Callable[[int], TransformerLM],
        tokens: np.ndarray,
        start_id: int,
        split: str = "validation",
        tokens_per_forward: int = 8192,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        keep: Keep | None = None,
    ) -> None:
        self._load = load
        self._loaded: tuple[int, TransformerLM] | None = None
        self.tokens, self.start_id, self.split = tokens, start_id, split
        self.tokens_per_forward, self.autocast = tokens_per_forward, autocast
        self.keep: Keep = keep or (lambda scoring, compute: compute())

    def model(self, length: int) -> TransformerLM:
        """The model for windows of this length; the last one is kept."""
        if self._loaded is None or self._loaded[0] != length:
            self._loaded = None  # two models at a time would need the memory twice
            self._loaded = (length, self._load(length))
        return self._loaded[1]

    def nats(self, length: int, stride: int | None = None, window: int | None = None) -> np.ndarray:
        """Nats of every target in a standard evaluation, or with each layer's attention limited.

        Args:
            length: tokens of a window.
            stride: targets scored per window; None for nonoverlapping.
            window: each layer sees only keys at distances below it; None for no limit.

        Returns:
            (N,) float32.
        """
        stride = None if stride == length else stride
        mode = "nonoverlapping" if stride is None else "sliding"
        return self.keep(
            Scoring(self.split, mode, length, stride, window),
            lambda: score_tokens(
                self.model(length),
                self.tokens,
                self.start_id,
                length,
                stride,
                self.tokens_per_forward,
                self.autocast(),
                window,
                progress=f"{mode} @ {length}",
            ),
        )

    def reset(self, length: int, train_length: int, stride: int = 1) -> np.ndarray:
        """Nats of every target of nonoverlapping windows, with at most the last tokens as input.

        A target at position p <= train_length (counted from 1) has the p tokens of its window as input, as it
        has in the full pass. One further on has the last train_length tokens, with positions from 0. With a
        stride it has between train_length - stride + 1 and train_length, as in a sliding evaluation; the targets
        at p <= train_length are what they are, whatever the stride.

        Args:
            length: n, tokens of a window.
            train_length: L, most tokens of input.
            stride: targets that share a forward pass, from 1 to L.

        Returns:
            (N,) float32.
        """
        positions = positions_in_window(len(self.tokens), length)
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
        starts = np.arange(0, len(self.tokens), length)
        whole = starts[starts + train_length <= len(self.tokens)]

        def compute() -> np.ndarray:
            parts = [self._windows(whole, train_length).ravel()]
            if len(whole) < len(starts):
                parts.append(self._windows(starts[-1:], len(self.tokens) - int(starts[-1])).ravel())
            return np.concatenate(parts)

        return self.keep(Scoring(self.split, "heads", train_length, length), compute)

    def fixed(self, context: int, targets: np.ndarray, every: int) -> np.ndarray:
        """Nats of single targets, each with exactly `context` tokens of input.

        Args:
            context: tokens of input, positions 0 to context - 1.
            targets: (M,) integers, from context - 1; every `every`-th of the stream.
            every: their distance.

        Returns:
            (M,) float32.
        """
        return self.keep(
            Scoring(self.split, "fixed", context, every, first=int(targets[0])),
            lambda: self._windows(targets - context + 1, context, context - 1).ravel(),
        )

    def shifted(self, width: int, starts: np.ndarray, offset: int) -> np.ndarray:
        """Nats of all targets of some windows whose positions begin at `offset`: (windows, width) float32."""
        return self._windows(starts, width, offset=offset)

    def _windows(self, starts: np.ndarray, width: int, score_from: int = 0, offset: int = 0) -> np.ndarray:
        return score_windows(
            self.model(width),
            self.tokens,
            self.start_id,
            starts,
            width,
            score_from,
            offset,
            self.tokens_per_forward,
            self.autocast(),
        )


def positions_in_window(num_tokens: int, length: int, stride: int | None = None) -> np.ndarray:
    """Position of every target in its window, counted from 1: the number of tokens that it is predicted from.

    Args:
        num_tokens: N.
        length: tokens of a window.
        stride: targets scored in a window; None for nonoverlapping.

    Returns:
        (N,) int64, from 1 to length.
    """
    starts, scored, ends = scoring_windows(num_tokens, length, stride)
    return np.arange(num_tokens) - np.repeat(starts, ends - scored) + 1


def curve_edges(length: int, train_length: int) -> np.ndarray:
    """The same for the smoothed curve: bins grow with the position, and one ends exactly at the trained length.

    What a scheme does past its trained length is then never mixed with what it does before.
    """
    octaves = int(np.ceil(np.log2(max(train_length, length / train_length, 2)))) + 1
    steps = np.arange(-octaves * BINS_PER_OCTAVE, octaves * BINS_PER_OCTAVE + 1)
    last = np.unique(np.round(train_length * 2.0 ** (steps / BINS_PER_OCTAVE)).astype(np.int64))
    last = last[(last >= 1) & (last < length)]
    return np.concatenate([[1], last + 1, [length + 1]])


def position_curve(
    nats: np.ndarray, documents: np.ndarray, positions: np.ndarray, length: int, train_length: int
) -> dict[str, np.ndarray]:
    """Mean nats against position in the window, smoothed, with a band.

    The band is the 95% interval, over documents (and seeds), of the *difference* from the mean up to the trained
    length (all positions of a shorter window), drawn around the curve. How hard the text is moves the whole curve
    and is left out: it says how well the shape is known.

    Args:
        nats: (N,) floats, or (seeds, N) of several runs on the same text.
        documents: (D,) integers, where documents start.
        positions: (N,) int64, from 1 to length.
        length: tokens of a window.
        train_length: where a bin must end.

    Returns:
        curve_first, curve_last (int64), curve_nats, curve_low, curve_high (float64), each (points,); bins
        without a target are left out.
    """
    seeds = np.atleast_2d(nats)
    edges = curve_edges(length, train_length)
    cells = (np.searchsorted(documents, np.arange(len(positions)), side="right") - 1) * (len(edges) - 1)
    cells += np.searchsorted(edges, positions, side="right") - 1
    shape = (len(documents), len(edges) - 1)
    tokens = np.bincount(cells, minlength=shape[0] * shape[1]).reshape(shape)
    sums = np.stack([np.bincount(cells, s, shape[0] * shape[1]).reshape(shape) for s in seeds])
    points = np.flatnonzero(tokens.sum(axis=0))
    means = (sums.sum(axis=1)[:, points] / tokens.sum(axis=0)[points]).mean(axis=0)
    early = edges[:-1] <= train_length
    base = sums[:, :, early].sum(axis=2), tokens[:, early].sum(axis=1)
    ends = np.full((2, len(points)), np.nan)
    for index, k in enumerate(points):
        if np.count_nonzero(tokens[:, k]) < 2:
            continue  # one document does not show how documents differ
        changes = change_sums(sums[:, :, k], tokens[:, k], *base)
        difference = changes.sum(axis=1).mean() / base[1].sum()
        ends[:, index] = np.array(interval_ends(changes, base[1])) - difference
    return {
        "curve_first": edges[points],
        "curve_last": edges[points + 1] - 1,
        "curve_nats": means,
        "curve_low": means + ends[0],
        "curve_high": means + ends[1],
    }


def change_sums(
    sums: np.ndarray, tokens: np.ndarray, base_sums: np.ndarray, base_tokens: np.ndarray
) -> np.ndarray:
    """Sums whose mean and interval are those of a difference between two means of the same documents.

    The means may be over different targets, so that a document has other numbers of them; with the same targets
    it is `sums - base_sums`. The difference of two ratios is linearised around both.

    Args:
        sums: (seeds, documents), nats.
        tokens: (documents,), targets in them.
        base_sums: (seeds, documents), of the mean that is subtracted.
        base_tokens: (documents,).

    Returns:
        (seeds, documents) float64, to be taken with `base_tokens`. A document with no target in the base has
        none here.
    """
    total, base_total = tokens.sum(), base_tokens.sum()
    mean, base_mean = sums.sum(axis=1, keepdims=True) / total, base_sums.sum(axis=1, keepdims=True) / base_total
    errors = (sums - mean * tokens) / total - (base_sums - base_mean * base_tokens) / base_total
    return np.where(base_tokens > 0, base_total * errors + (mean - base_mean) * base_tokens, 0.0)


def interval_ends(sums: np.ndarray, tokens: np.ndarray) -> tuple[float, float]:
    """95% interval of the mean nats per token over documents (and seeds); NaN where one cannot be had.

    Args:
        sums: (seeds, documents) or (documents,), nats.
        tokens: (documents,).
    """
    sums = np.unique(np.atleast_2d(sums), axis=0)  # seeds that agree exactly are one observation
    if np.count_nonzero(tokens) < 2 or not np.isfinite(sums).all():
        return float("nan"), float("nan")
    interval = mean_nats_interval(sums, tokens)
    return interval.low, interval.high
