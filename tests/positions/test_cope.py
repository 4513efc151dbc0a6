"""CoPE against a construction written out pair by pair in float64."""

import math

import pytest
import torch

from alibi_lm.positions.base import PositionShape
from alibi_lm.positions.cope import Cope, CopeConfig


def cope(table: torch.Tensor, num_heads: int, **settings) -> Cope:
    """A scheme with the table (num_positions, head_dim), in float64."""
    positions, head_dim = table.shape
    shape = PositionShape(num_heads * head_dim, head_dim, num_heads, 2, 64, 64)
    scheme = CopeConfig(num_positions=positions, **settings).build(shape).double()
    with torch.no_grad():
        scheme.table.copy_(table)
    return scheme


def written_out(q, k, table, scaled: bool) -> torch.Tensor:
    """(H, T, K), keys of gates (H, T, K), (P, K) -> (H, T, T) biases: gates are added up from the query back."""
    heads, length, dim = q.shape
    bias = torch.zeros(heads, length, length, dtype=torch.float64)
    for h in range(heads):
        for i in range(length):
            count = 0.0
            for j in range(i, -1, -1):
                count += 1 / (1 + math.exp(-float(q[h, i] @ k[h, j]) / math.sqrt(dim)))
                place = min(count, len(table) - 1)
                below, share = math.floor(place), place - math.floor(place)
                above = min(below + 1, len(table) - 1)
                term = (1 - share) * float(q[h, i] @ table[below]) + share * float(q[h, i] @ table[above])
                bias[h, i, j] = term / math.sqrt(dim) if scaled else term
    return bias


@pytest.mark.parametrize("gate_keys", [False, True])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("num_positions", [2, 30])
@torch.no_grad()
def test_bias_is_the_papers_formula(scaled, num_positions, gate_keys):
    q, k = torch.randn(2, 3, 20, 8, dtype=torch.float64)
    table, x, of_gates = torch.randn(num_positions, 8, dtype=torch.float64), None, k
    scheme = cope(table, 3, scaled_term=scaled, gate_keys=gate_keys)
    if gate_keys:
        inputs = torch.randn(1, 20, 24, dtype=torch.float64)
        x, of_gates = scheme.features(inputs), (inputs[0] @ scheme.weight.T).view(20, 3, 8).transpose(0, 1)
    bias = scheme.content_bias(q[None], k[None], x, torch.arange(20), torch.arange(20))
    visible = torch.ones(20, 20).tril().bool()
    expected = written_out(q, of_gates, table, scaled)
    torch.testing.assert_close(bias[0][:, visible], expected[:, visible], rtol=1e-12, atol=1e-12)
    assert torch.isfinite(bias).all()


def test_each_layer_counts_for_itself(tiny_model):
    model = tiny_model("cope")
    assert [name for name, _ in model.positions.named_parameters()] == ["0.table", "1.table"]
    tokens = torch.randint(0, 50, (1, 9))
    before = model(tokens)
    with torch.no_grad():
        model.schemes[1].table.normal_()
    assert not torch.allclose(model(tokens), before, atol=1e-3)


def test_it_starts_as_no_positions_at_all(tiny_model):
    tokens = torch.randint(0, 50, (1, 30))
    torch.testing.assert_close(tiny_model("cope")(tokens), tiny_model("none")(tokens), rtol=1e-6, atol=1e-6)
