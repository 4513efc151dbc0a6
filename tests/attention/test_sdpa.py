"""The fast routes against `eager` in float64: outputs and gradients, odd lengths and heads, three precisions.

Error budget of a route in a lower precision, as a share of the largest entry of the float64 reference: float32
3e-6 plus what rounding the bias costs (`length * 6e-8` in a score), bfloat16 2e-2 (8 bits of q, k, v; the bias
itself is float32).
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from alibi_lm.attention import band, build_backend, fused_cpu, sdpa
from alibi_lm.positions import POSITIONS, PositionShape

BUDGET = {torch.float64: 1e-10, torch.float32: 3e-6, torch.bfloat16: 2e-2}
LENGTHS = [1, 2, 65, 127, 200]
HEADS = [1, 3, 6]


def scheme_of(name: str, num_heads: int, **settings: object):
    shape = PositionShape(num_heads * 8, 8, num_heads, 2, 64, 64)
    scheme = POSITIONS[name](**settings).build(shape)
    with torch.no_grad():
        for parameter in scheme.parameters():
            parameter.mul_(5)
    return scheme


def run(backend: str, scheme, length: int, dtype: torch.dtype, window: int | None = None):
    """Output, and gradients of q, k, v and the scheme's parameters; the same draw for every dtype."""
    torch.manual_seed(length)
    shape = (2, scheme.shape.num_heads, length, 8)
    q, k, v, grad = (torch.randn(shape).bfloat16().to(dtype) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)] + list(scheme.parameters())
    attention, positions = build_backend(backend), torch.arange(length)
    prepared = attention.prepare(scheme, positions, positions, window, dtype)
    out = attention(q, k, v, prepared, 0.0)
    return prepared, [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def assert_within(actual: list[torch.Tensor], expected: list[torch.Tensor], budget: float) -> None:
    scale = max(float(e.abs().max()) for e in expected[1:])
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine.shape == theirs.shape
        error = float((mine.double() - theirs.double()).abs().max())
        assert error <= budget * max(scale, float(theirs.abs().max()))


@pytest.fixture
def no_short_cuts(monkeypatch):
    """Short sequences take the routes of long ones."""
    monkeypatch.setattr(sdpa, "SHORT", 0)
    monkeypatch.setattr(band, "WHOLE", 0)


def test_the_kernel_is_available_where_this_suite_runs():
    assert fused_cpu.available()


@pytest.mark.parametrize("dtype", BUDGET)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("num_heads", HEADS)
@pytest.mark.parametrize("short_cuts", [True, False])
@pytest.mark.parametrize(
    ("name", "settings"), [("none", {}), ("alibi", {}), ("t5", {"max_distance": 20}), ("t5", {"max_distance": 70})]
)
def test_equal_to_eager(monkeypatch, name, settings, num_heads, length, dtype, short_cuts):
    if not short_cuts:
        monkeypatch.setattr(sdpa, "SHORT", 0)
        monkeypatch.setattr(band, "WHOLE", 0)
    scheme = scheme_of(name, num_heads, **settings)
    _, expected = run("eager", scheme, length, torch.float64)
    _, actual = run("sdpa", scheme, length, dtype)
    # Parameters are float32, and so is the sum that makes their gradient.
    budget = max(BUDGET[dtype], 1e-5 if name == "t5" else 0) + (length * 6e-8 if dtype != torch.float64 else 0)
    assert_within(actual, expected, budget)


@pytest.mark.parametrize("dtype", BUDGET)
@pytest.mark.parametrize("name", ["none", "alibi", "t5"])
def test_windows_equal_to_eager(monkeypatch, name, dtype):
    monkeypatch.setattr(sdpa, "MASK_ELEMENTS", 1000)
    scheme = scheme_of(name, 3)
    _, expected = run("eager", scheme, 90, torch.float64, window=17)
    _, actual = run("sdpa", scheme, 90, dtype, window=17)
    assert_within(actual, expected, max(BUDGET[dtype], 1e-5 if name == "t5" else 0))


@pytest.mark.parametrize("length", [65, 200])
def test_key_bias_by_columns_where_the_cpu_kernel_does_not_serve(monkeypatch, no_short_cuts, length):
    monkeypatch.setattr(fused_cpu, "available", lambda: False)
    for name, num_heads in (("alibi", 6), ("t5", 6)):
        scheme = scheme_of(name, num_heads)
        prepared, actual = run("sdpa", scheme, length, torch.float32)
        assert (prepared.key_bias is not None) == (name == "alibi") and prepared.band is None
        assert_within(actual, run("eager", scheme, length, torch.float64)[1], 2e-5)


def test_columns_in_bfloat16_carry_the_whole_bias():
    """Positions to 8,191 take 13 bits: one bfloat16 column would round them by up to 32."""
    key_bias = scheme_of("alibi", 6).key_bias(torch.arange(8192))
    queries, keys = sdpa._columns(key_bias, 64, torch.bfloat16)
    for columns in (queries, keys):
        assert torch.equal(columns, columns.bfloat16().float()) and columns.shape[-1] == 8
    product = (queries.double() * keys.double()).sum(-1)[0] / 8
    torch.testing.assert_close(product, key_bias.double(), rtol=1e-6, atol=0)


def test_learned_slopes_get_their_gradient(no_short_cuts):
    scheme = POSITIONS["alibi"](learned_slopes=True).build(PositionShape(48, 8, 6, 2, 64, 64))
    prepared, actual = run("sdpa", scheme, 100, torch.float32)
    assert prepared.key_bias is not None
    assert_within(actual, run("eager", scheme, 100, torch.float64)[1], 2e-5)


@pytest.mark.parametrize("name", ["alibi", "t5"])
def test_dropout_of_attention_weights(no_short_cuts, name):
    """The mean over many draws is the output without dropout; one draw is not."""
    scheme = scheme_of(name, 2)
    _, plain = run("sdpa", scheme, 70, torch.float32)
    positions, attention = torch.arange(70), build_backend("sdpa")
    torch.manual_seed(70)
    q, k, v = (torch.randn(2, 2, 70, 8).bfloat16().float() for _ in range(3))
    prepared = attention.prepare(scheme, positions, positions, None, torch.float32)
    with torch.no_grad():
        draws = torch.stack([attention(q, k, v, prepared, 0.2) for _ in range(300)])
    assert (draws[0] - plain[0]).abs().max() > 0.05
    assert (draws.mean(0) - plain[0]).abs().mean() < 0.02


def test_positions_with_gaps_do_not_take_the_distance_of_their_indices(no_short_cuts):
    scheme = scheme_of("t5", 3)
    positions = torch.arange(100) * 2
    results = []
    for backend in ("eager", "sdpa"):
        torch.manual_seed(0)
        q, k, v = (torch.randn(1, 3, 100, 8) for _ in range(3))
        attention = build_backend(backend)
        prepared = attention.prepare(scheme, positions, positions, None, q.dtype)
        results.append(attention(q, k, v, prepared, 0.0))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


class LargestTensor(TorchDispatchMode):
    """Elements of memory behind the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.untyped_storage().nbytes() // leaf.element_size())
        return result


@pytest.mark.parametrize("name", ["none", "sinusoidal", "rotary", "alibi", "t5"])
def test_no_tensor_grows_with_the_square_of_the_length(name):
    from alibi_lm.model.transformer import ModelConfig, TransformerLM

    config = ModelConfig(num_layers=1, model_dim=16, num_heads=2, ffn_dim=32)
    model = TransformerLM(config, POSITIONS[name](), "sdpa", 20, 64)
    length = 3000
    tokens = torch.randint(0, 20, (1, length))
    with LargestTensor() as seen, torch.no_grad():
        model.nats(tokens, tokens)
    assert 0 < seen.elements < length * length // 10
    with LargestTensor() as seen:
        model.nats(tokens, tokens).sum().backward()
    assert 0 < seen.elements < length * length // 10


def test_the_detector_sees_a_square_tensor():
    with LargestTensor() as seen:
        run("eager", scheme_of("alibi", 1), 200, torch.float32)
    assert seen.elements >= 200 * 200
