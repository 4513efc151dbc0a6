"""Sinusoidal, learned, rotary and T5 bias against formulas written here in float64, and Hugging Face."""

import math

import pytest
import torch

from alibi_lm.positions.bam import BamConfig
from alibi_lm.positions.base import PositionShape
from alibi_lm.positions.cope import CopeConfig
from alibi_lm.positions.dape import DapeConfig
from alibi_lm.positions.fire import FireConfig
from alibi_lm.positions.fox import FoxConfig
from alibi_lm.positions.grape_ap import GrapeApConfig
from alibi_lm.positions.learned import LearnedConfig
from alibi_lm.positions.pope import PopeConfig
from alibi_lm.positions.rotary import RotaryConfig, rotate_pairs
from alibi_lm.positions.sandwich import SandwichConfig
from alibi_lm.positions.shaw import ShawConfig
from alibi_lm.positions.sinusoidal import SinusoidalConfig
from alibi_lm.positions.t5 import T5Config, t5_bucket
from alibi_lm.positions.transformer_xl import TransformerXLConfig


def shape(model_dim=32, num_heads=2, train_length=64, context_length=64) -> PositionShape:
    return PositionShape(model_dim, model_dim // num_heads, num_heads, 2, train_length, context_length)


def test_sinusoidal_vaswani_formula():
    scheme = SinusoidalConfig(variant="vaswani").build(shape())
    positions = torch.tensor([0, 1, 63, 16000])
    vectors = scheme.vectors(positions)
    for row, p in zip(vectors, positions.tolist(), strict=True):
        for i in range(16):
            angle = p / 10000 ** (2 * i / 32)
            assert row[2 * i].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert row[2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)


def test_sinusoidal_fairseq_formula():
    """Offset 2, sines then cosines, divisor half - 1."""
    scheme = SinusoidalConfig(variant="fairseq").build(shape())
    vectors = scheme.vectors(torch.arange(50))
    for p in range(50):
        for i in range(16):
            angle = (p + 2) * math.exp(-i * math.log(10000) / 15)
            assert vectors[p, i].item() == pytest.approx(math.sin(angle), abs=1e-5)
            assert vectors[p, 16 + i].item() == pytest.approx(math.cos(angle), abs=1e-5)


def test_sinusoidal_is_added_and_survives_half_precision():
    scheme = SinusoidalConfig().build(shape())
    x, positions = torch.randn(2, 5, 32), torch.arange(5)
    torch.testing.assert_close(scheme.add_to_embeddings(x, positions), x + scheme.vectors(positions))
    torch.testing.assert_close(
        SinusoidalConfig().build(shape()).bfloat16().vectors(torch.tensor([5801])),
        scheme.vectors(torch.tensor([5801])),
    )


def test_learned_adds_the_row_of_each_position():
    scheme = LearnedConfig().build(shape(train_length=10))
    assert scheme.max_position == 10 and scheme.table.shape == (10, 32)
    x = torch.zeros(1, 3, 32)
    torch.testing.assert_close(scheme.add_to_embeddings(x, torch.tensor([9, 0, 4]))[0], scheme.table[[9, 0, 4]])


def test_rotary_rotates_interleaved_pairs_by_the_papers_angles():
    scheme = RotaryConfig().build(shape())
    q = torch.randn(1, 2, 3, 16, dtype=torch.float64)
    positions = torch.tensor([0, 5, 3000])
    rotated, _ = scheme.transform_qk(q, q, scheme.tables(positions))
    for t, p in enumerate(positions.tolist()):
        for i in range(8):
            angle = p * 10000 ** (-2 * i / 16)
            z = complex(*q[0, 1, t, 2 * i : 2 * i + 2].tolist()) * complex(math.cos(angle), math.sin(angle))
            assert rotated[0, 1, t, 2 * i].item() == pytest.approx(z.real, abs=1e-6)
            assert rotated[0, 1, t, 2 * i + 1].item() == pytest.approx(z.imag, abs=1e-6)


def test_rotary_equals_hugging_face_gptj():
    from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb, create_sinusoidal_positions

    scheme = RotaryConfig().build(shape())
    q = torch.randn(2, 2, 20, 16)
    positions = torch.arange(20)
    sin, cos = create_sinusoidal_positions(64, 16)[positions].chunk(2, dim=-1)
    # GPT-J: (batch, tokens, heads, head_dim).
    theirs = apply_rotary_pos_emb(q.transpose(1, 2), sin[None], cos[None]).transpose(1, 2)
    ours, _ = scheme.transform_qk(q, q, scheme.tables(positions))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_rotary_products_depend_on_distance_only():
    scheme = RotaryConfig().build(shape())
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def product(i: int, j: int) -> float:
        rotated_q, _ = scheme.transform_qk(q, q, scheme.tables(torch.tensor([i])))
        _, rotated_k = scheme.transform_qk(k, k, scheme.tables(torch.tensor([j])))
        return float((rotated_q * rotated_k).sum())

    assert product(7, 3) == pytest.approx(product(1007, 1003), abs=1e-4)
    assert abs(product(7, 3) - product(3, 7)) > 1e-3, "the direction matters"
    assert abs(product(7, 3) - product(8, 3)) > 1e-3


def test_rotary_keeps_lengths_and_float32_angles_in_half_precision():
    x = torch.randn(1, 1, 4, 16)
    cos, sin = RotaryConfig().build(shape()).tables(torch.arange(4))
    torch.testing.assert_close(rotate_pairs(x, cos, sin).norm(dim=-1), x.norm(dim=-1))
    exact = RotaryConfig().build(shape()).tables(torch.tensor([3071]))
    cast = RotaryConfig().build(shape()).bfloat16().tables(torch.tensor([3071]))
    assert torch.equal(exact[0], cast[0]) and cast[0].dtype == torch.float32


def test_rotary_scalings():
    """Factor 4: linear divides all; ntk keeps the fastest and divides the slowest; yarn likewise, by turns."""
    build = lambda **kw: RotaryConfig(**kw).build(shape(model_dim=256, train_length=2048)).inv_freq  # noqa: E731
    plain = build()
    torch.testing.assert_close(build(scaling="linear", factor=4.0), plain / 4)
    ntk = build(scaling="ntk", factor=4.0)
    assert ntk[0] == plain[0] and ntk[-1].item() == pytest.approx(plain[-1].item() / 4, rel=1e-9)
    yarn = build(scaling="yarn", factor=4.0)
    turns = 2048 * plain / (2 * math.pi)
    assert torch.equal(yarn[turns > 40], plain[turns > 40]), "fast dimensions stay"
    torch.testing.assert_close(yarn[turns < 0.9], plain[turns < 0.9] / 4)
    middle = (turns < 20) & (turns > 2)
    assert ((yarn < plain) & (yarn > plain / 4))[middle].all()
    scheme = RotaryConfig(scaling="yarn", factor=4.0).build(shape())
    assert scheme.amplitude == pytest.approx(0.1 * math.log(4) + 1)
    by_parts = RotaryConfig(scaling="by_parts", factor=4.0).build(shape(model_dim=256, train_length=2048))
    assert torch.equal(by_parts.inv_freq, yarn) and by_parts.amplitude == 1.0


@pytest.mark.parametrize(
    ("settings", "slow", "fast"),
    [
        ({"scaling": "llama3"}, 1, 4),
        ({"scaling": "by_parts", "ramp": "turns"}, 1, 32),
        ({"scaling": "yarn", "ramp": "exact"}, 1, 32),
        ({"scaling": "part_ntk", "ramp": "exact"}, 2, 16),
    ],
)
def test_ramps_of_rotary_scalings(settings, slow, fast):
    """Frequencies with many turns stay, those with few are divided, and between the two stands a line."""
    built = RotaryConfig(factor=4.0, **settings).build(shape(model_dim=256, train_length=2048)).inv_freq.tolist()
    for index, found in enumerate(built):
        plain = 10000 ** (-index / 64)
        turns = 2048 * plain / (2 * math.pi)
        if settings.get("ramp") == "exact":  # the index is a line in the logarithm of turns
            share = math.log(turns / slow) / math.log(fast / slow)
        else:
            share = (turns - slow) / (fast - slow)
        share = min(max(share, 0.0), 1.0)
        low = plain / 4
        if settings["scaling"] == "part_ntk":
            by_base = min(max(math.log(turns / 0.75) / math.log(1.25 / 0.75), 0.0), 1.0)
            low += by_base * ((10000 * 4 ** (128 / 126)) ** (-index / 64) - low)
        assert found == pytest.approx(share * plain + (1 - share) * low, rel=1e-9), (index, turns)


@pytest.mark.parametrize(("factor", "context", "s"), [(None, 192, 3.0), (None, 32, 1.0), (2.0, 192, 5.0)])
def test_dynamic_ntk_follows_the_context(factor, context, s):
    """s = factor * context / train length - (factor - 1), and never below 1."""
    dynamic = RotaryConfig(scaling="dynamic", factor=factor).build(shape(train_length=64, context_length=context))
    ntk = RotaryConfig(scaling="ntk", factor=s).build(shape(train_length=64))
    torch.testing.assert_close(dynamic.inv_freq, ntk.inv_freq, rtol=1e-14, atol=0)


def test_yarn_equals_hugging_face():
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 2048}
    config = LlamaConfig(
        hidden_size=256, num_attention_heads=2, max_position_embeddings=8192, rope_parameters=yarn
    )
    inv_freq, amplitude = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    ours = RotaryConfig(scaling="yarn", factor=4.0).build(shape(model_dim=256, train_length=2048))
    torch.testing.assert_close(ours.inv_freq.float(), inv_freq, rtol=1e-5, atol=0)
    assert ours.amplitude == pytest.approx(amplitude)


