"""What the evaluator asks of a language model, whether it is one of ours or not.

Whoever has these few members is scored, swept over lengths and looked into like a run of ours. `TransformerLM` is
one such model; a model of another library needs a wrapper of some fifty lines.

Shape letters: B batch, T tokens, T' scored tokens (the last of each row), V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Scores(NamedTuple):
    """How well a model predicted some targets."""

    nats: Tensor
    """(B, T') float32 or better: minus the natural logarithm of each target's probability."""
    hits: Tensor | None
    """(B, T') bool: whether the target is the model's first choice; None unless asked for."""


class LanguageModel(Protocol):
    """A causal language model, ready to score."""

    label: str
    """What rows and figures call it: the name of the run folder, for a run of ours."""
    identity: str
    """Hash of the weights and of all settings that its scores depend on: stored results are known by it."""
    vocab_size: int
    train_length: int
    """Tokens of a training sequence."""

    @property
    def max_length(self) -> int | None:
        """Most tokens of a sequence; None where any length is defined."""
        ...

    @property
    def device(self) -> torch.device:
        """Where inputs belong."""
        ...

    def serve(self, length: int) -> None:
        """Get ready for sequences of `length` tokens: schemes with automatic scaling depend on it."""
        ...

    def refuses(self, capability: str) -> str:
        """Why `positions` or `window` of `score` cannot be had from this model; empty where it can."""
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
            window: each layer's queries see only keys at distances below it; None: all keys before them.
            hits: whether to tell which targets are the model's first choice.
        """
        ...

    def logits(self, input_ids: Tensor) -> Tensor:
        """Scores of the next token after each position, before the softmax: (B, T) int64 -> (B, T, V)."""
        ...
