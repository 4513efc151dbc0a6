"""GRAPE-AP against sums of gates, pair by pair in float64."""

import math

import pytest
import torch

from alibi_lm.positions.alibi import alibi_slopes
from alibi_lm.positions.base import PositionShape
from alibi_lm.positions.grape_ap import GrapeApConfig


@torch.no_grad()
def test_bias_is_a_row_of_gates():
    scheme = GrapeApConfig(width=4).build(PositionShape(12, 6, 2, 2, 64, 64)).double()
    x, positions = torch.randn(1, 10, 12).double(), torch.arange(5, 15)
    bias = scheme.content_bias(torch.zeros(1, 2, 3, 6), None, scheme.features(x), positions[7:], positions)
    p = (x[0] @ scheme.weight.T).unflatten(1, (2, 4))
    for h, slope in enumerate(alibi_slopes(2)):
        for i in range(7, 10):
            for j in range(i + 1):
                total = 0.0
                for n in range(j + 1, i + 1):
                    normed = p[n, h] / (p[n, h].square().mean() + 2.220446049250313e-16).sqrt()
                    turned = []
                    for c in range(2):
                        z = complex(normed[c], normed[c + 2]) * complex(math.cos(5 + n), -math.sin(5 + n))
                        turned.append(z)
                    product = sum(float(p[i, h, c]) * turned[c].real for c in range(2))
                    product += sum(float(p[i, h, c + 2]) * turned[c].imag for c in range(2))
                    total += -math.log1p(math.exp(-product / 4))
                assert bias[0, h, i - 7, j].item() == pytest.approx(slope * total, abs=1e-9)
