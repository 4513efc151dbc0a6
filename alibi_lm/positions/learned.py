"""Learned position embeddings: a trained vector per position is added to each (scaled) token embedding.

Source: Gehring et al. 2017, arXiv 1705.03122; GPT-2 (Radford et al. 2019).

    x_p += table[p],    p = 0 .. train_length - 1

Past the trained length: refused, because no row exists. The evaluator reports the reason and continues.

With more rows and random offsets in training (Huang et al. 2025, arXiv 2410.02140) every row is trained, and the
scheme reaches as far as its table. Differs from that source: one offset for all sequences of a pass.
Differs from the paper: the ALiBi paper names this scheme (footnote 4) but does not run it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from alibi_lm.positions.base import PositionScheme, PositionShape
from alibi_lm.settings import require, setting


@dataclass
class LearnedConfig:
    """One trained vector per position."""

    name: str = "learned"
    rows: int | None = setting(None, counts="run", later=True)
    """Number of positions in the table; null: train_length."""
    random_offset: bool = setting(False, counts="run", later=True)
    """Begin each training pass at a random position of the table."""

    starts: ClassVar[tuple[str, ...]] = ("random_offset",)
    """Settings that a trained run no longer depends on."""

    def __post_init__(self) -> None:
        require(
            self.rows is None or self.rows >= 1, f"position.rows = {self.rows}. Use a whole number >= 1, or null."
        )
        require(
            not self.random_offset or self.rows is not None,
            "position.random_offset = True, but position.rows = null: a table no longer than a training sequence "
            "has no offset to draw. Set position.rows=<longest test length>.",
        )

    def build(self, shape: PositionShape) -> Learned:
        return Learned(self, shape)


class Learned(PositionScheme):
    """A table with train_length rows, or as many as `rows` says."""

    translation_invariant = False

    def __init__(self, config: LearnedConfig, shape: PositionShape) -> None:
        super().__init__(shape)
        rows = config.rows or shape.train_length
        require(
            rows >= shape.train_length,
            f"position.rows = {rows}, but a training sequence has {shape.train_length} tokens. Use as many.",
        )
        self.max_position, self.random_offset = rows, config.random_offset
        self.table = nn.Parameter(torch.empty(rows, shape.model_dim))
        self.initialise()

    def training_positions(self, generator: torch.Generator, length: int) -> Tensor | None:
        """Consecutive positions from a uniform offset, such that the last one is within the table."""
        if not self.random_offset:
            return None
        return torch.arange(length) + torch.randint(len(self.table) - length + 1, (), generator=generator)

    def initialise(self) -> None:
        """Normal, standard deviation model_dim^-0.5 (the scale of the token embeddings before sqrt(D))."""
        nn.init.normal_(self.table, std=self.shape.model_dim**-0.5)

    def add_to_embeddings(self, x: Tensor, positions: Tensor) -> Tensor:
        """The model checks that positions lie below `max_position`."""
        return x + self.table[positions].to(x.dtype)
