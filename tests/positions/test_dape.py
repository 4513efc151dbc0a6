"""DAPE against its network applied pair by pair in float64."""

import torch

from alibi_lm.positions.alibi import alibi_slopes
from alibi_lm.positions.base import PositionShape
from alibi_lm.positions.dape import DapeConfig


@torch.no_grad()
def test_bias_is_the_base_and_the_network_of_each_pair():
    scheme = DapeConfig(base="alibi").build(PositionShape(24, 8, 3, 2, 64, 64)).double()
    q, k = torch.randn(1, 3, 4, 8).double(), torch.randn(1, 3, 9, 8).double()
    positions = torch.arange(9)
    bias = scheme.content_bias(q, k, None, positions[5:], positions)
    slopes = torch.tensor(alibi_slopes(3)).double()
    for i in range(5, 9):
        for j in range(i + 1):
            z, b = (q[0, :, i - 5] * k[0, :, j]).sum(-1) / 8**0.5, -slopes * (i - j)
            inside = scheme.w1 @ torch.cat([z, b]) + scheme.b1
            inside = torch.where(inside > 0, inside, 0.01 * inside)
            torch.testing.assert_close(bias[0, :, i - 5, j], b + scheme.w2 @ inside + scheme.b2)
