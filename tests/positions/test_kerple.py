"""KERPLE against its formulas, pair by pair in float64, and its clamps against the authors' description."""

import math

import pytest
import torch

from alibi_lm.positions.base import PositionShape
from alibi_lm.positions.kerple import KerpleLogConfig, KerplePowerConfig

SHAPE = PositionShape(24, 8, 3, 2, 64, 64)
PARAMETERS = ([1.3, 0.004, 0.7], [0.2, -5.0, 2.6])


def built(config, *names):
    scheme = config.build(SHAPE)
    with torch.no_grad():
        for name, values in zip(names, PARAMETERS, strict=True):
            getattr(scheme, name).copy_(torch.tensor(values))
    return scheme


@pytest.mark.parametrize(
    ("config", "names", "formula"),
    [
        (KerpleLogConfig(), ("r1", "r2"), lambda a, b, d: -max(a, 0.01) * math.log(1 + max(b, 0.01) * d)),
        (KerplePowerConfig(), ("a", "p"), lambda a, b, d: -max(a, 0.01) * d ** min(max(b, 0.01), 2.0)),
    ],
)
def test_bias_and_gradients_are_those_of_the_formula(config, names, formula):
    scheme, positions = built(config, *names), torch.arange(50)
    bias = scheme.bias(positions[30:], positions)
    for h, (a, b) in enumerate(zip(*PARAMETERS, strict=True)):
        for i in range(30, 50):
            for j in range(i + 1):
                assert bias[h, i - 30, j].item() == pytest.approx(formula(a, b, i - j), rel=2e-6, abs=1e-12)
    # Head 1 lies below both clamps: its gradient is the slope at the clamp.
    grads = torch.autograd.grad(bias[:, 0, 23].sum(), [getattr(scheme, n) for n in names])
    step = 1e-5
    for n, (values, other) in enumerate((PARAMETERS, PARAMETERS[::-1])):
        for h in (0, 1):
            here, fixed = max(values[h], 0.01), max(other[h], 0.01)
            pair = lambda x, n=n, fixed=fixed: (x, fixed) if n == 0 else (fixed, x)  # noqa: E731
            slope = (formula(*pair(here + step), 7) - formula(*pair(here), 7)) / step
            assert grads[n][h].item() == pytest.approx(slope, rel=1e-3), (names[n], h)


def test_start_is_the_authors():
    torch.manual_seed(0)
    shape = PositionShape(8 * 2000, 8, 2000, 2, 64, 64)
    for config, names in ((KerpleLogConfig(), ("r1", "r2")), (KerplePowerConfig(), ("p", "a"))):
        scheme = config.build(shape)
        for name, end in zip(names, (2.0, 1.0), strict=True):
            values = getattr(scheme, name)
            assert 0 <= values.min() and end * 0.99 < values.max() <= end and abs(values.mean() - end / 2) < 0.05


def test_the_weighted_form_multiplies_scores_too():
    scheme, positions = KerplePowerConfig(weighted=True).build(SHAPE).double(), torch.arange(30)
    with torch.no_grad():
        scheme.wei_a.copy_(torch.tensor([0.3, 0.004, 0.02])), scheme.wei_p.copy_(torch.tensor([0.5, 1.2, 2.6]))
    q, k = torch.randn(2, 1, 3, 30, 8, dtype=torch.float64)
    found = scheme.content_bias(q, k, None, positions, positions)
    for h, (a, p) in enumerate([(0.3, 0.5), (0.01, 1.2), (0.02, 2.0)]):
        for i in range(30):
            for j in range(i + 1):
                score = float(q[0, h, i] @ k[0, h, j]) / math.sqrt(8)
                expected = score * math.exp(-a * (i - j) ** p)
                assert found[0, h, i, j].item() + score == pytest.approx(expected, rel=1e-5, abs=1e-6)
