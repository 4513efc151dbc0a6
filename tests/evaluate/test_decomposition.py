"""The interventions tell the truth about models whose behaviour is known, and about real ones."""

import numpy as np
import pytest
import torch
from toy_models import Toy

from alibi_lm.data.windows import positions_in_window
from alibi_lm.evaluate.passes import Passes
from alibi_lm.evaluate.views import TERMS, Group, decomposition, fixed, losses, offset
from alibi_lm.tasks.text import TextTask

L = 16
DOCUMENTS = np.array([0, 90, 200, 310])


class Known(Toy):
    """A model whose nats are a rule of what it sees.

    `rule(seen, position)` gives the nats of a target from how many tokens its query sees and the query's
    absolute position. `memory` makes the nats depend on the last tokens themselves as well: a hash of the last
    `memory` visible inputs is added, so that a pass with other inputs cannot be mistaken for the same.
    """

    train_length, label = L, "known"

    def __init__(self, rule, memory=0, label="known"):
        super().__init__(rule=rule, memory=memory, label=label)

    def nats(self, inputs, targets, positions, window):
        length = inputs.shape[1]
        positions = torch.arange(length) if positions is None else positions
        seen = (torch.arange(length) + 1).clamp(max=window or length)
        nats = self.rule(seen.double(), positions.double()).expand(inputs.shape).clone()
        for back in range(self.memory):
            visible = (seen > back) & (torch.arange(length) >= back)
            shifted = torch.roll(inputs, back, dims=1).double()
            nats += torch.where(visible, torch.sin(shifted * (back + 1.7)), 0.0)
        return (nats + 0.1 * targets % 1).float()


@pytest.fixture
def tokens():
    return np.random.default_rng(0).integers(0, 50, 400).astype(np.uint16)


def passes_of(model, tokens, position=""):
    return Passes(model, TextTask(tokens, 7, documents=DOCUMENTS), scheme=position)


def group(models, tokens, position="alibi", train_length=L):
    return Group(position, train_length, [passes_of(model, tokens, position) for model in models])


def terms_of(model, tokens, length=48, stride=1):
    (point,) = decomposition(group([model], tokens), [length], stride)
    assert point["largest_early_difference"] < 1e-5
    means = {name: point[name]["nats"] for name in (*TERMS, "total")}
    assert sum(means[name] for name in TERMS) == pytest.approx(means["total"], abs=1e-12)
    return means


def counts(length, num_tokens=400):
    """Positions, counted from 1, of all targets of nonoverlapping windows."""
    return positions_in_window(num_tokens, length)


@pytest.mark.parametrize("stride", [1, 4])
@pytest.mark.parametrize("length", [32, 48, 57])
def test_a_model_that_uses_exactly_w_tokens_has_early_tokens_only(tokens, length, stride):
    w = 10

    def rule(seen, position):
        return 5 - seen.clamp(max=w) / 4

    means = terms_of(Known(rule, memory=w), tokens, length, stride)
    plain = terms_of(Known(rule), tokens, length, stride)
    expected = (rule(torch.tensor(counts(length)), 0) - rule(torch.tensor(counts(L)), 0)).mean()
    assert plain["early_tokens"] == pytest.approx(float(expected), abs=1e-6)
    assert plain["early_tokens"] < -0.1
    for found in (means, plain):
        assert found["positions_beyond"] == pytest.approx(0, abs=1e-6)
        assert found["keys_beyond"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("used", "broken", "harm"), [(0, 0, 0), (0, 0.5, 0), (0, 0, 0.25), (0, 0, -0.25), (6, 0.5, -0.125)]
)
def test_each_part_measures_its_own_cause(tokens, used, broken, harm):
    def rule(seen, position):
        return 4 - seen.clamp(max=used) / 8 + broken * (position >= L) + harm * (seen > L)

    means, share = terms_of(Known(rule), tokens), (counts(48) > L).mean()
    early = (-np.minimum(counts(48), used) / 8).mean() - (-np.minimum(counts(L), used) / 8).mean()
    expected = {"early_tokens": early, "positions_beyond": broken * share, "keys_beyond": harm * share}
    assert means == pytest.approx(expected | {"total": sum(expected.values())}, abs=1e-6)
    # What a model makes of its last three tokens is early tokens, and nothing else is.
    means = terms_of(Known(rule, memory=3), tokens)
    assert means["positions_beyond"] == pytest.approx(broken * share, abs=1e-6)
    assert means["keys_beyond"] == pytest.approx(harm * share, abs=1e-6)


def test_a_stride_moves_an_amount_from_the_second_part_to_the_first_only(tokens):
    model = Known(lambda seen, position: 4 - seen.clamp(max=L) / 8)
    exact, strided = terms_of(model, tokens, 64), terms_of(model, tokens, 64, stride=5)
    # Beyond L a target has L - stride + 1 to L tokens, each as often as its place in the stride.
    beyond = np.flatnonzero(counts(64) > L)
    missing = (4 - beyond % 5).sum() / len(tokens) / 8
    assert strided["early_tokens"] - exact["early_tokens"] == pytest.approx(missing, abs=1e-6)
    assert strided["positions_beyond"] - exact["positions_beyond"] == pytest.approx(-missing, abs=1e-6)
    assert strided["keys_beyond"] == pytest.approx(exact["keys_beyond"], abs=1e-9)
    assert strided["total"] == pytest.approx(exact["total"], abs=1e-9)


