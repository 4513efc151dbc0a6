"""ALiBi against its paper: numbers written out or computed here in float64, and Hugging Face's module.

docs/what_alibi_is.md names these tests, one for each mistake."""

import math

import numpy as np
import pytest
import torch

from alibi_lm.attention import Request
from alibi_lm.attention.eager import EagerAttention
from alibi_lm.attention.sdpa import SdpaAttention
from alibi_lm.positions.alibi import Alibi, AlibiConfig, alibi_slopes
from alibi_lm.positions.base import PositionShape

EXPONENTS = {
    1: [8],
    2: [4, 8],
    4: [2, 4, 6, 8],
    6: [2, 4, 6, 8, 1, 3],
    8: [1, 2, 3, 4, 5, 6, 7, 8],
    12: [1, 2, 3, 4, 5, 6, 7, 8, 0.5, 1.5, 2.5, 3.5],
    16: [0.5 * h for h in range(1, 17)],
    20: [0.5 * h for h in range(1, 17)] + [0.25, 0.75, 1.25, 1.75],
}


def alibi(num_heads: int = 8, head_dim: int = 16, learned: bool = False) -> Alibi:
    shape = PositionShape(num_heads * head_dim, head_dim, num_heads, 2, 64, 64)
    return AlibiConfig(learned_slopes=learned).build(shape)


@pytest.mark.parametrize("num_heads", sorted(EXPONENTS))
def test_slopes_match_the_authors_rule(num_heads):
    expected = [2.0**-e for e in EXPONENTS[num_heads]]
    assert alibi_slopes(num_heads) == pytest.approx(expected, rel=1e-14)
    torch.testing.assert_close(alibi(num_heads).slopes, torch.tensor(expected))


def test_slopes_for_head_counts_not_a_power_of_two():
    """The rule as the authors state it: those of the next lower power, then every other one of the next higher."""
    for num_heads in range(1, 65):
        slopes = alibi_slopes(num_heads)
        assert len(slopes) == len(set(slopes)) == num_heads
        power = 1 << (num_heads.bit_length() - 1)
        assert slopes[:power] == alibi_slopes(power)
        assert slopes[power:] == alibi_slopes(2 * power)[0::2][: num_heads - power]


def test_slopes_equal_hugging_face():
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    for num_heads in range(1, 65):
        # Row 1 of Bloom's (heads, 1, keys) tensor at key 1 is the slope itself.
        theirs = build_alibi_tensor(torch.ones(1, 2), num_heads, torch.float32)[:, 0, 1]
        torch.testing.assert_close(torch.tensor(alibi_slopes(num_heads)), theirs, rtol=1e-6, atol=0)


def test_interpolation_divides_the_slopes_past_the_trained_length():
    """By T / L, as BTLM does; up to L it is ALiBi, bit for bit."""
    distance, plain = torch.arange(300), alibi()
    for context, divisor in ((16, 1), (64, 1), (256, 4), (96, 1.5)):
        shape = PositionShape(128, 16, 8, 2, 64, context)
        scheme = AlibiConfig(scaling="linear").build(shape)
        expected = -plain.slopes.double()[:, None] / divisor * distance
        torch.testing.assert_close(scheme.distance_bias(distance).double(), expected, rtol=1e-6, atol=0)
        if divisor == 1:
            assert torch.equal(scheme.distance_bias(distance), plain.distance_bias(distance))
    given = AlibiConfig(scaling="linear", factor=2.0).build(PositionShape(128, 16, 8, 2, 64, 16))
    assert torch.equal(given.slopes_per_head(), plain.slopes / 2)


def test_first_slope_is_not_one():
    for num_heads in (2, 4, 8, 16, 32):
        slopes = alibi_slopes(num_heads)
        assert slopes[0] == 2.0 ** (-8 / num_heads) < 1
        assert slopes[-1] == 2.0**-8


def test_slopes_are_positive_and_far_keys_score_lower():
    scheme = alibi()
    assert (scheme.slopes > 0).all() and (scheme.slopes < 1).all()
    row = scheme.bias(torch.tensor([9]), torch.arange(10))[:, 0]
    assert (row.diff(dim=1) > 0).all(), "nearer keys must score higher"
    assert (row[:, 9] == 0).all() and (row[:, :9] < 0).all()


def test_bias_is_the_papers_formula():
    scheme, positions = alibi(12), torch.arange(20)
    bias = scheme.bias(positions, positions)
    for head, exponent in enumerate(EXPONENTS[12]):
        for i in range(20):
            for j in range(i + 1):
                assert bias[head, i, j].item() == pytest.approx(-(2.0**-exponent) * (i - j), rel=1e-6)


