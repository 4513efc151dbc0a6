"""What every registered scheme must satisfy; a new scheme is covered as soon as it is registered."""

import pytest
import torch

from alibi_lm.attention.native import why_not
from alibi_lm.model.transformer import KeyValueCache
from alibi_lm.positions import POSITIONS, PositionScheme, PositionShape

ALL = sorted(POSITIONS)
VARIANTS = [(name, {}) for name in ALL] + [
    ("alibi", {"learned_slopes": True}),
    ("sinusoidal", {"variant": "vaswani"}),
    ("rotary", {"scaling": "yarn", "factor": 4.0}),
]
IDS = ["-".join([name, *map(str, settings.values())]) for name, settings in VARIANTS]
each_variant = pytest.mark.parametrize(("name", "settings"), VARIANTS, ids=IDS)
BACKENDS = ("eager", "sdpa", *([] if why_not() else ["native"]))


def variants_that_define(hook: str) -> pytest.MarkDecorator:
    """Only the schemes that override a hook."""
    chosen = [
        pytest.param(name, settings, id=i)
        for (name, settings), i in zip(VARIANTS, IDS, strict=True)
        if hook in vars(scheme := type(POSITIONS[name](**settings).build(PositionShape(24, 8, 3, 2, 64, 64))))
        and scheme is not PositionScheme
    ]
    return pytest.mark.parametrize(("name", "settings"), chosen)


def ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, 50, (batch, length))


@each_variant
def test_one_seed_gives_every_scheme_the_same_weights_elsewhere(tiny_model, name, settings):
    mine, plain = tiny_model(name, **settings).state_dict(), tiny_model("none").state_dict()
    shared = [key for key in mine if not key.startswith("positions.")]
    assert shared == [key for key in plain if not key.startswith("positions.")]
    assert all(torch.equal(mine[key], plain[key]) for key in shared)


@each_variant
@pytest.mark.parametrize("attention", BACKENDS)
def test_later_tokens_change_nothing_before_them(tiny_model, name, settings, attention):
    model = tiny_model(name, attention, **settings)
    tokens = ids(2, 40)
    changed = tokens.clone()
    changed[:, 25:] = (changed[:, 25:] + 1) % 50
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :25], after[:, :25])
    assert not torch.allclose(before[:, 25:], after[:, 25:])


@each_variant
def test_later_tokens_change_no_more_than_rounding_in_a_long_sequence(tiny_model, name, settings):
    """Long sequences take other routes; how they split their sums may depend on all tokens."""
    model = tiny_model(name, "sdpa", train_length=700, **settings)
    with torch.no_grad():
        for block in model.layers:
            block.attention.qkv.weight *= 2  # scores as large as in a trained model
    tokens = ids(2, 700)
    changed = tokens.clone()
    changed[:, 600:] = (changed[:, 600:] + 1) % 50
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :600], after[:, :600], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before[:, 600:], after[:, 600:], rtol=1e-2, atol=1e-2)


@each_variant
@pytest.mark.parametrize("attention", BACKENDS)
def test_gradient_reaches_all_earlier_tokens_and_no_later_one(tiny_model, name, settings, attention):
    model = tiny_model(name, attention, **settings)
    seen = {}
    model.vocabulary.embed = lambda tokens, embed=model.vocabulary.embed: seen.setdefault(
        "x", embed(tokens).detach().requires_grad_()
    )
    model(ids(1, 12))[0, 7].square().sum().backward()
    reached = seen["x"].grad[0].abs().amax(dim=1)
    assert (reached[:8] > 0).all()
    assert (reached[8:] == 0).all()


@each_variant
@pytest.mark.parametrize("attention", BACKENDS)
def test_decoding_in_pieces_equals_one_pass(tiny_model, name, settings, attention):
    model = tiny_model(name, attention, **settings)
    tokens = ids(2, 96)
    cache = KeyValueCache()
    pieces = [model(piece, cache=cache) for piece in tokens.split([40, 1, 55], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens), rtol=1e-4, atol=2e-6)


# The constant alone would also pass where decoding drops the bias from both: this one compares two schemes.
def test_cached_decoding_keeps_the_bias(tiny_model):
    tokens = ids(1, 30)
    outputs = {}
    for name in ("alibi", "none"):
        model, cache = tiny_model(name, "sdpa"), KeyValueCache()
        model(tokens[:, :29], cache=cache)
        outputs[name] = model(tokens[:, 29:], cache=cache)
        torch.testing.assert_close(outputs[name], model(tokens)[:, 29:], rtol=1e-4, atol=2e-6)
    assert not torch.allclose(outputs["alibi"], outputs["none"], atol=1e-3)


@each_variant
@pytest.mark.parametrize("attention", BACKENDS)
def test_shift_of_all_positions(tiny_model, name, settings, attention):
    model = tiny_model(name, attention, **settings)
    tokens = ids(1, 60)
    positions = torch.arange(60)
    difference = (model(tokens, positions=positions) - model(tokens, positions=positions + 37)).abs().max()
    if model.positions[0].translation_invariant:
        assert difference < 1e-5
    else:
        assert difference > 1e-2


def test_which_schemes_are_invariant(tiny_model):
    invariant = {name for name in ALL if tiny_model(name).positions[0].translation_invariant}
    assert {"none", "rotary", "alibi", "t5"} <= invariant
    assert not {"sinusoidal", "learned"} & invariant