@pytest.mark.parametrize(("length", "stride"), [(40, 1), (48, 5), (48, 16), (399, 3), (500, 1)])
def test_reset_is_one_pass_over_the_last_tokens_of_each_window(tiny_model, tokens, length, stride):
    model = tiny_model("sinusoidal", "sdpa")
    reset = passes_of(model, tokens).reset(length, L, stride)
    inputs = [7, *tokens.tolist()]
    for t in [0, 3, 15, 16, 39, 40, 41, 60, 95, 96, 200, 398, 399]:
        begin = t // length * length
        # The window of a strided target ends with its stride; the input is what comes before.
        first = begin if t - begin < L else max(0, t // stride * stride - (L - stride))
        with torch.no_grad():
            nats = model.nats(
                torch.tensor([inputs[first : t + 1]]), torch.tensor([tokens[first : t + 1].tolist()])
            )
        assert t - first + 1 <= min(L, t - begin + 1)
        assert reset[t] == pytest.approx(nats[0, -1].item(), abs=2e-5), t


@pytest.mark.parametrize("position", ["alibi", "fox", "learned", "rotary", "sinusoidal", "wall"])
def test_the_full_window_and_both_interventions_coincide_up_to_l(tiny_model, tokens, position):
    model = tiny_model(position, "auto", train_length=64)
    passes = passes_of(model, tokens)
    _, reset, windowed, full = losses(passes, 40, L)
    # Up to L each also equals the loss in a window of length L that begins at the same token.
    starts = np.arange(0, 400, 40)
    alone = passes.shifted(L, starts, 0)
    for found in (reset, windowed, full):
        np.testing.assert_allclose(found[starts[:, None] + np.arange(L)], alone, atol=2e-5)


@pytest.mark.parametrize("position", ["alibi", "rotary", "t5", "none", "sinusoidal"])
def test_one_layer_has_positions_beyond_with_absolute_positions_only(tiny_model, tokens, position):
    """With one layer the last L keys are the last L embeddings, wherever the window began."""
    model = tiny_model(position, "sdpa", train_length=L)
    del model.blocks[1:]
    means = terms_of(model, tokens)
    if position == "sinusoidal":
        assert abs(means["positions_beyond"]) > 1e-4
        return
    assert means["positions_beyond"] == pytest.approx(0, abs=1e-6)
    # Untrained bias tables and steep slopes leave the far keys some weight; without positions it is most.
    assert abs(means["keys_beyond"]) > (1e-4 if position == "none" else 1e-9)


def test_points_of_the_decomposition_carry_intervals_and_seeds(tokens):
    rules = [lambda seen, position, a=a: a + a * (position >= L) for a in (1.0, 1.25)]
    models = [Known(rule, 2, f"run{k}") for k, rule in enumerate(rules)]
    (point,) = decomposition(group(models, tokens), [8, L, 48], stride=4)
    assert point["length"] == 48
    share = (counts(48) > L).mean()
    positions = point["positions_beyond"]
    assert positions["by_run"] == pytest.approx({"run0": share, "run1": 1.25 * share}, abs=1e-6)
    assert positions["nats"] == pytest.approx(1.125 * share, abs=1e-6)
    assert positions["low"] < positions["nats"] < positions["high"]
    assert sum(point[name]["nats"] for name in TERMS) == pytest.approx(point["total"]["nats"], abs=1e-12)


def test_a_scheme_without_such_positions_has_null_parts_and_a_reason(tiny_model, tokens):
    model = tiny_model("learned", train_length=L)
    (point,) = decomposition(group([model], tokens, "learned"), [32], stride=4)
    assert point["early_tokens"] is point["positions_beyond"] is point["keys_beyond"] is point["total"] is None
    assert point["reason"] == "position=learned has 16 positions"


@pytest.mark.parametrize("position", ["alibi", "fire", "learned", "rotary", "sinusoidal"])
def test_shifted_positions_change_nothing_for_relative_schemes_only(tiny_model, tokens, position):
    model = tiny_model(position, "auto", train_length=64)
    points = offset(group([model], tokens, position), [], [0, 1, 29, 56], width=8, every=2)
    assert points[0]["largest"] < 1e-6
    # FIRE counts absolute positions past its threshold of 512 alone.
    if model.positions[0].translation_invariant or position == "fire":
        assert all(p["largest"] < 2e-5 and abs(p["nats"]) < 1e-5 for p in points)
    else:
        assert all(p["largest"] > 1e-3 for p in points[1:])
    beyond = offset(group([model], tokens, position), [], [57], width=8, every=2)[0]
    if model.max_length is None:
        assert beyond["nats"] is not None
    else:
        assert beyond["nats"] is None and beyond["reason"] == "position=learned has 64 positions"


def test_the_offset_view_measures_the_dependence_on_absolute_position(tokens):
    model = Known(lambda seen, position: 1 + position / 8)
    points = offset(group([model], tokens), [], [0, 3, 16], width=8, every=3)
    assert [p["nats"] for p in points] == pytest.approx([0, 3 / 8, 2], abs=1e-6)
    assert points[0]["targets"] == len(range(0, 393, 24)) * 8


def test_fixed_contexts_score_the_same_targets_with_exactly_so_many_tokens(tiny_model, tokens):
    model = tiny_model("sinusoidal", "sdpa")
    points = fixed(group([model], tokens), [1, 5, 16, 40], every=7)
    inputs = [7, *tokens.tolist()]
    for point in points:
        c = point["context"]
        nats = [
            model.nats(
                torch.tensor([inputs[t - c + 1 : t + 1]]), torch.tensor([tokens[t - c + 1 : t + 1].tolist()])
            )[0, -1].item()
            for t in range(39, 400, 7)
        ]
        assert point["targets"] == 52
        assert point["nats"] == pytest.approx(np.mean(nats), abs=1e-5)
    assert points[2]["difference"]["nats"] == 0 and points[2]["difference"]["from"] == 16
    assert points[1]["difference"]["nats"] == pytest.approx(points[1]["nats"] - points[2]["nats"], abs=1e-9)
