"""A model and batches give the nats of every target: the only loop over a model in evaluation and validation."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from alibi_lm.distributed import World, all_reduce_sum, gather_objects
from alibi_lm.model.interface import LanguageModel
from alibi_lm.tasks.base import Batch
from alibi_lm.tasks.text import TextTask


class Stopped(Exception):
    """Scoring was interrupted because `interrupt` returned true."""


class Scored(NamedTuple):
    """Results by target, in the order of their numbers."""

    nats: np.ndarray
    """(N,) float32, minus the natural logarithm of each target's probability (float64 from a float64 model)."""
    hits: np.ndarray | None
    """(N,) bool, whether the target is the model's first choice; None unless asked for."""


@torch.inference_mode()
def score(
    model: LanguageModel,
    batches: Iterable[Batch],
    num_targets: int,
    *,
    hits: bool = False,
    offset: int = 0,
    window: int | None = None,
    world: World | None = None,
    progress: str | None = None,
    interrupt: Callable[[], bool] | None = None,
) -> Scored:
    """Score every target of some batches, each exactly once.

    A torch module is put into evaluation mode and restored afterwards, also after an error.

    Args:
        model: the language model.
        batches: sequences and the numbers of their targets, 0 to num_targets - 1 each exactly once; with several
            processes, this one's share.
        num_targets: N, over all processes.
        hits: whether to return which targets are the model's first choice.
        offset: position of each sequence's first token.
        window: limit of the attention distance in every layer, None for no limit.
        world: processes that share the batches; all of them return the whole result.
        progress: label of a progress bar, shown only on a terminal.
        interrupt: asked before each forward pass; true ends the scoring, on all processes.

    Raises:
        ValueError: no targets, or the model has no such position or window.
        Stopped: `interrupt` was true on one of the processes.
    """
    if num_targets == 0:
        raise ValueError("The evaluated split holds 0 tokens; nothing can be scored.")
    world = world or World()
    nats, counts = np.zeros(num_targets), np.zeros(num_targets, dtype=np.int32)
    right = np.zeros(num_targets, dtype=np.int32) if hits else None
    exact = stopped = False
    was_training = isinstance(model, nn.Module) and model.training
    quiet = progress is None or not sys.stderr.isatty()
    bar = tqdm(total=num_targets, unit="tok", unit_scale=True, desc=progress, leave=False, disable=quiet)
    try:
        if isinstance(model, nn.Module):
            model.eval()
        for batch in batches:
            if stopped := interrupt is not None and interrupt():
                break
            inputs, targets = batch.input_ids.to(model.device), batch.target_ids.to(model.device)
            positions = None
            if offset:
                positions = torch.arange(offset, offset + inputs.shape[1], device=model.device)
            scores = model.score(
                inputs, targets, score_from=batch.score_from, positions=positions, window=window, hits=hits
            )
            exact = exact or scores.nats.dtype == torch.float64
            counted = batch.numbers >= 0
            where = batch.numbers[counted]
            nats[where] = scores.nats.to("cpu", torch.float64).numpy()[counted]
            np.add.at(counts, where, 1)
            if right is not None:
                assert scores.hits is not None
                right[where] = scores.hits.cpu().numpy()[counted]
            bar.update(where.size)
    finally:
        bar.close()
        if isinstance(model, nn.Module):
            model.train(was_training)
    if any(gather_objects(stopped, world) if interrupt is not None else []):
        raise Stopped
    if world.world_size > 1:
        arrays = (array for array in (nats, counts, right) if array is not None)
        for array in arrays:
            array[:] = all_reduce_sum(torch.from_numpy(array), world).numpy()
        exact = bool(all_reduce_sum(torch.tensor(float(exact)), world) > 0)
    assert (counts == 1).all(), "every target is scored exactly once"
    return Scored(nats if exact else nats.astype(np.float32), None if right is None else right.astype(bool))


def mean_nats(nats: np.ndarray) -> float:
    """Mean nats per token, summed in float64."""
    return float(nats.sum(dtype=np.float64) / len(nats))


def score_tokens(
    model: LanguageModel,
    tokens: np.ndarray,
    start_id: int,
    length: int,
    stride: int | None = None,
    tokens_per_forward: int = 8192,
    world: World | None = None,
    **options: Any,
) -> np.ndarray:
    """Nats of every target of a stream of tokens, (N,): `score` on a `TextTask`; see both for the arguments."""
    batches = TextTask(tokens, start_id, stride).batches(length, tokens_per_forward, world)
    return score(model, batches, len(tokens), world=world, **options).nats
