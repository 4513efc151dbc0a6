"""The bound on distant keys: proved for every input, not vacuous, and wrong as soon as its formula is changed."""

from __future__ import annotations

import math

import pytest
import torch

from alibi_lm.model import bound
from alibi_lm.model.bound import BiasTail, bounds_from_weights, excess_from_weights
from alibi_lm.model.streaming import open_cache
from alibi_lm.positions.alibi import alibi_slopes

HEADS, HEAD_DIM, DIM = 4, 6, 20


def layer(seed: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """Weights of the queries and keys of a layer, and of the norm in front of it, float64."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"w_q": (HEADS * HEAD_DIM, DIM), "w_k": (HEADS * HEAD_DIM, DIM), "b_q": (HEADS * HEAD_DIM,),
              "b_k": (HEADS * HEAD_DIM,), "gain": (DIM,), "shift": (DIM,)}  # fmt: skip
    return {n: scale * torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}


def heads(x: torch.Tensor, weights: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """Queries or keys of inputs (..., D) that a layer norm has seen: (..., H, K)."""
    x = torch.nn.functional.layer_norm(x, (DIM,), weights["gain"], weights["shift"], eps=0.0)
    return (x @ weights[f"w_{name}"].T + weights[f"b_{name}"]).unflatten(-1, (HEADS, HEAD_DIM))


def largest_excess(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """The largest score of a key over the query's own key that gradient ascent on the inputs finds: (H,)."""
    x = torch.randn(2, HEADS, 16, DIM, dtype=torch.float64).requires_grad_()  # query and key, of 16 starts

    def excess() -> torch.Tensor:
        own = torch.arange(HEADS)
        q, own_k, k = (heads(x[n], weights, name)[own, :, own] for n, name in ((0, "q"), (0, "k"), (1, "k")))
        return (q * (k - own_k)).sum(-1) * HEAD_DIM**-0.5

    optimizer = torch.optim.Adam([x], lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        (-excess().sum()).backward()
        optimizer.step()
    return excess().detach().amax(1)


def lost_share(scores: torch.Tensor, bias: torch.Tensor, window: int) -> torch.Tensor:
    """Share of the last query's attention at distances >= window: scores and bias (H, S) by distance -> (H,)."""
    return (scores + bias).softmax(-1)[:, window:].sum(-1)


@pytest.mark.parametrize("seed", range(4))
def test_no_input_exceeds_the_bound_and_some_come_near(seed):
    weights = layer(seed)
    bound_of = excess_from_weights(*(weights[n] for n in ("w_q", "w_k", "b_q", "gain", "shift")), HEADS)
    found = largest_excess(weights)
    assert (found <= bound_of).all()
    assert (found >= bound_of / 2).all()


@pytest.mark.parametrize("seed", range(3))
def test_adversarial_inputs_never_lose_more_than_the_stated_share(seed):
    """The worst query, and the worst key at all distances past the window, and the least scores within."""
    weights, slopes, eps = layer(seed, 0.5), torch.tensor(alibi_slopes(HEADS), dtype=torch.float64), 1e-3
    found = bounds_from_weights(*weights.values(), HEADS, slopes, lost_share=eps)
    excess = largest_excess(weights)
    for head in range(HEADS):
        window, length = int(found.windows[head]), int(found.windows[head]) + int(40 / slopes[head])
        scores = torch.zeros(1, length, dtype=torch.float64)
        scores[:, window:] = excess[head]
        distance = torch.arange(length)
        assert float(lost_share(scores, -slopes[head] * distance[None], window)) <= eps


@pytest.mark.parametrize("slope", [0.5, 0.25])
@pytest.mark.parametrize("eps", [1e-2, 1e-6])
def test_a_model_built_for_it_loses_a_fourth_of_the_bound_at_least(slope, eps):
    """Queries of the direction a hate keys of a and love those of -a: M = -c aa'."""
    direction = torch.randn(DIM, dtype=torch.float64)
    direction = (direction - direction.mean()) / (direction - direction.mean()).norm()
    w_q = torch.zeros(HEAD_DIM, DIM, dtype=torch.float64)
    w_q[0] = direction
    found = bounds_from_weights(w_q, -w_q, None, None, None, None, 1, torch.tensor([slope]), lost_share=eps)
    torch.testing.assert_close(found.excess, torch.tensor([2 * DIM * HEAD_DIM**-0.5], dtype=torch.float64))
    window, length = int(found.windows), int(found.windows) + 400
    z = math.sqrt(DIM) * direction.repeat(length, 1)
    z[window:] *= -1
    scores = ((z[:1] @ w_q.T) @ (z @ -w_q.T).T) * HEAD_DIM**-0.5
    lost = float(lost_share(scores, -slope * torch.arange(length)[None], window))
    # A window counts whole keys: at most e^slope is lost by rounding it up.
    assert eps * math.exp(-slope) / 4 <= lost <= eps


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
    weights = layer(0)
    w_k = weights["w_k"][: 2 * HEAD_DIM]
    repeated = w_k.view(2, 1, HEAD_DIM, DIM).expand(-1, 2, -1, -1).reshape(-1, DIM)
    rest = (weights["b_q"], weights["gain"], weights["shift"], HEADS)
    found, expected = (excess_from_weights(weights["w_q"], w, *rest) for w in (w_k, repeated))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("attention", ["eager", "auto"])
@pytest.mark.parametrize("policy", ["proved", "certified"])
def test_the_running_certificate_bounds_what_is_really_lost(tiny_model, policy, attention):
    """In a model of one layer, by the definition, in float64, for every head and query."""
    model, tokens = tiny_model("alibi", attention), torch.randint(50, (1, 900))
    del model.blocks[1:]
    with torch.no_grad():
        model.layers[0].attention.qkv.weight *= 0.5
    for share in (1e-1, 1e-4):
        cache = open_cache(model, policy, lost_share=share)
        with torch.inference_mode():
            for piece in tokens.split([400, 1, 1, 498], dim=1):
                model(piece, cache=cache)
            x = model.layers[0].attention_norm(model.vocabulary.embed(tokens) * math.sqrt(24))
            q, k, _ = model.layers[0].attention.qkv(x)[0].double().unflatten(-1, (3, 3, -1)).permute(1, 2, 0, 3)
        distance = torch.arange(900)[:, None] - torch.arange(900)
        scores = q @ k.mT * 8**-0.5 - model.schemes[0].slopes.double()[:, None, None] * distance
        weights = scores.masked_fill(distance < 0, -math.inf).softmax(-1)
        lost = (weights * (distance >= cache.windows[0][:, None, None])).sum(-1).max()
        assert 0 < float(lost) <= cache.lost_share <= share * 1.01
