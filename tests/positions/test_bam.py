"""BAM against its formula, pair by pair in float64, its two starts, and ALiBi, which it starts as."""

import math

import pytest
import torch

from alibi_lm.positions.alibi import AlibiConfig, alibi_slopes
from alibi_lm.positions.bam import BamConfig
from alibi_lm.positions.base import PositionShape

SHAPE = PositionShape(24, 8, 3, 2, 64, 64)


@pytest.mark.parametrize("inside", [False, True])
def test_bias_is_the_formula(inside):
    scheme, positions = BamConfig(trained_centre=True, scale_inside=inside).build(SHAPE), torch.arange(40)
    values = {"alpha": [-1.0, 0.3, -2.0], "beta": [0.4, -0.2, 1.7], "mu": [0.0, 0.9, -1.1]}
    with torch.no_grad():
        for name, numbers in values.items():
            getattr(scheme, name).copy_(torch.tensor(numbers))
    bias = scheme.bias(positions[25:], positions)
    for h, (alpha, beta, mu) in enumerate(zip(*values.values(), strict=True)):
        for i in range(25, 40):
            for j in range(i + 1):
                far, scale = abs(i - j + 2 * math.sinh(mu)), math.exp(alpha)
                expected = -((far * scale + 1e-5) ** beta) if inside else -scale * (far + 1e-5) ** beta
                assert bias[h, i - 25, j].item() == pytest.approx(expected, rel=2e-5)


def test_it_starts_as_alibi_or_as_the_readme_says():
    positions = torch.arange(60)
    alibi = AlibiConfig().build(SHAPE).bias(positions, positions)
    torch.testing.assert_close(BamConfig().build(SHAPE).bias(positions, positions), alibi, rtol=1e-6, atol=1e-5)
    steep = BamConfig(start="readme").build(SHAPE).bias(positions, positions)
    for head, slope in zip(steep, alibi_slopes(3), strict=True):
        assert head[9, 2].item() == pytest.approx(-math.exp(slope) * 7, rel=1e-5)
