"""What every registered scheme must satisfy; a new scheme is covered as soon as it is registered.

`pytest tests/positions -k <name>` runs the part of one scheme.
"""

import importlib

import pytest
import torch

from alibi_lm.attention import Backends
from alibi_lm.attention.native import why_not
from alibi_lm.attention.sdpa import SdpaAttention
from alibi_lm.evaluate.conformance_checks import InDouble
from alibi_lm.model.transformer import KeyValueCache
from alibi_lm.positions import POSITIONS, PositionScheme, PositionShape

ALL = sorted(POSITIONS)
VARIANTS = [(name, {}) for name in ALL] + [
    ("alibi", {"learned_slopes": True}),
    ("alibi", {"half_precision": True}),
    ("alibi", {"scaling": "linear", "factor": 3.0}),
    ("sinusoidal", {"variant": "vaswani"}),
    ("rotary", {"scaling": "yarn", "factor": 4.0}),
    ("rotary", {"rotated_share": 0.5, "frequency_share": 0.5}),
    ("cope", {"num_positions": 5, "scaled_term": False, "gate_keys": True}),
    ("bam", {"trained_centre": True, "start": "readme", "scale_inside": True}),
    ("kerple_power", {"weighted": True}),
    ("fox", {"gates": "bias", "scaled": False}),
    ("fox", {"gates": "fixed"}),
    ("shaw", {"clip": 5, "values": False}),
    ("path", {"forget_gate": True}),
    ("wall", {"scalar_gate": True}),
]
SHAPE = PositionShape(24, 8, 3, 2, 64, 64)
BACKENDS = ("eager", "sdpa", *([] if why_not() else ["native"]))
ROUNDING = 3e-5
"""Share of what shuffled tokens change in an output below which a difference is rounding."""


def scheme_of(name: str, settings: dict) -> PositionScheme:
    return POSITIONS[name](**settings).build(SHAPE)


def title(name: str, settings: dict) -> str:
    return "-".join([name, *map(str, settings.values())])


def variants(*hooks: str) -> pytest.MarkDecorator:
    """All variants, or those that override one of some hooks."""
    chosen = [
        pytest.param(name, settings, id=title(name, settings))
        for name, settings in VARIANTS
        if not hooks or scheme_of(name, settings).defines(*hooks)
    ]
    return pytest.mark.parametrize(("name", "settings"), chosen)


def variants_and_backends() -> pytest.MarkDecorator:
    """All variants with each backend that serves them."""
    chosen = [
        pytest.param(name, settings, backend, id=f"{title(name, settings)}-{backend}")
        for name, settings in VARIANTS
        for backend in BACKENDS
        if not Backends(backend, name).refuses_scheme(scheme_of(name, settings))
    ]
    return pytest.mark.parametrize(("name", "settings", "attention"), chosen)


@pytest.fixture
def trained(tiny_model):
    """Build a tiny model whose scheme's parameters have left their first values."""

    def build(name, attention="eager", settings=None, **options):
        model = tiny_model(name, attention, **options, **(settings or {}))
        with torch.no_grad():
            for scheme in model.schemes:
                for parameter in scheme.parameters():
                    parameter.add_(torch.randn(parameter.shape) * 0.3)
        return model

    return build


def ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, 50, (batch, length))


def dense(name: str, settings: dict) -> str:
    """sdpa, or eager for what sdpa cannot serve."""
    return "eager" if Backends("sdpa", name).refuses_scheme(scheme_of(name, settings)) else "sdpa"


def by_slices_and_columns(model) -> None:
    """Short sequences take the routes of long ones in sdpa."""
    model.backend.chain = [
        SdpaAttention(mask_elements=3000, short=0) if b.name == "sdpa" else b for b in model.backend.chain
    ]


def size_of_an_output(model, tokens: torch.Tensor, output: torch.Tensor, **options) -> float:
    """What another order of the tokens changes: the measure for all that ought to change something or nothing."""
    return float((output - model(tokens.flip(1), **options)).abs().max())


