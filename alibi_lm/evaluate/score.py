"""A model and a token stream give the nats of every target: the one scorer of validation and evaluation."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from alibi_lm.data.windows import scoring_batches, scoring_windows
from alibi_lm.distributed import World, all_reduce_sum, gather_objects, shard
from alibi_lm.model.transformer import TransformerLM


class Stopped(Exception):
    """Scoring was interrupted, as `interrupt` had asked for."""


@torch.inference_mode()
def score_tokens(
    model: TransformerLM,
    tokens: np.ndarray,
    start_id: int,
    length: int,
    stride: int | None = None,
    tokens_per_forward: int = 8192,
    autocast: AbstractContextManager[Any] | None = None,
    window: int | None = None,
    world: World | None = None,
    progress: str | None = None,
    interrupt: Callable[[], bool] | None = None,
) -> np.ndarray:
    """Nats of every target of a stream, each scored exactly once.

    The model is put into evaluation mode and restored afterwards.

    Args:
        model: the language model.
        tokens: (N,) integers; all are targets.
        start_id: input in front of the first target.
        length: tokens of a window (the paper's L_valid).
        stride: None for nonoverlapping windows, else targets scored per window.
        tokens_per_forward: tokens of a forward pass, whatever the length.
        autocast: context of the forward pass.
        window: limit of the attention distance in every layer, None for no limit.
        world: processes that share the windows; all of them return the whole result.
        progress: label of a progress bar, shown only on a terminal.
        interrupt: asked before each forward pass; true ends the scoring, on all processes.

    Returns:
        (N,) float32, natural-log units (float64 for a float64 model).

    Raises:
        ValueError: the scheme has no position `length - 1`, an empty stream, or a stride out of range.
        Stopped: `interrupt` was true on one of the processes.
    """
    if len(tokens) == 0:
        raise ValueError("The evaluated split holds 0 tokens; nothing can be scored.")
    parameter = next(model.parameters())
    device = parameter.device
    dtype = np.float64 if parameter.dtype == torch.float64 else np.float32
    nats = np.zeros(len(tokens), dtype=dtype)
    counts = np.zeros(len(tokens), dtype=np.int32)
    num_windows = len(scoring_windows(len(tokens), length, stride)[0])
    share = shard(num_windows, world or World())
    was_training = model.training
    model.eval()
    bar = tqdm(
        total=len(tokens),
        unit="tok",
        unit_scale=True,
        desc=progress,
        leave=False,
        disable=progress is None or not sys.stderr.isatty(),
    )
    stopped = False
    for batch in scoring_batches(
        tokens, start_id, length, stride, tokens_per_forward, slice(share.start, share.stop)
    ):
        if interrupt is not None and interrupt():
            stopped = True
            break
        input_ids, target_ids = batch.input_ids.to(device), batch.target_ids[:, batch.score_from :].to(device)
        with nullcontext() if autocast is None else autocast:
            hidden = model(input_ids, window=window)[:, batch.score_from :]
            scored = model.vocabulary.nats(hidden.flatten(0, 1), target_ids.flatten())
        where = batch.starts[:, None] + np.arange(batch.score_from, input_ids.shape[1])
        nats[where.ravel()] = scored.to("cpu", torch.float64).numpy()
        counts[where.ravel()] += 1
        bar.update(where.size)
    bar.close()
    model.train(was_training)
    if any(gather_objects(stopped, world or World())):
        raise Stopped
    if world is not None and world.world_size > 1:
        nats = all_reduce_sum(torch.from_numpy(nats), world).numpy()
        counts = all_reduce_sum(torch.from_numpy(counts), world).numpy()
    assert (counts == 1).all(), "every target is scored exactly once"
    return nats


def mean_nats(nats: np.ndarray) -> float:
    """Mean nats per token, summed in double."""
    return float(nats.sum(dtype=np.float64) / len(nats))
