"""Sandwich: the bias is the inner product of the sinusoidal embeddings of query and key, scaled per head.

Source: Chi, Fan, Rudnicky & Ramadge 2023, "Dissecting Transformer Length Extrapolation via the Lens of Receptive
Field Analysis", arXiv 2212.10356, section 5; checked against meta-pytorch/attention-gym (commit 7fdb85d),
attn_gym/mods/sandwich.py.

    scores[h, i, j] = q_i . k_j / sqrt(head_dim) + num_heads / (8 h) sum_k cos((i - j) 10000^(-2k / width)),
    k = 0 .. width / 2 - 1,  h = 1 .. num_heads

`width` is the paper's d-bar, a constant that does not depend on the model. Nothing is trained. The bias falls
roughly like a logarithm and then oscillates; it is bounded, so the sum over all distances of exp(bias) diverges.

Past the trained length: defined everywhere; far distances have about the same bias.
Differs from the paper: nothing from the code named above, which counts frequencies from 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alibi_lm.positions.base import PositionScheme, PositionShape, per_head, wave_frequencies
from alibi_lm.settings import require


@dataclass
class SandwichConfig:
    """Biases that are inner products of sinusoids."""

    name: str = "sandwich"
    width: int = 128
    """Number of dimensions of the sinusoids; even, >= 2."""

    def __post_init__(self) -> None:
        require(
            self.width >= 2 and self.width % 2 == 0,
            f"position.width = {self.width}. Waves come in pairs: use an even number >= 2.",
        )

    def build(self, shape: PositionShape) -> Sandwich:
        return Sandwich(self, shape)


class Sandwich(PositionScheme):
    """One function of the distance, scaled differently for each head."""

    inv_freq: Tensor
    scales: Tensor

    def __init__(self, config: SandwichConfig, shape: PositionShape) -> None:
        super().__init__(shape)
        self.register_exact("inv_freq", wave_frequencies(config.width))
        heads = torch.arange(1, shape.num_heads + 1, dtype=torch.float64, device="cpu")
        self.register_exact("scales", shape.num_heads / (8 * heads))

    def distance_bias(self, distance: Tensor) -> Tensor:
        curve = torch.zeros(distance.shape, dtype=torch.float64, device=distance.device)
        for frequency in self.inv_freq:  # one by one: for a table of pairs, all at once need too much memory
            curve += (distance * frequency).cos()
        return (per_head(self.scales, distance) * curve).float()