@variants()
def test_one_seed_gives_every_scheme_the_same_weights_elsewhere(tiny_model, name, settings):
    mine, plain = tiny_model(name, **settings).state_dict(), tiny_model("none").state_dict()
    shared = [key for key in mine if not key.startswith("positions.")]
    assert shared == [key for key in plain if not key.startswith("positions.")]
    assert all(torch.equal(mine[key], plain[key]) for key in shared)


@variants_and_backends()
@torch.no_grad()
def test_later_tokens_change_nothing_before_them(trained, name, settings, attention):
    model = trained(name, attention, settings)
    tokens = ids(2, 40)
    changed = tokens.clone()
    changed[:, 25:] = (changed[:, 25:] + 1) % 50
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :25], after[:, :25])
    assert not torch.allclose(before[:, 25:], after[:, 25:])


def test_cached_decoding_keeps_the_bias(tiny_model):
    """Equality alone would also hold where decoding drops the bias from both passes."""
    tokens, outputs = ids(1, 30), []
    for name in ("alibi", "none"):
        model, cache = tiny_model(name, "sdpa"), KeyValueCache()
        model(tokens[:, :29], cache=cache)
        outputs.append(model(tokens[:, 29:], cache=cache))
    assert not torch.allclose(*outputs, atol=1e-3)


@variants()
@torch.no_grad()
def test_later_tokens_change_no_more_than_rounding_in_a_long_sequence(trained, name, settings):
    """Long sequences take other routes; how they split their sums may depend on all tokens."""
    length, first = 300, 200
    model = trained(name, dense(name, settings), settings, train_length=length)
    for block in model.layers:
        block.attention.qkv.weight *= 2  # scores as large as in a trained model
    tokens = ids(1, length)
    changed = tokens.clone()
    changed[:, first:] = (changed[:, first:] + 1) % 50
    before, after = model(tokens), model(changed)
    rounding = ROUNDING * size_of_an_output(model, tokens, before)
    torch.testing.assert_close(before[:, :first], after[:, :first], rtol=0, atol=rounding)
    assert not torch.allclose(before[:, first:], after[:, first:], rtol=0, atol=100 * rounding)


@variants_and_backends()
def test_gradient_reaches_all_earlier_tokens_and_no_later_one(trained, name, settings, attention):
    model = trained(name, attention, settings)
    seen = {}
    model.vocabulary.embed = lambda tokens, embed=model.vocabulary.embed: seen.setdefault(
        "x", embed(tokens).detach().requires_grad_()
    )
    model(ids(1, 12))[0, 7].square().sum().backward()
    reached = seen["x"].grad[0].abs().amax(dim=1)
    assert (reached[:8] > 0).all()
    assert (reached[8:] == 0).all()


@variants_and_backends()
@torch.no_grad()
def test_decoding_in_pieces_equals_one_pass(trained, name, settings, attention):
    """Also where each piece begins some positions after the last one, and where old keys are out of sight."""
    model, tokens, pieces = trained(name, attention, settings, train_length=120), ids(2, 60), [1, 23, 1, 2, 33]
    by_slices_and_columns(model)
    for gap, window in ((0, None), (7, 20)):
        cache = KeyValueCache()
        positions = torch.arange(60) + gap * torch.arange(5).repeat_interleave(torch.tensor(pieces))
        decoded = [
            model(piece, positions=places if gap else None, cache=cache, window=window)
            for piece, places in zip(tokens.split(pieces, dim=1), positions.split(pieces), strict=True)
        ]
        whole = model(tokens, positions=positions, window=window)
        rounding = ROUNDING * size_of_an_output(model, tokens, whole, positions=positions, window=window)
        torch.testing.assert_close(torch.cat(decoded, dim=1), whole, rtol=0, atol=rounding)


@variants()
@torch.no_grad()
def test_shift_of_all_positions(trained, name, settings):
    """What an invariant scheme changes is rounding; what another one changes is ten times as much or more.

    Some schemes depend on absolute positions from some position on, so one of the shifts is far.
    """
    model, tokens, positions = trained(name, "eager", settings), ids(1, 60), torch.arange(60)
    shifts = [37] if model.max_length else [37, 5000]
    here = model(tokens, positions=positions)
    difference = max((model(tokens, positions=positions + s) - here).abs().max() for s in shifts)
    rounding = ROUNDING * size_of_an_output(model, tokens, here)
    if model.schemes[0].translation_invariant:
        hint = "where absolute positions count, say so: translation_invariant = False"
        assert difference < rounding, hint
    else:
        assert difference > 10 * rounding, "shifts change nothing: leave translation_invariant at True"


