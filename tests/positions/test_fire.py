"""FIRE against its formula, pair by pair in float64."""

import math

import pytest
import torch

from alibi_lm.positions.base import PositionShape
from alibi_lm.positions.fire import FireConfig

SHAPE = PositionShape(24, 8, 3, 2, 64, 64)


@pytest.mark.parametrize(("reading", "start"), [("arithmetic", 512), ("dape", 256)])
@torch.no_grad()
def test_bias_is_the_formula(reading, start):
    scheme = FireConfig(reading=reading, hidden=5).build(SHAPE)
    scheme.multiplier.copy_(torch.tensor(-0.05))
    up, above, down, added = (x.double() for x in (scheme.w1, scheme.b1, scheme.w2, scheme.b2))
    q_pos, k_pos = torch.tensor([3, 14, 40]), torch.arange(41)
    bias = scheme.bias(q_pos, k_pos)
    for t, i in enumerate(q_pos.tolist()):
        for j in range(i + 1):
            horizon = max(i, 0.05 * start)
            share = math.log(1 + 0.1 * (i - j)) / (math.log(1 + 0.1 * horizon) + 1e-6)
            hidden = [max(0.0, float(up[k, 0] * share + above[k])) for k in range(5)]
            for h in range(3):
                expected = sum(float(down[h, k]) * hidden[k] for k in range(5)) + float(added[h])
                assert bias[h, t, j].item() == pytest.approx(expected, abs=1e-6)
