"""Sandwich against inner products of sinusoidal embeddings in float64."""

import torch

from alibi_lm.positions.base import PositionShape
from alibi_lm.positions.sandwich import SandwichConfig


def test_bias_is_the_product_of_sinusoidal_embeddings():
    scheme = SandwichConfig(width=32).build(PositionShape(24, 8, 3, 2, 64, 64))
    positions = torch.tensor([0, 1, 7, 63, 900])
    angles = torch.tensor([[p * 10000 ** (-2 * k / 32) for k in range(16)] for p in positions.tolist()])
    waves = torch.cat([angles.double().sin(), angles.double().cos()], dim=1)
    bias = scheme.bias(positions, positions).double()
    for head, scale in enumerate((3 / 8, 3 / 16, 3 / 24)):
        torch.testing.assert_close(bias[head].tril(), scale * (waves @ waves.T).tril(), rtol=1e-4, atol=1e-4)
