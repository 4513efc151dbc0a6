"""The bound on distant keys: proved for every input, not vacuous, and wrong as soon as its formula is changed."""

from __future__ import annotations

import math

import pytest
import torch

from alibi_lm.model import bound
from alibi_lm.model.bound import BiasTail, bounds_from_weights
from alibi_lm.model.streaming import bias_tails, open_cache, weight_excess, weight_windows
from alibi_lm.model.transformer import ModelConfig, TransformerLM
from alibi_lm.positions import POSITIONS
from alibi_lm.positions.alibi import alibi_slopes

HEADS, HEAD_DIM, DIM = 4, 6, 24
SLOPES = torch.tensor(alibi_slopes(HEADS, last_exponent=2), dtype=torch.float64)
"""From 0.71 to 0.25."""


def one_layer(position: str = "alibi") -> TransformerLM:
    config = ModelConfig(num_layers=1, model_dim=DIM, num_heads=HEADS, ffn_dim=DIM)
    settings = {"last_exponent": 2.0} if position == "alibi" else {}
    model = TransformerLM(config, POSITIONS[position](**settings), "eager", 50, 16)
    with torch.no_grad():
        for parameter in model.schemes[0].parameters():  # -0.8 d^0.8, where a draw may fall too slowly
            parameter.fill_(0.8)
    return model


def trained(position: str) -> TransformerLM:
    """After some steps on a text in which each token says the next but one."""
    model = one_layer(position)
    tokens = torch.randint(50, (8, 17))
    for column in range(2, 17):
        tokens[:, column] = (7 * tokens[:, column - 2] + 3) % 50
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(40):
        optimizer.zero_grad()
        model.nats(tokens[:, :-1], tokens[:, 1:]).mean().backward()
        optimizer.step()
    return model


def random(position: str) -> TransformerLM:
    """Weights, gains, shifts and biases all drawn."""
    model = one_layer(position)
    with torch.no_grad():
        for parameter in model.layers[0].parameters():
            parameter.normal_(std=0.25)
    return model


