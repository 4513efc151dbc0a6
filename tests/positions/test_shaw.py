"""Shaw's vectors against sums over all pairs, written out in float64."""

import pytest
import torch

from alibi_lm.attention import Backends, Request
from alibi_lm.positions.base import PositionShape
from alibi_lm.positions.shaw import ShawConfig


@pytest.mark.parametrize("values", [True, False])
@torch.no_grad()
def test_output_is_the_papers(values):
    scheme = ShawConfig(clip=4, values=values).build(PositionShape(16, 8, 2, 2, 64, 64)).double()
    q, k, v = torch.randn(3, 1, 2, 12, 8).double()
    positions = torch.arange(12)
    request = Request(positions, positions, 11, None, torch.float64, 0.0)
    out = Backends("eager", "shaw").prepare(scheme, request)(q, k, v, None)
    for h in range(2):
        for i in range(12):
            keys = torch.stack([k[0, h, j] + scheme.table_k[min(i - j, 4)] for j in range(i + 1)])
            seen = [v[0, h, j] + (scheme.table_v[min(i - j, 4)] if values else 0) for j in range(i + 1)]
            weights = (keys @ q[0, h, i] / 8**0.5).softmax(0)
            torch.testing.assert_close(out[0, h, i], weights @ torch.stack(seen))
