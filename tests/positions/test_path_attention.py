"""PaTH against products of reflections, multiplied one by one in float64."""

import pytest
import torch

from alibi_lm.positions.base import PositionShape
from alibi_lm.positions.path_attention import PathConfig


@pytest.mark.parametrize("gated", [False, True])
@torch.no_grad()
def test_scores_are_products_of_reflections(gated):
    scheme = PathConfig(forget_gate=gated).build(PositionShape(16, 8, 2, 2, 64, 64)).double()
    x, q, k = torch.randn(1, 12, 16).double(), torch.randn(1, 2, 4, 8).double(), torch.randn(1, 2, 12, 8).double()
    positions = torch.arange(12)
    scores = scheme.scores(q, k, scheme.features(x), positions[8:], positions)
    numbers = x[0] @ scheme.weight.T + scheme.start
    raw = x[0] @ scheme.down.T @ scheme.up.T
    for h in range(2):
        for i in range(8, 12):
            key, forgotten = torch.eye(8).double(), 0.0
            for j in range(i, -1, -1):  # key is H_i ... H_{j+1}
                expected = (q[0, h, i - 8] @ key @ k[0, h, j] + forgotten) / 8**0.5
                assert scores[0, h, i - 8, j].item() == pytest.approx(expected.item(), abs=1e-10)
                w = torch.zeros(8).double()
                for tap in range(3):
                    if j - 2 + tap >= 0:
                        w += scheme.taps[8 * h : 8 * h + 8, 0, tap] * raw[j - 2 + tap, 8 * h : 8 * h + 8]
                w = torch.nn.functional.silu(w)
                w = w / w.norm()
                key = key @ (torch.eye(8).double() - 2 * numbers[j, h].sigmoid() * torch.outer(w, w))
                if gated:
                    forgotten = forgotten + numbers[j, 2 + h].sigmoid().log()