def scores_of(model: TransformerLM, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Scores before the bias, by the layer's own norm and projections: residual streams x, y (H, ..., D) of the
    queries and keys -> (H, ...)."""
    block = model.layers[0]
    q, k = (
        block.attention.qkv(block.attention_norm(z)).unflatten(-1, (3, HEADS, HEAD_DIM))[..., part, :, :]
        for part, z in enumerate((x, y))
    )
    own = torch.arange(HEADS)
    return (q[own, ..., own, :] * k[own, ..., own, :]).sum(-1) * HEAD_DIM**-0.5


def lost_share(model: TransformerLM, x: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
    """Share of the attention of the query that lies past the windows, in a real sequence.

    x (3, H, D): residual streams of the query, of all other keys in the window, and of all keys past it.
    """
    length = int(windows.max()) + 200
    distance = torch.arange(length)
    past = (distance >= windows[:, None]).long()
    kind = torch.where(distance == 0, 0, 1 + past)
    keys = x[kind, torch.arange(HEADS)[:, None]]  # (H, length, D)
    bias = model.schemes[0].distance_bias(distance).double()
    weights = (scores_of(model, x[0][:, None].expand_as(keys), keys) + bias).softmax(-1)
    return (weights * past).sum(-1)


def adversary(model: TransformerLM, windows: torch.Tensor) -> torch.Tensor:
    """Residual streams (3, H, D) of `lost_share` that gradient ascent finds: the best of 4 starts."""
    tail = BiasTail(model.schemes[0].distance_bias)
    near, far = tail.at(torch.ones(HEADS, 1).long()), tail.at(windows[:, None])
    x = torch.randn(3, HEADS, 4, DIM, dtype=torch.float64).requires_grad_()

    def log_odds() -> torch.Tensor:
        own, others, past = (scores_of(model, x[0], x[n]) for n in range(3))
        return past + far - torch.logaddexp(own, others + near)

    optimizer = torch.optim.Adam([x], lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        (-log_odds().sum()).backward()
        optimizer.step()
    best = log_odds().argmax(1)
    return 1e3 * x.detach()[:, torch.arange(HEADS), best]  # so large that the norm's epsilon is nothing beside it


@pytest.mark.parametrize("position", ["alibi", "kerple_power"])
@pytest.mark.parametrize("weights", [random, trained])
def test_no_input_loses_more_than_the_bound_says(weights, position):
    """And half of the window would lose more: the bound is not far from what an adversary reaches."""
    model = weights(position).double()
    eps = 1e-3
    windows = weight_windows(model, eps)[0]
    x = adversary(model, windows)
    lost, lost_of_half = lost_share(model, x, windows), lost_share(model, x, windows // 2)
    assert (lost <= eps).all()
    assert (lost_of_half > eps).all()


def built_for_it() -> tuple[TransformerLM, torch.Tensor]:
    """A model whose heads reach the bound, and the residual streams that do so: (3, H, D) as in `lost_share`.

    a and b are directions of the normalised input, u and v of a head; the best input is sqrt(D) times a direction.

        heads 0, 2   q = u (a.z) + c u, k = -u (a.z): hate their own key and love those of -a
        head 1       q = c u,           k = -u (a.z): nothing but the constant of the query
        head 3       q = u (a.z) - v (b.z), k = u (b.z) + v (a.z): the own score is 0, those of -b less, of b more
    """
    model = one_layer().double()
    block = model.layers[0]
    a, b = torch.linalg.qr(torch.cat([torch.ones(DIM, 1), torch.randn(DIM, 2)], 1).double())[0].T[1:]
    gain, shift = 0.5 + torch.rand(DIM).double(), torch.randn(DIM).double()
    w_q, w_k = torch.zeros(2, HEADS, HEAD_DIM, DIM, dtype=torch.float64)
    b_q = torch.zeros(HEADS, HEAD_DIM, dtype=torch.float64)
    w_q[[0, 2, 3], 0], w_k[:3, 0], b_q[:3, 0] = a, -a, 2.0
    w_q[3, 1], w_k[3, 0], w_k[3, 1] = -b, b, a
    w_q, w_k = (0.5 * w / gain for w in (w_q, w_k))
    # What the norm's mean takes out, and what its shift adds, must not count.
    w_q, w_k = w_q + 3 / gain, w_k - 2 / gain
    with torch.no_grad():
        block.attention_norm.weight.copy_(gain)
        block.attention_norm.bias.copy_(shift)
        block.attention.qkv.weight[: 2 * DIM] = torch.cat([w_q.flatten(0, 1), w_k.flatten(0, 1)])
        block.attention.qkv.bias[: 2 * DIM] = torch.cat([(b_q - w_q @ shift).flatten(), torch.randn(DIM).double()])
    return model, 1e3 * torch.stack([a.expand(4, -1), torch.stack([a, a, a, -b]), torch.stack([-a, -a, -a, b])])


@pytest.mark.parametrize("eps", [1e-2, 1e-6])
def test_a_model_built_for_it_loses_a_fourth_of_the_bound_at_least(eps):
    model, x = built_for_it()
    (excess,), (windows,) = weight_excess(model), weight_windows(model, eps)
    allowed = (excess - SLOPES * windows).exp() / -torch.expm1(-SLOPES)  # a window is a whole number of keys
    lost = lost_share(model, x, windows)
    assert (allowed <= eps).all()
    assert (lost <= allowed * (1 + 1e-6)).all() and (lost >= allowed / 4).all()


def test_the_window_of_alibi_is_its_formula():
    slopes, excess = torch.tensor(alibi_slopes(8), dtype=torch.float64), torch.linspace(0, 60, 8).double()
    for eps in (0.1, 2.0**-25):
        expected = (excess - math.log(eps) - torch.log(-torch.expm1(-slopes))) / slopes
        found = BiasTail(slopes).windows(excess, eps)
        assert torch.equal(found, expected.ceil().long().clamp_min(1))


def test_a_function_of_the_distance_serves_as_well_as_slopes():
    slopes = torch.tensor([0.5, 0.01])
    a, b = BiasTail(slopes), BiasTail(lambda d: -slopes.view(-1, *[1] * d.dim()) * d)
    excess = torch.tensor([3.0, 30.0])
    assert torch.equal(a.windows(excess, 1e-6), b.windows(excess, 1e-6))


def test_a_power_law_is_served_past_the_dense_part():
    """-r d^0.5 needs long windows, whose sum is bounded by blocks: never shorter than the true one."""
    tail = BiasTail(lambda d: -0.05 * d.double()[None] ** 0.5)
    window = int(tail.windows(torch.tensor([1.0]), 1e-3))
    assert window > bound.DENSE

    def log_sum(w: int) -> float:  # the integral from w - 1 on is above the sum from w on
        a, root = 0.05, math.sqrt(w - 1)
        return math.log(2 / a * (root + 1 / a)) - a * root

    assert 1.0 + log_sum(window) <= math.log(1e-3) + 1e-3
    assert 1.0 + log_sum(int(window * 0.95)) > math.log(1e-3)


@pytest.mark.parametrize(
    "bias, words",
    [
        (lambda d: -torch.log1p(d.double())[None], "falls too slowly"),  # the harmonic sum
        (lambda d: -0.5 * torch.log1p(d.double())[None], "falls too slowly"),
        (lambda d: torch.zeros(1, *d.shape), "falls too slowly"),
        (lambda d: d.double()[None].sin(), "grows with the distance"),
        (lambda d: None, "no bias"),
    ],
)
def test_a_bias_without_a_convergent_tail_is_refused(bias, words):
    with pytest.raises(ValueError, match=words):
        BiasTail(bias).windows(torch.tensor([1.0]), 1e-3)


def test_groups_of_query_heads_may_share_keys():
    w_q, w_k, rest = torch.randn(HEADS * HEAD_DIM, DIM), torch.randn(2 * HEAD_DIM, DIM), torch.randn(3, DIM)
    repeated = w_k.view(2, 1, HEAD_DIM, DIM).expand(-1, 2, -1, -1).reshape(-1, DIM)
    b_q, gain, shift = rest
    found, expected = (bounds_from_weights(w_q, w, b_q, None, gain, shift, HEADS, SLOPES) for w in (w_k, repeated))
    torch.testing.assert_close(found.excess, expected.excess)
    assert torch.equal(found.windows, expected.windows) and found.windows.min() > 1


@pytest.mark.parametrize(
    ("policy", "attention"), [("proved", "auto"), ("certified", "eager"), ("certified", "auto")]
)
def test_the_running_certificate_bounds_what_is_really_lost(tiny_model, policy, attention):
    """In a model of one layer, by the definition, in float64, for every head and query."""
    model, tokens = tiny_model("alibi", attention), torch.randint(50, (1, 600))
    del model.blocks[1:]
    with torch.no_grad():
        model.layers[0].attention.qkv.weight *= 0.5
    for share in (1e-1, 1e-4):
        cache = open_cache(model, policy, lost_share=share)
        with torch.inference_mode():
            for piece in tokens.split([300, 1, 1, 298], dim=1):
                model(piece, cache=cache)
            x = model.layers[0].attention_norm(model.vocabulary.embed(tokens) * math.sqrt(24))
            q, k, _ = model.layers[0].attention.qkv(x)[0].double().unflatten(-1, (3, 3, -1)).permute(1, 2, 0, 3)
        distance = torch.arange(600)[:, None] - torch.arange(600)
        scores = q @ k.mT * 8**-0.5 - model.schemes[0].slopes.double()[:, None, None] * distance
        weights = scores.masked_fill(distance < 0, -math.inf).softmax(-1)
        lost = (weights * (distance >= cache.windows[0][:, None, None])).sum(-1).max()
        assert 0 < float(lost) <= cache.lost_share <= share * 1.01


def test_the_bias_is_asked_for_on_the_device_of_its_parameters(monkeypatch):
    model, devices = one_layer(), []

    def bias(distance):
        devices.append(distance.device.type)
        return -torch.ones(HEADS, 1) * torch.arange(distance.numel())

    monkeypatch.setattr(model.schemes[0], "distance_bias", bias)
    bias_tails(model)
    bias_tails(model.to("meta"))
    assert devices == ["cpu", "meta"]
