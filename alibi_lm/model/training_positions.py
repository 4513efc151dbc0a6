"""The positions of the tokens of a sequence: counted from 0, or drawn at random from a longer range.

Source: Ruoss et al. 2023, "Randomized Positional Encodings Boost Length Generalization of Transformers", arXiv
2305.16843; code google-deepmind/randomized_positional_encodings. Works with every position scheme.

    randomised: T of the numbers 0 ... N - 1, drawn without replacement and sorted, again in each training step

All sequences of a step share the draw, also across micro-batches and processes. In evaluation positions are drawn
too, as by the authors, but once for each length, so that results can be repeated; shorter sequences (the last one
of a text, a decoder's first tokens) have the first of these positions. The scheme is built for N positions.

Differs from the paper: evaluation repeats one draw for each length; the authors draw for each batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alibi_lm.settings import require


@dataclass
class PlainConfig:
    """Positions 0, 1, 2, ..."""

    name: str = "plain"

    @property
    def range(self) -> int | None:
        """N: positions are drawn from 0 to N - 1; None: they are counted."""
        return None

    def draw(self, length: int, seed: int) -> Tensor | None:
        """Positions of a sequence: (length,) int64 on the CPU, ascending; None: 0, 1, ... length - 1."""
        return None


@dataclass
class RandomisedConfig(PlainConfig):
    """Positions drawn without replacement."""

    name: str = "randomised"
    num_positions: int = 2048
    """N: positions are drawn from 0 to N - 1; at least the longest sequence, in training and evaluation."""

    @property
    def range(self) -> int:
        return self.num_positions

    def draw(self, length: int, seed: int) -> Tensor:
        """Raises ValueError if the range has too few positions."""
        require(
            length <= self.num_positions,
            f"training_positions.num_positions = {self.num_positions} is less than a sequence of {length} tokens. "
            f"Use {length} or more in training, shorter sequences in evaluation.",
        )
        generator = torch.Generator("cpu").manual_seed(seed)
        return torch.randperm(self.num_positions, generator=generator, device="cpu")[:length].sort().values


TRAINING_POSITIONS: dict[str, type] = {"plain": PlainConfig, "randomised": RandomisedConfig}
"""Entries of the config group `training_positions`."""
