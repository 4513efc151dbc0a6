"""Wall against sums over dimensions, pair by pair in float64."""

import math

import pytest
import torch

from alibi_lm.positions.base import PositionShape
from alibi_lm.positions.wall import WallConfig


@pytest.mark.parametrize("scalar", [False, True])
@torch.no_grad()
def test_scores_are_products_of_gates(scalar):
    scheme = WallConfig(scalar_gate=scalar).build(PositionShape(8, 4, 2, 2, 64, 64)).double()
    scheme.gate_bias.fill_(1.0)
    x, q, k = torch.randn(1, 40, 8).double(), torch.randn(1, 2, 20, 4).double(), torch.randn(1, 2, 40, 4).double()
    positions = torch.arange(40)
    scores = scheme.scores(q, k, scheme.features(x), positions[20:], positions)
    gates = (x[0] @ scheme.weight.T + 1.0).sigmoid()
    for h in range(2):
        for i in (20, 35, 36, 39):
            for j in range(i + 1):
                products = gates[j + 1 : i + 1].prod(0)
                expected = (q[0, h, i - 20] * k[0, h, j] * products[4 * h : 4 * h + 4]).sum().item() / 2
                if scalar:
                    expected += math.log(products[8 + h])
                assert scores[0, h, i - 20, j].item() == pytest.approx(expected, abs=1e-9)


@torch.no_grad()
def test_shut_gates_neither_overflow_nor_lose_near_keys():
    scheme, positions = WallConfig().build(PositionShape(8, 4, 2, 2, 64, 64)), torch.arange(200)
    q, k = torch.randn(2, 1, 2, 200, 4)
    scores = scheme.scores(q, k, torch.full((1, 200, 8), -50.0), positions, positions)
    assert torch.isfinite(scores).all()
    torch.testing.assert_close(scores.diagonal(dim1=2, dim2=3), (q * k).sum(-1) / 2)
