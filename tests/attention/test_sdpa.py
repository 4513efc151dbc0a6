"""The routes of sdpa against `eager` in float64: outputs and gradients, odd lengths and heads, three precisions.

Error budget of a route in a lower precision, as a share of the largest entry of the float64 reference: float32
3e-6 plus what rounding the bias costs (`length * 6e-8` in a score; columns round it once more), bfloat16 2e-2 (8
bits of q, k, v; the bias itself is float32).
"""

import itertools

import pytest
import torch
from largest_tensor import LargestTensor

from alibi_lm.attention.eager import EagerAttention
from alibi_lm.attention.sdpa import SdpaAttention, key_bias_columns
from alibi_lm.model.transformer import ModelConfig, TransformerLM
from alibi_lm.positions import POSITIONS

from .kernels import assert_within, attend, draw, run, scheme_of

BUDGET = {torch.float64: 1e-10, torch.float32: 3e-6, torch.bfloat16: 2e-2}
ROUTES = {
    "short": SdpaAttention(),
    "columns": SdpaAttention(short=0),
    "slices": SdpaAttention(mask_elements=1000),
}
SCHEMES = [("none", {}), ("alibi", {}), ("alibi", {"learned_slopes": True}), ("t5", {"max_distance": 20})]


@pytest.mark.parametrize("length", [1, 130])
@pytest.mark.parametrize(("name", "settings"), SCHEMES)
def test_equal_to_eager(name, settings, length):
    scheme = scheme_of(name, 6, **settings)
    expected = run("eager", scheme, length, torch.float64)
    for route, dtype in itertools.product(ROUTES, BUDGET):
        # Parameters are float32, and so is the sum that makes their gradient.
        budget = max(BUDGET[dtype], 1e-5 if settings else 0)
        if dtype != torch.float64:
            budget += length * (1e-7 if route == "columns" else 6e-8)
        assert_within(run(ROUTES[route], scheme, length, dtype), expected, budget)


@pytest.mark.parametrize("name", ["none", "alibi", "t5"])
def test_windows_equal_to_eager(name):
    scheme = scheme_of(name, 3)
    expected = run("eager", scheme, 90, torch.float64, window=17)
    for route, dtype in itertools.product(("short", "slices"), BUDGET):
        assert_within(run(ROUTES[route], scheme, 90, dtype, window=17), expected, max(BUDGET[dtype], 1e-5))


@pytest.mark.parametrize("name", ["sandwich", "t5"])
def test_autocast_rounds_no_mask(name):
    """Sandwich's bias is 4 at distance 0, where bfloat16 numbers are 1/32 apart: autocast rounds masks so."""
    scheme = scheme_of(name, 3)
    q, k, v, _ = (x.bfloat16() for x in draw(2, 3, 200, 8))
    with torch.no_grad():
        expected = attend("eager", scheme, q.double(), k.double(), v.double())
        for backend in (ROUTES["short"], ROUTES["slices"], EagerAttention()):
            plain = attend(backend, scheme, q, k, v)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert torch.equal(attend(backend, scheme, q, k, v), plain)
            torch.testing.assert_close(plain.double(), expected, rtol=0, atol=0.03)


def test_columns_in_bfloat16_carry_the_whole_bias():
    """Positions to 8,191 take 13 bits: one bfloat16 column would round them by up to 32."""
    key_bias = scheme_of("alibi", 6).key_bias(torch.arange(8192))
    queries, keys = key_bias_columns(key_bias[None], 64, torch.bfloat16)
    for columns in (queries, keys):
        assert torch.equal(columns, columns.bfloat16().float()) and columns.shape[-1] == 8
    product = (queries.double() * keys.double()).sum(-1)[0] / 8
    torch.testing.assert_close(product, key_bias.double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", [ROUTES["short"], ROUTES["columns"], EagerAttention()])
@pytest.mark.parametrize("name", ["alibi", "t5"])
def test_dropout_of_attention_weights(backend, name):
    """The mean over many draws is the output without dropout; one draw is not."""
    scheme, (q, k, v, _) = scheme_of(name, 2), draw(2, 2, 70, 8)
    with torch.no_grad():
        plain = attend("eager", scheme, q, k, v)
        draws = torch.stack([attend(backend, scheme, q, k, v, dropout=0.2) for _ in range(100)])
    assert (draws[0] - plain).abs().max() > 0.05
    assert (draws.mean(0) - plain).abs().mean() < 0.03


@pytest.mark.parametrize("name", ["none", "sinusoidal", "rotary", "alibi"])
def test_no_tensor_grows_with_the_square_of_the_length(name):
    config, length = ModelConfig(num_layers=1, model_dim=16, num_heads=2, ffn_dim=32), 1000
    model = TransformerLM(config, POSITIONS[name](), "sdpa", 20, 64)
    tokens = torch.randint(0, 20, (1, length))
    with LargestTensor() as seen:
        run("eager", scheme_of("alibi", 1), 200, torch.float32)
    assert seen.elements >= 200 * 200
    for context in (torch.no_grad, torch.enable_grad):
        with LargestTensor() as seen, context():
            nats = model.nats(tokens, tokens)
            if nats.requires_grad:
                nats.sum().backward()
        assert 0 < seen.elements < length * length // 10


def test_a_mask_in_evaluation_stays_within_its_bound():
    scheme, (q, k, v, _) = scheme_of("t5", 2), draw(1, 2, 800, 8)
    with LargestTensor() as seen, torch.no_grad():
        sliced = attend(SdpaAttention(mask_elements=100_000), scheme, q, k, v)
    assert 100_000 // 2 < seen.elements <= 100_000 + 2 * 800
    torch.testing.assert_close(sliced, attend(SdpaAttention(), scheme, q, k, v))
