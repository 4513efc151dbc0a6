"""xPos against complex numbers written out pair by pair in float64."""

import cmath
from dataclasses import replace

import pytest
import torch

from alibi_lm.positions.base import PositionShape
from alibi_lm.positions.xpos import XposConfig


def test_queries_and_keys_are_the_formulas():
    scheme = XposConfig(scale_base=20.0).build(PositionShape(16, 8, 2, 2, 64, 101))
    q, k = torch.randn(2, 1, 2, 3, 8)
    positions = torch.tensor([0, 5, 90])
    got = scheme.transform_qk(q, k, scheme.tables(positions))
    for x, mine, sign in zip((q, k), got, (1, -1), strict=True):
        for t, p in enumerate(positions.tolist()):
            for i in range(4):
                zeta = (2 * i / 8 + 0.4) / 1.4
                factor = cmath.exp(1j * p * 10000 ** (-2 * i / 8)) * zeta ** (sign * (p - 51) / 20)
                z = complex(*x[0, 1, t, 2 * i : 2 * i + 2].tolist()) * factor
                assert complex(*mine[0, 1, t, 2 * i : 2 * i + 2].tolist()) == pytest.approx(z, rel=1e-5, abs=1e-6)


def test_products_decay_with_the_distance_at_any_length():
    """A key of ones under a query of ones, in the pair that turns fastest and decays most."""
    scheme = XposConfig().build(PositionShape(16, 8, 2, 2, 64, 16000))
    ones = torch.zeros(1, 1, 2, 8)
    ones[..., 0] = 1.0
    q, k = scheme.transform_qk(ones, ones, scheme.tables(torch.tensor([15000, 15999])))
    assert torch.isfinite(q).all() and torch.isfinite(k).all()
    sizes = (q[0, 0, 1].norm() * k[0, 0].norm(dim=-1)).tolist()
    assert sizes == pytest.approx([(0.4 / 1.4) ** (999 / 512), 1.0], rel=1e-4)


def test_sequences_whose_factors_no_float_holds_are_refused():
    shape = PositionShape(16, 8, 2, 2, 64, 64)
    scheme = XposConfig().build(replace(shape, context_length=32_000))
    q, k = scheme.transform_qk(*torch.randn(2, 1, 2, 2, 8), scheme.tables(torch.tensor([0, 31_999])))
    assert torch.isfinite(q).all() and torch.isfinite(k).all()
    with pytest.raises(ValueError, match=r"sequence of 217646 tokens: .* beyond 3\d{4} tokens"):
        XposConfig().build(replace(shape, context_length=217_646))


def test_a_model_that_refuses_a_length_stays_as_it_was(tiny_model):
    model, tokens = tiny_model("xpos"), torch.arange(8)[None]
    before = model(tokens)
    for _ in range(2):
        with pytest.raises(ValueError, match="a sequence of 100000 tokens"):
            model.serve(100_000)
    assert torch.equal(model(tokens), before)