@variants()
@pytest.mark.parametrize(("length", "window", "step"), [(1, None, 1), (60, None, 1), (60, 5, 1), (60, 15, 10)])
def test_backends_agree_in_outputs_and_gradients(trained, name, settings, length, window, step):
    """Also where positions begin late or have gaps: a window is a distance, not a number of keys."""
    tokens, targets, results = ids(2, length), ids(2, length), {}
    positions = None if window is None else torch.arange(9, 9 + length * step, step)
    for attention in BACKENDS:
        if Backends(attention, name).refuses_scheme(scheme_of(name, settings)):
            continue
        torch.manual_seed(2)
        model = trained(name, attention, settings, train_length=600)
        by_slices_and_columns(model)
        nats = model.nats(tokens, targets, positions=positions, window=window)
        nats.sum().backward()
        results[attention] = (nats, {n: p.grad for n, p in model.named_parameters()})
    expected_nats, expected_grads = results.pop("eager")
    for nats, grads in results.values():
        torch.testing.assert_close(nats, expected_nats, rtol=1e-5, atol=3e-5)
        for parameter, expected in expected_grads.items():
            if expected is None:
                assert grads[parameter] is None, parameter
            else:
                error = (grads[parameter] - expected).abs().max()
                assert error <= 1e-3 * expected.abs().max() + 2e-4, parameter


@variants("key_bias")
def test_key_bias_is_the_bias_up_to_a_constant_per_query(name, settings):
    scheme, positions = scheme_of(name, settings), torch.arange(3, 90)
    difference = scheme.key_bias(positions)[:, None].double() - scheme.bias(positions, positions).double()
    hidden = torch.ones(87, 87, dtype=torch.bool).triu(1)
    largest, least = (difference.masked_fill(hidden, sign * torch.inf) for sign in (-1, 1))
    assert (largest.amax(-1) - least.amin(-1)).max() < 1e-4


@variants("distance_bias")
def test_distance_bias_is_the_bias(name, settings):
    scheme, positions = scheme_of(name, settings), torch.arange(3, 300)
    distance = (positions[:, None] - positions).clamp_min(0)
    by_distance = scheme.distance_bias(torch.arange(300))[:, distance]
    torch.testing.assert_close(by_distance, scheme.bias(positions, positions), rtol=1e-6, atol=0)


@variants("distance_bias", "bias", "score_mod")
@pytest.mark.parametrize("step", [1, 3])
def test_score_mod_is_the_bias(name, settings, step):
    scheme = scheme_of(name, settings)
    k_pos = torch.arange(33) * step
    q_pos = k_pos[20:]
    modify, bias = scheme.score_mod(q_pos, k_pos, 32 * step), scheme.bias(q_pos, k_pos)
    head, q, k = (torch.arange(n) for n in bias.shape)
    scores = modify(torch.zeros(()), torch.tensor(0), head[:, None, None], q[:, None], k)
    hidden = k_pos > q_pos[:, None]
    torch.testing.assert_close(scores.masked_fill(hidden, 0), bias.masked_fill(hidden, 0))


@variants()
def test_four_times_the_trained_length(trained, name, settings):
    model, tokens = trained(name, dense(name, settings), settings, train_length=32), ids(1, 128)
    if model.max_length is None:
        with torch.no_grad():
            assert torch.isfinite(model(tokens)).all()
    else:
        with pytest.raises(ValueError, match=r"has 32 positions; got position 127\.\s+Use inference_length <= 32"):
            model(tokens)
        assert torch.isfinite(model(tokens[:, :32])).all()


@variants_and_backends()
def test_every_parameter_gets_a_gradient(trained, name, settings, attention):
    """Not from the very start, where some are multiplied by others that are 0."""
    model = trained(name, attention, settings, train_length=64).train()
    model.nats(ids(2, 64), ids(2, 64)).sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, parameter_name


