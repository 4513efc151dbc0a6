"""PoPE against its cosines, pair by pair in float64."""

import math

import pytest
import torch

from alibi_lm.positions.base import PositionShape
from alibi_lm.positions.pope import PopeConfig


@torch.no_grad()
def test_scores_are_the_papers_sum_of_cosines():
    scheme = PopeConfig(theta=100.0).build(PositionShape(10, 5, 2, 2, 64, 64))
    scheme.phase.uniform_(-8, 2)
    q, k = torch.randn(2, 1, 2, 9, 5)
    wide_q, wide_k = scheme.transform_qk(q, k, scheme.tables(torch.arange(30, 39)))
    scores = wide_q @ wide_k.mT * wide_q.shape[-1] ** -0.5

    def magnitude(x):
        return math.log1p(math.exp(float(x)))

    for h in range(2):
        for i in range(9):
            for j in range(i + 1):
                total = 0.0
                for c in range(5):
                    phase = min(max(float(scheme.phase[h, c]), -2 * math.pi), 0.0)
                    angle = (i - j) * 100 ** (-c / 5) - phase
                    total += magnitude(q[0, h, i, c]) * magnitude(k[0, h, j, c]) * math.cos(angle)
                assert scores[0, h, i, j].item() == pytest.approx(total / 5**0.5, abs=1e-5)