def test_rotary_shares_leave_dimensions_without_positions():
    """Half of 16 dimensions rotated: 4 pairs, of which the slower half stands still."""
    scheme = RotaryConfig(rotated_share=0.5, frequency_share=0.5).build(shape())
    q = torch.randn(1, 2, 1, 16, dtype=torch.float64)
    rotated, _ = scheme.transform_qk(q, q, scheme.tables(torch.tensor([70])))
    for i, frequency in enumerate([1.0, 10000**-0.25]):
        z = complex(*q[0, 1, 0, 2 * i : 2 * i + 2].tolist()) * complex(
            math.cos(70 * frequency), math.sin(70 * frequency)
        )
        assert rotated[0, 1, 0, 2 * i].item() == pytest.approx(z.real, abs=1e-5)
        assert rotated[0, 1, 0, 2 * i + 1].item() == pytest.approx(z.imag, abs=1e-5)
    assert torch.equal(rotated[..., 4:], q[..., 4:])


def test_rotary_automatic_factor_follows_the_context():
    scheme = RotaryConfig(scaling="linear").build(shape(train_length=64, context_length=256))
    torch.testing.assert_close(scheme.inv_freq, RotaryConfig().build(shape()).inv_freq / 4)
    same = RotaryConfig(scaling="linear").build(shape(train_length=64, context_length=32))
    torch.testing.assert_close(same.inv_freq, RotaryConfig().build(shape()).inv_freq)


