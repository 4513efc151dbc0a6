"""The package's own CPU kernel against the definition in float64: outputs, gradients, and what it leaves out."""

import math
import re
from pathlib import Path

import pytest
import torch

from alibi_lm.attention import Backends, native
from alibi_lm.attention.native_library import ROWS
from alibi_lm.positions.alibi import alibi_slopes

from . import kernels
from .kernels import assert_within, definition, draw, request, run, scheme_of

pytestmark = pytest.mark.skipif(bool(native.why_not()), reason=f"attention=native: {native.why_not()}")
BUDGET = 3e-6
ROOT = Path(__file__).resolve().parents[2]


def alibi_bias(heads: int, length: int) -> torch.Tensor:
    return -torch.tensor(alibi_slopes(heads))[:, None] * torch.arange(length)


def attend(q, k, v, grad, bias=None, window=None) -> list[torch.Tensor]:
    leaves = [x.detach().requires_grad_() for x in (q, k, v, bias) if x is not None]
    out = native.attend(*leaves[:3], leaves[3] if bias is not None else None, window or q.shape[2])
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize(
    ("name", "settings"),
    [("none", {}), ("alibi", {}), ("alibi", {"learned_slopes": True}), ("t5", {}), ("t5", {"max_distance": 20})],
)
def test_every_scheme_equals_eager(name, settings):
    for length, num_heads in [(n, 6) for n in (1, 2, 47, 48, 49, 63, 64, 65, 97, 250)] + [(65, 1), (97, 1)]:
        scheme = scheme_of(name, num_heads, **settings)
        expected = run("eager", scheme, length, torch.float64)
        actual = run(native.NativeAttention(), scheme, length, torch.float32)
        # A parameter's gradient adds up many float32 numbers of both signs.
        assert_within(actual, expected, 1e-5 if list(scheme.parameters()) else BUDGET)


@pytest.mark.parametrize("dim", [1, 8, 10, 16, 20, 32, 33, 64, 128])
def test_every_head_dim(dim, length=150):
    q, k, v, grad = draw(2, 3, length, dim)
    bias = torch.randn(3, length)  # no scheme's: neither line nor steps
    for given in (None, bias):
        assert_within(attend(q, k, v, grad, given), definition(q, k, v, grad, given), BUDGET)


@pytest.mark.parametrize("window", [1, 2, 17, 48, 64, 65, 149, 150, 1000])
@pytest.mark.parametrize("biased", [False, True])
def test_a_window_hides_what_lies_outside(window, biased):
    q, k, v, grad = draw(1, 2, 150, 16)
    bias = torch.randn(2, 150) if biased else None
    assert_within(attend(q, k, v, grad, bias, window), definition(q, k, v, grad, bias, window), BUDGET)


@pytest.mark.parametrize(("length", "size"), [(400, 0.1), (700, 4.0)])
def test_steep_heads_equal_the_definition(length, size):
    q, k, v, grad = draw(1, 8, length, 16, size)
    bias = alibi_bias(8, length)
    _, _, reach = native.forward(q, k, v, bias, length, None)
    assert reach.min() < length == reach[:, -1].min()  # the steepest head leaves keys out, the gentlest none
    assert_within(attend(q, k, v, grad, bias), definition(q, k, v, grad, bias), BUDGET * max(1, size))


@pytest.mark.parametrize(("size", "num_heads"), [(0.1, 6), (1.0, 4), (3.0, 6)])
@pytest.mark.parametrize("opposed", [False, True])
def test_what_lies_past_the_reach_weighs_less_than_float32_rounds_away(size, num_heads, opposed):
    length = 450
    q, k, v, _ = draw(1, num_heads, length, 8, size)
    if opposed:  # every query shuns its own key and seeks the early ones
        q[:], k[:, :, :200], k[:, :, 200:] = size, size, -size
    bias = alibi_bias(num_heads, length)
    reach = native.forward(q, k, v, bias, length, None)[2]
    distance = torch.arange(length)[:, None] - torch.arange(length)
    of_query = reach.repeat_interleave(ROWS, dim=2)[:, :, :length, None]
    assert (kernels.weights(q, k, bias) * (distance >= of_query)).sum(-1).max() <= 2.0**-25
    assert reach.min() < length


def test_the_reach_is_what_the_formula_says():
    """q = 0 makes every score 0: the far keys' weight is a geometric series over the query's own 1."""
    q, k, v = torch.zeros(1, 2, 500, 8), *torch.randn(2, 1, 2, 500, 8)
    slopes = torch.tensor([0.5, 0.25])
    bias = -slopes[:, None] * torch.arange(500)
    reach = native.forward(q, k, v, bias, 500, None)[2]
    for constant in (-32.0, 32.0):
        assert torch.equal(native.forward(q, k, v, bias + constant, 500, None)[2], reach)
    k[0, 1, 10, 0] = math.nan
    assert (native.forward(q, k, v, bias, 500, None)[2][0, 1] == 500).all()  # nobody knows its weight
    for slope, found in zip(slopes.tolist(), reach[0], strict=True):
        assert len(set(found.tolist())) == 1
        total = [sum(math.exp(-slope * d) for d in range(start, 500)) for start in (found[0] - 1, found[0])]
        assert total[0] > 2.0**-25 >= total[1]


