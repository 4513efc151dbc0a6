"""Transformer-XL against its four terms, pair by pair in float64."""

import math

import pytest
import torch

from alibi_lm.positions.base import PositionShape
from alibi_lm.positions.transformer_xl import TransformerXLConfig


@pytest.mark.parametrize("clamp", [None, 5])
@torch.no_grad()
def test_scores_are_the_papers_four_terms(clamp):
    scheme = TransformerXLConfig(clamp_distance=clamp).build(PositionShape(8, 4, 2, 2, 64, 64)).double()
    scheme.u.normal_()
    scheme.v.normal_()
    q, k = torch.randn(1, 2, 3, 4).double(), torch.randn(1, 2, 12, 4).double()
    positions = torch.arange(12)
    scores = q @ k.mT * 0.5 + scheme.content_bias(q, k, None, positions[9:], positions)
    for h in range(2):
        w_r, u, v = scheme.w_r[4 * h : 4 * h + 4], scheme.u[h], scheme.v[h]
        for i in range(9, 12):
            for j in range(i + 1):
                d = min(i - j, clamp or 99)
                frequencies = [10000 ** (-2 * c / 8) for c in range(4)]
                wave = torch.tensor([f(d * w) for f in (math.sin, math.cos) for w in frequencies]).double()
                query, key = q[0, h, i - 9], k[0, h, j]
                terms = query @ key, query @ (w_r @ wave), u @ key, v @ (w_r @ wave)
                assert scores[0, h, i - 9, j].item() == pytest.approx(sum(map(float, terms)) / 2, abs=1e-6)