def test_bias_is_not_scaled_by_head_dim():
    positions = torch.arange(7)
    assert torch.equal(alibi(8, 4).bias(positions, positions), alibi(8, 64).bias(positions, positions))


def test_scores_are_scaled_before_the_bias_is_added():
    """softmax(q.k / sqrt(K) - m (i - j)) v, in float64, by hand."""
    q, k, v = (torch.randn(1, 8, 5, 16, dtype=torch.float64) for _ in range(3))
    positions = torch.arange(5)
    expected = torch.zeros_like(v)
    for h in range(8):
        for i in range(5):
            scores = [
                float(q[0, h, i] @ k[0, h, j]) / math.sqrt(16) - 2.0 ** -(h + 1) * (i - j) for j in range(i + 1)
            ]
            weights = [math.exp(s - max(scores)) for s in scores]
            for j in range(i + 1):
                expected[0, h, i] += weights[j] / sum(weights) * v[0, h, j]
    for backend in (EagerAttention(), SdpaAttention()):
        attend = backend.prepare(alibi(), Request(positions, positions, 4, None, q.dtype, 0.0))
        torch.testing.assert_close(attend(q, k, v, None), expected, rtol=1e-12, atol=1e-12)


def test_bias_is_causal_only_finite():
    bias = alibi().bias(torch.arange(6), torch.arange(6))
    assert torch.isfinite(bias).all()
    assert (bias.triu(1) == 0).all(), "keys ahead are the backend's to mask, not mirrored distances"


def test_bias_survives_half_precision():
    for cast in (torch.bfloat16, torch.float16):
        scheme = alibi().to(cast)
        bias = scheme.bias(torch.tensor([3071]), torch.arange(3072))
        assert bias.dtype == torch.float32
        distance = torch.arange(3071, -1, -1, dtype=torch.float64)
        expected = -torch.tensor([2.0**-h for h in range(1, 9)], dtype=torch.float64)[:, None] * distance
        assert torch.equal(bias[:, 0].double(), expected)
    # The cast is not kept when it is undone.
    assert torch.equal(alibi(12).bfloat16().float().slopes, alibi(12).slopes)


def test_no_parameters_and_nothing_in_the_state_dict():
    scheme = alibi()
    assert list(scheme.parameters()) == [] and scheme.state_dict() == {}


def test_learned_slopes_start_at_the_fixed_ones_and_stay_positive():
    scheme = alibi(6, learned=True)
    torch.testing.assert_close(scheme.slopes_per_head(), alibi(6).slopes, rtol=1e-6, atol=0)
    with torch.no_grad():
        scheme.log_slopes.sub_(20)
    assert (scheme.slopes_per_head() > 0).all()


def test_no_heads_is_an_error():
    with pytest.raises(ValueError, match="num_heads = 0"):
        alibi_slopes(0)


def test_half_precision_rounds_scores_as_the_authors_code_does():
    """numpy's float16, score by score: half(half(q.k / sqrt(K)) + half(m j)); near exact for the first keys."""
    scheme = AlibiConfig(half_precision=True).build(PositionShape(128, 16, 8, 2, 64, 64))
    q, k = torch.randn(1, 8, 3, 16), torch.randn(1, 8, 1500, 16)
    q_pos, k_pos = torch.arange(1497, 1500), torch.arange(1500)
    scores = (q.double() @ k.double().mT / 4).numpy()
    keys = (2.0 ** -np.arange(1, 9))[:, None, None] * np.arange(1500)
    expected = (scores.astype(np.float16) + keys.astype(np.float16)).astype(np.float64)
    found = scheme.content_bias(q, k, None, q_pos, k_pos).double().numpy() + scores
    # A score in the middle of two float16 numbers may go either way: few, and by one step (0.5 at 512 and above).
    assert (np.abs(found - expected) > 1e-4).mean() < 1e-3 and np.abs(found - expected).max() <= 0.5
    assert np.abs(expected - (scores + keys)).max() > 0.2, "far keys of steep heads are rounded coarsely"
    early = torch.softmax(torch.tensor(found[..., :40]), -1)
    exact = torch.softmax(torch.tensor(scores)[..., :40] + alibi().bias(q_pos, k_pos[:40]).double(), -1)
    torch.testing.assert_close(early, exact, rtol=0.02, atol=1e-4)


def test_slopes_end_at_the_last_exponent():
    assert alibi_slopes(6, 4.0) == pytest.approx([2**-1, 2**-2, 2**-3, 2**-4, 2**-0.5, 2**-1.5])


@pytest.mark.parametrize("other", [{"learned_slopes": True}, {"scaling": "linear"}, {"last_exponent": 7.0}])
def test_half_precision_is_for_the_papers_slopes_only(other):
    with pytest.raises(ValueError, match="half_precision = true is the authors' own form"):
        AlibiConfig(half_precision=True, **other)