def test_one_far_key_of_great_weight_keeps_its_place():
    """A key whose score outweighs any distance: the bound sees its norm, so nothing is left out after it."""
    length = 600
    q, k, v, grad = draw(1, 2, length, 8)
    q[:] = q.abs()
    k[:, 0, 3] = 300.0
    bias = -torch.tensor([0.5, 0.25])[:, None] * torch.arange(length)
    reach = native.forward(q, k, v, bias, length, None)[2]
    assert (reach[0, 0] == length).all() and (reach[0, 1] < length).all()
    expected = definition(q, k, v, grad, bias)
    assert (expected[0][:, 0, 5:200] - v[:, 0, 3:4].double()).abs().max() < 1e-3  # they all look at it
    assert_within(attend(q, k, v, grad, bias), expected, 1e-5)


@pytest.mark.parametrize(
    "bias",
    [
        pytest.param(0.5 * torch.arange(600.0), id="rising"),
        pytest.param(torch.zeros(600), id="flat"),
        pytest.param(-0.5 * torch.arange(600.0).clamp_max(20), id="flat from some distance on"),
    ],
)
def test_a_bias_that_does_not_fall_for_good_leaves_nothing_out(bias):
    q, k, v, grad = draw(1, 1, 600, 8)
    assert (native.forward(q, k, v, bias[None], 600, None)[2] == 600).all()
    rounding = 6e-8 * float(bias.abs().max())  # of the scores it is added to
    assert_within(attend(q, k, v, grad, bias[None]), definition(q, k, v, grad, bias[None]), BUDGET + rounding)


@pytest.mark.parametrize("heads", [2, 8])
def test_neither_later_tokens_nor_other_sequences_nor_threads_change_a_bit(heads):
    q, k, v, grad = draw(3, heads, 400, 8)
    bias = alibi_bias(heads, 400)
    expected = attend(q, k, v, grad, bias)
    changed = [x.clone() for x in (q, k, v)]
    for x in changed:
        x[:, :, 250:] *= 5
        x[1] *= 3
    later = native.attend(*changed, bias, 400)
    assert torch.equal(later[::2, :, :250], expected[0][::2, :, :250])
    assert not torch.equal(later[:, :, 250:], expected[0][:, :, 250:])
    alone = attend(*(x[:1] for x in (q, k, v, grad)), bias)
    assert all(torch.equal(x, y[:1]) for x, y in zip(alone[:4], expected[:4], strict=True))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert all(torch.equal(x, y) for x, y in zip(attend(q, k, v, grad, bias), expected, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("part", ["query", "key", "value"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("biased", [False, True])
def test_what_is_not_finite_is_passed_on(part, bad, biased):
    q, k, v, grad = draw(1, 4, 200, 8)
    bias = alibi_bias(4, 200) if biased else None
    {"query": q, "key": k, "value": v}[part][0, 0, 100, 0] = bad
    finite = native.attend(q, k, v, bias, 200).isfinite().all(-1)[0]
    assert finite[1:].all()
    if part == "value":
        # Rows of the same tile may multiply it by a weight of zero, as the definition does in all rows.
        assert finite[0, :96].all() and not finite[0, 100:110].any()
    else:
        expected = definition(q, k, v, grad, bias)[0].isfinite().all(-1)[0]
        assert torch.equal(finite, expected) and not expected.all()


def test_a_gradient_that_is_not_finite_is_passed_on():
    q, k, v, grad = draw(1, 1, 130, 8)
    grad[0, 0, 100, 0] = math.nan
    _, grad_q, grad_k, grad_v = attend(q, k, v, grad)
    assert grad_q[0, 0, 100].isnan().all() and grad_q[0, 0, :100].isfinite().all()
    assert grad_k[0, 0, :101].isnan().all() and grad_v[0, 0, :101, 0].isnan().all()


def test_weights_that_float32_cannot_hold_are_zero_not_denormal():
    q, k, v = torch.zeros(3, 1, 1, 128, 8)
    v[0, 0, 0] = 1.0
    bias = -torch.arange(128.0)[None]
    out = native.attend(q, k, v, bias, 128)[0, 0, :, 0]
    assert (out[:40] > 0).all() and (out[60:] == 0).all()


def test_any_strides():
    q, k, v, grad = draw(2, 3, 90, 16)
    expected = attend(q, k, v, grad)
    moved = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (q, k, v, grad)]
    assert all(x.stride(-1) != 1 for x in moved)
    apart = [torch.stack([x, x], dim=3)[:, :, :, 0] for x in (q, k, v, grad)]
    once = [x[:1, :1].contiguous() for x in (q, k, v, grad)]
    for form in (moved, apart, [x.contiguous() for x in (q, k, v, grad)]):
        assert all(torch.equal(x, y) for x, y in zip(attend(*form), expected, strict=True))
    shared = [x.expand(2, 3, -1, -1) for x in once]
    for x, y in zip(attend(*shared), attend(*once), strict=True):
        assert torch.equal(x, y.expand_as(x))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("q", lambda x: x.double()),
        ("k", lambda x: x[:, :, :-1]),
        ("v", lambda x: x[..., :-1]),
        ("bias", lambda x: x[:1]),
        ("bias", lambda x: x[:, :-1]),
        ("bias", lambda x: x.double()),
    ],
)
def test_what_it_would_read_past_the_end_of_is_refused(name, change):
    tensors = dict(zip("qkv", draw(1, 3, 40, 8), strict=False), bias=alibi_bias(3, 40))
    tensors[name] = change(tensors[name])
    with pytest.raises(ValueError, match=rf"attention = native got {name} of shape"):
        native.attend(**tensors, window=40)


@pytest.mark.slow
def test_a_compiler_sees_the_operators_as_they_are():
    q, k, v, grad = draw(2, 4, 100, 8)
    for bias in (None, alibi_bias(4, 100), alibi_bias(4, 100).requires_grad_()):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        torch.library.opcheck(native._operator, (*leaves, bias, 100, None))
        with torch.no_grad():
            saved = native.forward(q, k, v, bias, 100, None)
            arguments = (grad, q, k, v, bias, 100, None, *saved, bias is not None, False)
            torch.library.opcheck(native._operator_backward, arguments)
    key_bias = torch.randn(2, 4, 100, dtype=torch.float64)
    torch.library.opcheck(native._operator, (q, k, v, None, 100, key_bias.requires_grad_()))
    with torch.no_grad():
        saved = native.forward(q, k, v, None, 100, key_bias)
        arguments = (grad, q, k, v, None, 100, key_bias, *saved, False, True)
        torch.library.opcheck(native._operator_backward, arguments)


def chosen(name: str, positions=80, **facts) -> str:
    """The backend that serves a pass where native was asked for."""
    return Backends("native", name).choose(scheme_of(name, 3), request(positions, **facts)).name


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({}, "native"),
        ({"window": 7}, "native"),
        ({"positions": torch.arange(40, 120)}, "native"),
        ({"dtype": torch.bfloat16}, "sdpa"),
        ({"dtype": torch.float64}, "sdpa"),
        ({"dropout": 0.1}, "sdpa"),
        ({"queries": 1}, "sdpa"),
        ({"positions": torch.arange(80) * 2}, "sdpa"),
    ],
)
def test_what_it_does_not_serve_goes_to_sdpa(facts, expected):
    assert chosen("alibi", **facts) == expected


