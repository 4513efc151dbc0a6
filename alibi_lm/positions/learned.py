"""Learned position embeddings: a trained vector per position is added to each (scaled) token embedding.

Source: Gehring et al. 2017, arXiv 1705.03122; GPT-2 (Radford et al. 2019).

    x_p += table[p],    p = 0 .. train_length - 1

Past the trained length: refused, because no row exists. The evaluator reports the reason and goes on.
Differs from the paper: the ALiBi paper names this scheme (footnote 4) but does not run it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from alibi_lm.positions.base import PositionScheme, PositionShape


@dataclass
class LearnedConfig:
    """One trained vector per position."""

    name: str = "learned"

    def build(self, shape: PositionShape) -> Learned:
        return Learned(shape)


class Learned(PositionScheme):
    """A table of train_length rows."""

    translation_invariant = False

    def __init__(self, shape: PositionShape) -> None:
        super().__init__(shape)
        self.max_position = shape.train_length
        self.table = nn.Parameter(torch.empty(shape.train_length, shape.model_dim))
        self.initialise()

    def initialise(self) -> None:
        """Normal, standard deviation model_dim^-0.5 (the scale of the token embeddings before sqrt(D))."""
        nn.init.normal_(self.table, std=self.shape.model_dim**-0.5)

    def add_to_embeddings(self, x: Tensor, positions: Tensor) -> Tensor:
        """The model checks that positions lie below `max_position`."""
        return x + self.table[positions].to(x.dtype)
