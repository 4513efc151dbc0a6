"""Query scales against formulas, with every position scheme and backend, in caches, and as settings of a run."""

import math
from dataclasses import replace

import pytest
import torch

from alibi_lm.attention.native import why_not
from alibi_lm.attention.sdpa import SdpaAttention
from alibi_lm.model.query_scale import QUERY_SCALES, visible_keys
from alibi_lm.model.transformer import KeyValueCache, TransformerLM
from alibi_lm.positions import POSITIONS, PositionShape

SHAPE = PositionShape(24, 8, 3, 2, 16, 16)
BACKENDS = ("eager", "sdpa", *([] if why_not() else ["native"]))


def build(tiny_config, scale, position="alibi", attention="eager", train_length=16, **settings):
    torch.manual_seed(1)
    config = QUERY_SCALES[scale](**settings)
    model = TransformerLM(
        tiny_config, POSITIONS[position](), attention, 50, train_length, query_scale=config
    ).eval()
    with torch.no_grad():
        for parameter in model.query_scale.parameters():
            parameter.add_(torch.rand(parameter.shape) * 0.5)
    return model


def ids(batch, length):
    return torch.randint(0, 50, (batch, length))


def test_factors_are_the_formulas():
    formulas = {
        "log_n": lambda n: max(1.0, math.log(n) / math.log(16)),
        "ssmax": lambda n: math.log(n),
        "llama4": lambda n: 1 + 0.1 * math.log(n // 16 + 1),
        "constant": lambda n: 1.0,
        "per_head": lambda n: 1.0,
    }
    visible = torch.tensor([1, 2, 15, 16, 17, 31, 32, 500])
    for name, formula in formulas.items():
        found = QUERY_SCALES[name]().build(SHAPE).factors(visible)
        expected = torch.tensor([formula(int(n)) for n in visible], dtype=torch.float64)
        assert len(found) == (2 if name in ("ssmax", "per_head") else 1)
        for factor in found:
            torch.testing.assert_close(factor, expected.expand_as(factor), rtol=0, atol=1e-12)
    assert QUERY_SCALES["none"]().build(SHAPE).factors(visible) == []
    longer = QUERY_SCALES["log_n"]().build(replace(SHAPE, context_length=64)).factors(torch.tensor([64]))
    assert float(longer[0]) == pytest.approx(1.5), "the logarithm is that of the training length"
    unclipped = QUERY_SCALES["log_n"](clipped=False, length=4).build(SHAPE).factors(visible)[0][0]
    assert float(unclipped[1]) == pytest.approx(0.5) and float(unclipped[0]) == 0


@pytest.mark.parametrize("window", [None, 1, 5])
def test_visible_keys_are_counted(window):
    k_pos = torch.tensor([0, 1, 2, 5, 6, 7, 20, 21])
    counts = [sum(1 for k in k_pos if 0 <= q - k < (window or 1000)) for q in k_pos]
    assert visible_keys(k_pos, k_pos, window).tolist() == counts
    assert visible_keys(k_pos[5:], k_pos, window).tolist() == counts[5:]


@pytest.mark.parametrize("position", sorted(POSITIONS.keys() - {"pope"}))
@torch.no_grad()
def test_a_constant_factor_is_one_of_the_query_weights(tiny_config, position):
    """A query that is linear in its weights: doubling these must do the same, whatever the scheme.

    Those of PoPE are not: the factor comes after its magnitudes.
    """
    model = build(tiny_config, "constant", position, "auto", factor=2.0)
    plain, tokens = build(tiny_config, "none", position, "auto"), ids(2, 12)
    assert not torch.allclose(model(tokens), plain(tokens), atol=1e-3)
    for block in plain.layers:
        block.attention.qkv.weight[:24] *= 2
        block.attention.qkv.bias[:24] *= 2
    torch.testing.assert_close(model(tokens), plain(tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", ["log_n", "ssmax", "llama4", "per_head"])
def test_attention_is_that_of_the_scaled_scores(tiny_config, scale):
    """The first layer's attention, written out in float64; the bias is scaled where that is asked for."""
    for scale_bias in (False, True):
        model = build(tiny_config, scale, train_length=4, scale_bias=scale_bias).double()
        block, tokens = model.layers[0], ids(1, 9)
        seen = {}
        block.attention.register_forward_hook(lambda m, i, o, seen=seen: seen.update(x=i[0], y=o))
        model(tokens)
        q, k, v = block.attention.qkv(seen["x"]).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)
        factor = model.query_scale.factors(torch.arange(1, 10))[0][..., None]
        distance = (torch.arange(9)[:, None] - torch.arange(9)).double()
        bias = -torch.tensor([2.0**-4, 2.0**-8, 2.0**-2]).double().view(3, 1, 1) * distance
        scores = factor * (q @ k.mT / 8**0.5) + (factor if scale_bias else 1) * bias
        weights = scores.masked_fill(distance < 0, -math.inf).softmax(-1)
        expected = block.attention.out((weights @ v).transpose(1, 2).flatten(2))
        torch.testing.assert_close(seen["y"], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("position", "scale_bias"), [("alibi", False), ("alibi", True), ("fox", False)])
@pytest.mark.parametrize(("gap", "window"), [(0, None), (7, 9)])
@torch.no_grad()
def test_decoding_in_pieces_equals_one_pass(tiny_config, position, scale_bias, gap, window):
    settings = {"train_length": 80, "scale_bias": scale_bias}
    model, cache = build(tiny_config, "ssmax", position, "auto", **settings), KeyValueCache()
    tokens, pieces = ids(2, 30), [11, 1, 18]
    places = torch.arange(30) + gap * torch.tensor([0, 1, 2]).repeat_interleave(torch.tensor(pieces))
    decoded = [
        model(piece, positions=where, cache=cache, window=window)
        for piece, where in zip(tokens.split(pieces, dim=1), places.split(pieces), strict=True)
    ]
    whole = model(tokens, positions=places, window=window)
    torch.testing.assert_close(torch.cat(decoded, dim=1), whole, rtol=0, atol=3e-4)
    swapped = model(tokens.flip(1), positions=places, window=window)
    assert (whole - swapped).abs().max() > 1e-1


@pytest.mark.parametrize("scale_bias", [False, True])
def test_backends_agree_in_outputs_and_gradients(tiny_config, scale_bias):
    tokens, targets, results = ids(2, 40), ids(2, 40), {}
    for attention in BACKENDS:
        # A scaled bias is no function of distance: native leaves it to sdpa.
        model = build(tiny_config, "ssmax", "alibi", attention, scale_bias=scale_bias)
        # Masks in slices of queries, as for long sequences.
        model.backend.chain = [SdpaAttention(600, 0) if b.name == "sdpa" else b for b in model.backend.chain]
        nats = model.nats(tokens, targets)
        nats.sum().backward()
        results[attention] = [nats, *(p.grad for p in model.parameters())]
        assert all(p.grad.abs().max() > 0 for p in model.query_scale.parameters())
    first, *others = results.values()
    for other in others:
        for mine, theirs in zip(other, first, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=2e-4)


def test_the_gradient_of_a_trained_factor_is_a_difference(tiny_config):
    model, tokens = build(tiny_config, "ssmax", scale_bias=True).double(), ids(1, 20)
    scale = model.query_scale.scales[1]
    model.nats(tokens, tokens).sum().backward()
    with torch.no_grad():
        values = []
        for step in (1e-5, -2e-5):
            scale[2] += step
            values.append(model.nats(tokens, tokens).sum())
    assert float((values[0] - values[1]) / 2e-5) == pytest.approx(float(scale.grad[2]), rel=1e-6)


def test_half_precision_queries_take_exact_factors(tiny_config):
    """ln n is not rounded to bfloat16 before it meets the query."""
    model = build(tiny_config, "log_n", train_length=16).bfloat16()
    block = model.layers[0].attention
    seen = {}
    block.register_forward_hook(lambda m, i, o: seen.update(x=i[0]))
    tokens, caught = ids(1, 300), {}
    prepare = model.backend.prepare
    model.backend.prepare = lambda scheme, request: lambda q, k, v, x: (
        caught.setdefault("q", q), prepare(scheme, request)(q, k, v, x))[1]  # fmt: skip
    model(tokens)
    q = block.qkv(seen["x"]).unflatten(-1, (3, 3, 8))[:, :, 0].transpose(1, 2)
    factor = (torch.arange(1, 301).double().log() / math.log(16)).clamp_min(1)
    assert torch.equal(caught["q"], (q.double() * factor[:, None]).float().bfloat16())


def test_a_bias_by_content_is_not_scaled_alone(tiny_config):
    with pytest.raises(ValueError, match=r"query_scale.scale_bias = true with position=cope"):
        build(tiny_config, "ssmax", "cope", scale_bias=True)
    build(tiny_config, "ssmax", "rotary", scale_bias=True)  # no bias, so nothing to refuse