@variants()
def test_weights_load_strictly_at_another_context_length(trained, tiny_model, name, settings):
    short, long = trained(name, "eager", settings), tiny_model(name, context_length=512, **settings)
    long.load_state_dict(short.state_dict(), strict=True)


@variants("distance_bias", "bias")
def test_bias_keeps_its_precision_in_a_half_precision_model(name, settings):
    """Parameters are rounded by the cast itself; the arithmetic on them must not be.

    An `nn.Linear` computes in the dtype of its weights: use `functional.linear(x, weight.to(x.dtype), ...)`, in a
    hook that is decorated with `exact`.
    """
    scheme = scheme_of(name, settings).bfloat16()
    reference = scheme_of(name, settings)
    reference.load_state_dict(scheme.state_dict())
    reference = reference.double()
    q_pos, k_pos = torch.tensor([0, 1, 700, 5801, 8191]), torch.arange(0, 8192, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        bias = scheme.bias(q_pos, k_pos)
    with InDouble():
        expected = reference.bias(q_pos, k_pos)
    assert bias.dtype == torch.float32 and expected.dtype == torch.float64
    torch.testing.assert_close(bias.double(), expected, rtol=1e-6, atol=0)


@variants("content_bias", "content_key_bias", "scores")
@torch.no_grad()
def test_autocast_changes_no_bit_of_what_depends_on_content(name, settings):
    scheme, x, positions, results = scheme_of(name, settings), torch.randn(1, 20, 24), torch.arange(20), []
    q, k = torch.randn(2, 1, 3, 20, 8).bfloat16()
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            features = scheme.features(x) if scheme.cache_inputs else None
            arguments = (q, k, features, positions, positions)
            results.append([features, scheme.content_bias(*arguments), scheme.scores(*arguments)])
    for plain, cast in zip(*results, strict=True):
        assert (plain is cast is None) or (plain.dtype == cast.dtype == torch.float32 and torch.equal(plain, cast))


@variants("scores", "value_bias")
def test_what_is_more_than_a_bias_is_refused_by_name_and_served_by_auto(tiny_model, name, settings):
    message = f"attention=sdpa cannot run position={name} (it is more than a score bias). Use attention=eager."
    with pytest.raises(ValueError) as caught:
        tiny_model(name, "sdpa", **settings)
    assert str(caught.value) == message
    assert tiny_model(name, "auto", **settings).backend.name == "eager"


@variants("content_bias")
@pytest.mark.parametrize("attention", ["native", "flex"])
def test_a_content_bias_is_refused_by_name_where_it_cannot_be_served(tiny_model, name, settings, attention):
    if attention == "native" and why_not():
        pytest.skip(why_not())
    if dense(name, settings) == "eager":
        pytest.skip("refused for more than its bias")
    message = (
        f"attention={attention} cannot run position={name} (it needs the full score matrix). Use attention=eager."
    )
    with pytest.raises(ValueError) as caught:
        tiny_model(name, attention, **settings)
    assert str(caught.value) == message
    assert tiny_model(name, "auto", **settings).backend.name == "sdpa"


@pytest.mark.parametrize("name", ALL)
def test_docstring_says_source_and_behaviour_past_the_trained_length(name):
    module = importlib.import_module(POSITIONS[name].__module__)
    assert "arXiv" in module.__doc__
    if name != "none":
        assert "Past the trained length:" in module.__doc__ and "Source:" in module.__doc__


@pytest.mark.parametrize("name", ALL)
def test_config_name_is_its_registry_key(name):
    config = POSITIONS[name]()
    assert config.name == name
    assert config.build(SHAPE).max_position in (None, 64)


def test_a_constant_without_a_value_is_refused_with_the_remedy():
    class Forgetful(PositionScheme):
        def __init__(self, shape):
            super().__init__(shape)
            self.register_exact("rates", torch.ones(shape.num_heads))

    shape = PositionShape(24, 8, 3, 2, 64, 64)
    Forgetful(shape)
    with torch.device("meta"), pytest.raises(ValueError, match=r'Forgetful\.rates was made on device meta.*"cpu"'):
        Forgetful(shape)