def test_gaps_matter_where_a_distance_does():
    gaps = torch.arange(80) * 2
    assert chosen("none", positions=gaps) == chosen("none", positions=gaps, window=200) == "native"
    assert chosen("none", positions=gaps, window=100) == "sdpa"


@pytest.mark.parametrize("name", ["none", "alibi", "t5"])
@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("positions", [torch.arange(100) * 10, torch.arange(100) + (torch.arange(100) > 60)])
def test_positions_with_gaps_do_not_take_the_distance_of_their_indices(name, window, positions):
    scheme, (q, k, v, _) = scheme_of(name, 3), draw(1, 3, 100, 8)
    eager, native_or_sdpa, sdpa = (
        kernels.attend(backend, scheme, q, k, v, positions, window) for backend in ("eager", "native", "sdpa")
    )
    torch.testing.assert_close(native_or_sdpa, eager, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sdpa, eager, rtol=1e-4, atol=1e-5)


def test_it_is_tried_in_float32_whatever_the_caller_has_chosen():
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
            assert native.why_not.__wrapped__() == ""
    finally:
        torch.set_default_dtype(before)


def test_the_documented_share_of_the_scores():
    """docs/speed.md says what eight heads compute where every score may exceed the query's own by 20."""
    text = " ".join((ROOT / "docs" / "speed.md").read_text().split())
    keys = int(re.search(r"KEYS = (\d+);", (ROOT / "alibi_lm" / "attention" / "native.cpp").read_text())[1])
    shares = []
    for length in (1024, 4096, 16384):
        q, k, v = torch.zeros(3, 1, 8, length, 8)
        q[..., 0] = k[..., 1] = (20 * 8**0.5) ** 0.5
        reach = native.forward(q, k, v, alibi_bias(8, length), length, None)[2][0]
        first_query = torch.arange(0, length, ROWS)
        end = (first_query + ROWS).clamp_max(length)
        first_key = (first_query - reach + 1).clamp_min(0) // keys * keys
        rows = end - first_query
        shares.append(float((rows * (end - first_key)).sum() / (8 * rows * end).sum()))
    expected = "computes {:.2f} of the visible scores at 1,024 tokens, {:.2f} at 4,096, {:.2f} at 16,384"
    assert expected.format(*shares) in text
