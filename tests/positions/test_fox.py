"""FoX against sums of gates written out pair by pair in float64; ALiBi and CABLE as its special cases."""

import math

import pytest
import torch

from alibi_lm.positions.alibi import AlibiConfig, alibi_slopes
from alibi_lm.positions.base import PositionShape
from alibi_lm.positions.fox import FoxConfig

SHAPE = PositionShape(24, 8, 3, 2, 64, 64)


def test_bias_is_the_sum_of_the_gates_between():
    scheme, x, positions = FoxConfig().build(SHAPE), torch.randn(2, 20, 24), torch.arange(20)
    with torch.no_grad():
        scheme.gate_bias.normal_()
    q = torch.zeros(2, 3, 6, 8)
    bias = scheme.content_bias(q, torch.zeros(2, 3, 20, 8), scheme.features(x), positions[14:], positions)
    weight, start = scheme.weight.detach().double(), scheme.gate_bias.detach().double()
    for b in range(2):
        for h in range(3):
            logs = [-math.log1p(math.exp(-float(weight[h] @ x[b, t].double() + start[h]))) for t in range(20)]
            for i in range(14, 20):
                for j in range(i + 1):
                    assert bias[b, h, i - 14, j].item() == pytest.approx(sum(logs[j + 1 : i + 1]), abs=1e-5)


def test_a_long_sum_keeps_the_differences_of_near_keys():
    """After 100,000 tokens with gates exp(-1.1), float32 sums are 0.008 apart."""
    scheme, tokens = FoxConfig().build(SHAPE), 100_000
    of_key = scheme.content_key_bias(torch.full((1, tokens, 3), -1.1), torch.arange(tokens))
    torch.testing.assert_close(
        of_key[0, 0, -3:] - of_key[0, 0, -3], torch.tensor([0, 1.1, 2.2]).double(), rtol=1e-6, atol=0
    )


def test_equal_gates_are_alibi():
    """Slopes -ln f, also where the gates come from the input and the input is ignored."""
    positions, slopes = torch.arange(60), torch.tensor(alibi_slopes(3))
    expected = AlibiConfig().build(SHAPE).bias(positions, positions).tril()
    gate_bias = -torch.expm1(slopes).log()
    for gates in ("input", "bias"):
        scheme = FoxConfig(gates=gates).build(SHAPE)
        with torch.no_grad():
            scheme.gate_bias.copy_(gate_bias)
            if gates == "input":
                scheme.weight.zero_()
                x = scheme.features(torch.randn(1, 60, 24))
                bias = scheme.content_bias(torch.zeros(1, 3, 60, 8), None, x, positions, positions)[0]
            else:
                bias = scheme.bias(positions, positions)
        torch.testing.assert_close(bias.tril(), expected, rtol=1e-6, atol=1e-6)


def test_cable_is_fox_without_the_division(tiny_model):
    """Its bias is a cumulated sum of -softplus of the gate input: a gate whose input has the other sign."""
    scheme, x, positions = FoxConfig(scaled=False).build(SHAPE), torch.randn(1, 20, 24), torch.arange(20)
    gate_input = -(x @ scheme.weight.T + scheme.gate_bias).detach()
    cumulated = -torch.nn.functional.softplus(gate_input.double()).cumsum(1).mT
    q, k = torch.randn(2, 1, 3, 20, 8)
    expected = q.double() @ k.double().mT + cumulated[..., :, None] - cumulated[..., None, :]
    q, k = scheme.transform_qk(q, k, ())
    bias = scheme.content_bias(q, k, scheme.features(x), positions, positions)
    torch.testing.assert_close((q @ k.mT * 8**-0.5 + bias).double(), expected, rtol=1e-5, atol=1e-5)


def test_fixed_gates_are_not_trained_and_reach_from_the_shortest_to_the_longest():
    scheme = FoxConfig(gates="fixed", shortest=4.0, longest=64.0).build(SHAPE)
    assert not list(scheme.parameters())
    distance = torch.tensor([4, 16, 64])
    torch.testing.assert_close(scheme.distance_bias(distance).diagonal(), torch.full((3,), -1.0))
    trained = FoxConfig(gates="bias").build(SHAPE)
    assert trained.distance_bias(torch.tensor([64])).detach()[2].item() == pytest.approx(-1)