@each_variant
@pytest.mark.parametrize("length", [1, 2, 17, 101])
@pytest.mark.parametrize("window", [None, 5])
def test_backends_agree_in_outputs_and_gradients(tiny_model, monkeypatch, name, settings, length, window):
    # Short sequences take the factored route too.
    monkeypatch.setattr("alibi_lm.attention.sdpa.SHORT", 0)
    monkeypatch.setattr("alibi_lm.attention.sdpa.MASK_ELEMENTS", 700)
    tokens, targets = ids(2, length), ids(2, length)
    results = {}
    for attention in BACKENDS:
        model = tiny_model(name, attention, **settings)
        nats = model.nats(tokens, targets, window=window)
        nats.sum().backward()
        results[attention] = (nats, {n: p.grad for n, p in model.named_parameters()})
    for attention in BACKENDS[1:]:
        torch.testing.assert_close(results[attention][0], results["eager"][0], rtol=1e-5, atol=1e-5)
        for parameter, expected in results["eager"][1].items():
            actual = results[attention][1][parameter]
            if expected is None:
                assert actual is None, parameter
            else:
                torch.testing.assert_close(
                    actual, expected, rtol=1e-3, atol=2e-4, msg=lambda m, p=parameter: f"{p}: {m}"
                )


@variants_that_define("key_bias")
def test_key_bias_is_the_bias_up_to_a_constant_per_query(tiny_model, name, settings):
    scheme = tiny_model(name, **settings).positions[0]
    positions = torch.arange(3, 90)
    difference = scheme.key_bias(positions)[:, None].double() - scheme.bias(positions, positions).double()
    visible = torch.ones(87, 87, dtype=torch.bool).tril()
    for head in difference:
        for row, seen in zip(head, visible, strict=True):
            assert row[seen].max() - row[seen].min() < 1e-4


@variants_that_define("distance_bias")
def test_distance_bias_is_the_bias_and_constant_from_its_saturation_on(tiny_model, name, settings):
    scheme = tiny_model(name, **settings).positions[0]
    positions, row = torch.arange(3, 900), scheme.distance_bias(torch.arange(900))
    distance = (positions[:, None] - positions).clamp_min(0)
    assert torch.equal(row[:, distance], scheme.bias(positions, positions))
    if scheme.saturation is not None:
        assert (row[:, scheme.saturation :] == row[:, -1:]).all()


@each_variant
def test_four_times_the_trained_length(tiny_model, name, settings):
    model = tiny_model(name, "sdpa", train_length=32, **settings)
    tokens = ids(1, 128)
    if model.max_position is None:
        assert torch.isfinite(model(tokens)).all()
    else:
        with pytest.raises(ValueError, match=r"has 32 positions; got position 127\.\s+Use inference_length <= 32"):
            model(tokens)
        assert torch.isfinite(model(tokens[:, :32])).all()


def test_a_position_past_the_table_is_refused_with_a_cache_too(tiny_model):
    model = tiny_model("learned", train_length=32)
    cache = KeyValueCache()
    model(ids(1, 32), cache=cache)
    with pytest.raises(ValueError, match="got position 32"):
        model(ids(1, 1), cache=cache)


@each_variant
def test_every_parameter_gets_a_gradient(tiny_model, name, settings):
    model = tiny_model(name, "sdpa", **settings).train()
    model.nats(ids(4, 128), ids(4, 128)).sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, parameter_name


@each_variant
def test_weights_load_strictly_at_another_context_length(tiny_model, name, settings):
    short, long = tiny_model(name, **settings), tiny_model(name, context_length=512, **settings)
    with torch.no_grad():
        for parameter in short.parameters():
            parameter.add_(0.01)
    long.load_state_dict(short.state_dict(), strict=True)


@each_variant
def test_one_window_sees_what_a_longer_window_sees(tiny_model, name, settings):
    """A causal model at position p <= L of a longer window sees what it sees in a length-L window."""
    model = tiny_model(name, train_length=96, **settings)
    tokens, targets = ids(1, 96), ids(1, 96)
    whole = model.nats(tokens, targets)
    start = model.nats(tokens[:, :32], targets[:, :32])
    torch.testing.assert_close(whole[:, :32], start, rtol=1e-5, atol=1e-5)


@variants_that_define("distance_bias")
def test_bias_keeps_its_precision_in_a_half_precision_model(tiny_model, name, settings):
    reference = tiny_model(name, **settings).double().positions[0]
    scheme = tiny_model(name, **settings).bfloat16().positions[0]
    if any(True for _ in scheme.parameters()):
        # Parameters are rounded by the cast itself; the arithmetic on them must not be.
        reference.load_state_dict(scheme.state_dict())
    q_pos, k_pos = torch.tensor([0, 1, 700, 5801, 8191]), torch.arange(0, 8192, 7)
    bias = scheme.bias(q_pos, k_pos)
    assert bias.dtype == torch.float32
    torch.testing.assert_close(bias.double(), reference.bias(q_pos, k_pos).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ALL)
def test_docstring_says_source_and_behaviour_past_the_trained_length(name):
    import importlib

    module = importlib.import_module(POSITIONS[name].__module__)
    assert "arXiv" in module.__doc__
    if name != "none":
        assert "Past the trained length:" in module.__doc__ and "Source:" in module.__doc__


@pytest.mark.parametrize("name", ALL)
def test_config_name_is_its_registry_key(name):
    config = POSITIONS[name]()
    assert config.name == name
    scheme = config.build(PositionShape(24, 8, 3, 2, 64, 64))
    assert scheme.max_position in (None, 64)
