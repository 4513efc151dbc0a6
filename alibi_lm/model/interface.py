"""What the evaluator needs of a language model, ours or another.

A model with these few members is scored, swept over lengths and analysed like one of our runs. `TransformerLM` is
one; a model of another library needs a wrapper of about fifty lines.

Shape letters: B batch, T tokens, T' scored tokens (the last of each row), V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from alibi_lm.settings import require


class Scores(NamedTuple):
    """How well a model predicted some targets."""

    nats: Tensor
    """(B, T') float32 or better: minus the natural logarithm of each target's probability."""
    hits: Tensor | None
    """(B, T') bool: whether the target is the model's first choice; None unless asked for."""


class LanguageModel(Protocol):
    """A causal language model, ready to score."""

    label: str
    """Its name in rows and figures; for our runs, the name of the run folder."""
    identity: str
    """Hash of the weights and of all settings that its scores depend on; part of the key of stored results."""
    vocab_size: int
    train_length: int
    """Tokens per training sequence."""
    precision: str
    """float32, bfloat16 or auto: precision of `score`."""

    @property
    def max_length(self) -> int | None:
        """Largest number of tokens in a sequence; None if any length is defined."""
        ...

    @property
    def device(self) -> torch.device:
        """Device of the model and its inputs."""
        ...

    def serve(self, length: int) -> None:
        """Prepare for sequences of `length` tokens: schemes with automatic scaling depend on it."""
        ...

    def refuses(self, capability: str) -> str:
        """Why `positions` or `window` of `score` is not supported by this model; empty if it is."""
        ...

    def score(
        self,
        input_ids: Tensor,
        target_ids: Tensor,
        *,
        score_from: int = 0,
        positions: Tensor | None = None,
        window: int | None = None,
        hits: bool = False,
    ) -> Scores:
        """Score the targets from a column on.

        Args:
            input_ids: (B, T) int64.
            target_ids: (B, T) int64; target t follows input t.
            score_from: targets before this column are context only, T' = T - score_from.
            positions: (T,) int64, ascending; None: 0, 1, ...
            window: each layer's queries see only keys at distances below this; None: all keys before them.
            hits: whether to return which targets are the model's first choice.

        Raises:
            ValueError: ids of wrong shape or dtype or outside the vocabulary, or more tokens than `max_length`.
        """
        ...

    def logits(self, input_ids: Tensor) -> Tensor:
        """Logits of the next token after each position: (B, T) int64 -> (B, T, V)."""
        ...


def check_ids(
    vocab_size: int | None, input_ids: Tensor, target_ids: Tensor | None = None, score_from: int = 0
) -> None:
    """Refuse tensors that are not token ids of a model.

    Args:
        vocab_size: V; None: the range of the ids is not checked, because that would stall a GPU in training.
        input_ids: (B, T) int64, at least one token, in [0, V).
        target_ids: the same, with the shape of input_ids.
        score_from: the first column of targets that is scored, in [0, T).

    Raises:
        ValueError: another shape or dtype, unequal shapes, an id outside the vocabulary, or no such column.
    """
    for name, ids in (("input_ids", input_ids), ("target_ids", target_ids)):
        if ids is None:
            continue
        require(
            isinstance(ids, Tensor) and ids.dtype == torch.int64 and ids.dim() == 2 and ids.numel() > 0,
            f"{name} = {_kind(ids)}. Use a tensor (B, T) of torch.int64 with at least one token.",
        )
        require(
            ids.shape == input_ids.shape,
            f"target_ids of shape {tuple(ids.shape)} with input_ids of shape {tuple(input_ids.shape)}. "
            "They must be equal: target t follows input t.",
        )
        if vocab_size is None:
            continue
        low, high = int(ids.min()), int(ids.max())
        require(
            low >= 0 and high < vocab_size,
            f"{name} holds {low if low < 0 else high}, and the vocabulary has {vocab_size} words. "
            f"Use ids from 0 to {vocab_size - 1}.",
        )
    last = input_ids.shape[1] - 1
    require(0 <= score_from <= last, f"score_from = {score_from}. Allowed: 0 to {last}.")


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}, {value.dtype}"
    return type(value).__name__