def test_t5_buckets_against_a_table():
    """32 buckets to distance 128: one each up to 15, then logarithmic, 113 and beyond in the last."""
    far = {16: 16, 18: 16, 19: 17, 20: 17, 21: 18, 45: 23, 46: 24, 90: 29, 91: 29, 112: 30, 113: 31, 10**6: 31}
    table = {d: d for d in range(16)} | far
    assert t5_bucket(torch.tensor(list(table)), 32, 128).tolist() == list(table.values())


def test_t5_buckets_equal_hugging_face():
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = torch.arange(0, 5000)
    for num_buckets, max_distance in ((32, 128), (32, 32), (8, 20)):
        theirs = T5Attention._relative_position_bucket(
            -distance, bidirectional=False, num_buckets=num_buckets, max_distance=max_distance
        )
        assert torch.equal(t5_bucket(distance, num_buckets, max_distance), theirs)


def test_t5_bias_looks_up_the_bucket_of_the_distance_back():
    scheme = T5Config(max_distance=128).build(shape(num_heads=4, model_dim=32))
    bias = scheme.bias(torch.tensor([20, 300]), torch.tensor([0, 5, 20, 300]))
    table = scheme.table
    for head in range(4):
        assert bias[head, 0, 1] == table[15, head] and bias[head, 0, 2] == table[0, head]
        assert bias[head, 1, 0] == table[31, head] and bias[head, 1, 3] == table[0, head]


def test_t5_default_max_distance_is_within_training():
    assert T5Config().build(shape(train_length=64)).max_distance == 32
    assert T5Config().build(shape(train_length=3072)).max_distance == 128
    assert T5Config().build(shape(train_length=8)).max_distance == 17


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RotaryConfig(theta=1.0), "theta = 1.0"),
        (lambda: RotaryConfig(scaling="magic"), "scaling = 'magic'. Allowed: none, linear, ntk, dynamic"),
        (lambda: RotaryConfig(factor=0.5), "factor = 0.5"),
        (lambda: RotaryConfig(rotated_share=0.0), "rotated_share = 0.0. Allowed: (0, 1]"),
        (lambda: RotaryConfig(rotated_share=0.2).build(shape()), "rotates 3 of 16 dimensions"),
        (lambda: RotaryConfig().build(shape(model_dim=6)), "model_dim / num_heads = 3 with position=rotary"),
        (lambda: T5Config(num_buckets=31), "num_buckets = 31"),
        (lambda: T5Config(max_distance=16), "max_distance = 16"),
        (lambda: SinusoidalConfig(variant="learned"), "variant = 'learned'"),
        (lambda: SinusoidalConfig().build(shape(33, 3)), "model_dim = 33 with position=sinusoidal"),
        (lambda: CopeConfig(num_positions=1), "position.num_positions = 1"),
        (lambda: BamConfig(start="paper"), "position.start = 'paper'. Allowed: code, readme."),
        (lambda: DapeConfig(base="rotary"), "position.base = 'rotary'. Allowed: kerple_log, alibi."),
        (lambda: FireConfig(reading="paper"), "position.reading = 'paper'. Allowed: arithmetic, dape."),
        (lambda: FoxConfig(gates="none"), "position.gates = 'none'. Allowed: input, bias, fixed."),
        (lambda: FoxConfig(shortest=9.0, longest=3.0), "position.shortest = 9.0, longest = 3.0."),
        (lambda: GrapeApConfig(width=3), "position.width = 3."),
        (lambda: GrapeApConfig().build(shape(10)), "model_dim / num_heads = 5 with position=grape_ap"),
        (lambda: PopeConfig(theta=1.0), "position.theta = 1.0"),
        (lambda: SandwichConfig(width=33), "position.width = 33."),
        (lambda: ShawConfig(clip=0), "position.clip = 0."),
        (lambda: TransformerXLConfig(clamp_distance=0), "position.clamp_distance = 0."),
    ],
)
def test_settings_are_checked(build, message):
    with pytest.raises(ValueError) as caught:
        build()
    assert message in str(caught.value)
