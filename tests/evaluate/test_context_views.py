"""What models make of their context, on models whose answer is known."""

import numpy as np
import pytest
import torch
from toy_models import Toy

from alibi_lm.evaluate import context_views, views
from alibi_lm.evaluate.passes import Passes
from alibi_lm.evaluate.store import TokenStore
from alibi_lm.model.training_positions import RandomisedConfig
from alibi_lm.model.transformer import TransformerLM
from alibi_lm.positions import POSITIONS
from alibi_lm.positions.alibi import alibi_slopes
from alibi_lm.tasks.text import TextTask


class Copier(Toy):
    """Knows a token for sure where the pair of tokens before it has been seen within `reach`; else it guesses."""

    train_length, max_length, label = 16, 48, "copier_L16_s1"

    def nats(self, inputs, targets, positions, window):
        nats = torch.full(targets.shape, 2.0)
        for row, (before, after) in enumerate(zip(inputs.tolist(), targets.tolist(), strict=True)):
            for t in range(2, len(before)):
                seen = [s for s in range(1, t) if before[s - 1 : s + 1] == before[t - 1 : t + 1]]
                if any(t - s <= self.reach and before[s + 1] == after[t] for s in seen):
                    nats[row, t] = 0.5
        return nats


@pytest.fixture
def text():
    draws = np.random.default_rng(0).integers(1, 500, 900)
    return TextTask(draws, 0, documents=np.array([0, 200, 480, 700]), corpus="toy")


def test_a_second_reading_gains_up_to_the_reach_of_the_model(text):
    group = views.Group("toy", 16, [Passes(Copier(reach=20), text)])
    points = context_views.repeat(group, [48], [6, 8, 20, 21, 40, 44], 8, 3)
    gains = {point["distance"]: point["nats"] for point in points}
    # The first two tokens of a segment have no pair before them that was seen.
    assert gains[8] == gains[20] == pytest.approx(1.5 * 6 / 8) and gains[21] == gains[40] == 0
    assert gains[6] is None and "lie 8 apart or more" in points[0]["reason"]
    assert gains[44] is None and "48 positions" in points[-1]["reason"]
    assert points[1]["low"] <= points[1]["nats"] <= points[1]["high"] and points[1]["targets"] % 8 == 0
    with pytest.raises(ValueError, match="width = 400 at a distance of 600"):
        context_views.repeat(group, [48], [600], 400, 1)


def test_segments_at_other_places_are_passes_of_their_own(text, tmp_path):
    def points(every, store):
        passes = Passes(Copier(reach=20, identity="copier"), text, store)
        return context_views.repeat(views.Group("toy", 16, [passes]), [48], [20], 8, every)

    store = TokenStore(tmp_path)
    assert points(3, store) != points(4, store) == points(4, None)


def test_the_effective_context_is_the_least_that_is_as_good_as_the_best(text):
    class Counts(Copier):
        def nats(self, inputs, targets, positions, window):
            return (1 + 1 / torch.arange(1, inputs.shape[1] + 1)).expand(targets.shape)

    group = views.Group("toy", 16, [Passes(Counts(), text)])
    points = context_views.effective_context(group, [64], [1, 8, 16, 24, 32, 40, 64], 7)
    assert points[0]["numbers"] == {"effective": {"copier_L16_s1": 32}, "receptive_field": {"copier_L16_s1": None}}
    assert {point["effective"] for point in points} == {32}, "1 + 1/32 is within 1% of 1 + 1/40, 1 + 1/24 is not"
    assert points[-1]["nats"] is None


def brute_force(model, vectors, length):
    """Weights of all heads, (layers, heads, T, T), and hidden states (B, T, D), from word vectors (B, T, D).

    By the model's own modules, one layer after another.
    """
    positions = torch.arange(length)
    x = vectors * model.config.model_dim**0.5
    x = model.schemes[0].add_to_embeddings(x, positions)
    found = []
    for block in model.layers:
        y = block.attention_norm(x)
        q, k, v = block.attention.qkv(y).unflatten(-1, (3, model.config.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = model.schemes[0].transform_qk(q, k, model.schemes[0].tables(positions))
        scores = q @ k.mT / q.shape[-1] ** 0.5
        bias = model.schemes[0].bias(positions, positions)
        scores = scores if bias is None else scores + bias
        weights = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf).softmax(-1)
        found.append(weights[0])
        x = x + block.attention.out((weights @ v).transpose(1, 2).flatten(2))
        x = x + block.ffn(block.ffn_norm(x))
    return torch.stack(found).double(), model.final_norm(x)


@pytest.mark.parametrize("position", ["alibi", "rotary", "none"])
def test_where_heads_look_is_what_the_weights_say(tiny_model, monkeypatch, position):
    monkeypatch.setattr(context_views, "SLICE", 5)
    model = tiny_model(position, attention="sdpa", train_length=8, vocab_size=500)
    text = TextTask(np.random.default_rng(1).integers(1, 500, 24), 0)
    backend = model.backend
    (point,) = context_views.attention(views.Group(position, 8, [Passes(model, text)]), [24], 1)
    assert model.backend is backend and point["windows"] == 1
    with torch.no_grad():
        vectors = model.vocabulary.embed(torch.tensor([[0, *text.tokens[:-1].tolist()]]))
        weights = brute_force(model, vectors, 24)[0][:, :, 12:]
    distance = (torch.arange(12, 24)[:, None] - torch.arange(24)).clamp_min(0)
    entropy = torch.special.entr(weights).sum(-1).mean(-1)
    for head in point["heads"]:
        own = weights[head["layer"], head["head"]]
        assert head["distance"] == pytest.approx(float((own * distance).sum(-1).mean()), rel=1e-5)
        assert head["first"] == pytest.approx(float(own[:, 0].mean()), rel=1e-5)
        assert head["entropy"] == pytest.approx(float(entropy[head["layer"], head["head"]]), rel=1e-5)
        for near, far, value in zip(point["nearest"], point["farthest"], head["weights"], strict=True):
            means = []
            for d in range(near, far + 1):
                having = [own[t - 12, t - d] for t in range(12, 24) if t - d >= 0]
                means.append(float(torch.stack(having).mean()))
            assert value == pytest.approx(np.mean(means), rel=2e-3)
    assert point["sink_rate"] == np.mean([head["first"] > 0.3 for head in point["heads"]])
    numbers = {name: by_run[model.label] for name, by_run in point["numbers"].items()}
    assert numbers["distance"] == pytest.approx(np.mean([head["distance"] for head in point["heads"]]))
    assert numbers["near"] == pytest.approx(float(weights[..., torch.arange(12), torch.arange(12, 24)].mean()))
    assert numbers["beyond"] == pytest.approx(float((weights * (distance >= 8)).sum(-1).mean()), rel=1e-5)
    falls = np.diff([head["weights"] for head in point["heads"]], axis=1) < 0
    assert numbers["falling"] == pytest.approx(falls.mean()) and numbers["sink_rate"] == point["sink_rate"]
    assert [point["nearest"][0], point["farthest"][-1]] == [0, 23]
    alone = point["bias_alone"]
    if position != "alibi":  # every key has the same weight
        assert alone["distance"] == pytest.approx(np.mean(np.arange(12, 24)) / 2)
        assert alone["near"] == pytest.approx(np.mean(1 / np.arange(13.0, 25)))
    else:
        slopes = np.array(alibi_slopes(weights.shape[1]))[:, None]
        means = []
        for t in range(12, 24):
            own = np.exp(-slopes * np.arange(t + 1))
            means.append((own / own.sum(1, keepdims=True) * np.arange(t + 1)).sum(1))
        assert alone["distance"] == pytest.approx(np.mean(means), rel=1e-5) and alone["falling"] == 1
        assert alone["distance"] != pytest.approx(numbers["distance"], rel=1e-3)


def test_sinks_are_counted_over_the_heads_of_all_seeds(tiny_model, monkeypatch):
    text = TextTask(np.random.default_rng(1).integers(1, 50, 24), 0)
    models = []
    for number in range(2):
        models.append(tiny_model("none", attention="sdpa", train_length=8))
        models[-1].label = f"none_L8_s{number}"
        torch.manual_seed(number)
        for parameter in models[-1].parameters():
            parameter.data += torch.randn_like(parameter) * 0.3

    def point(*chosen):
        return context_views.attention(views.Group("none", 8, [Passes(m, text) for m in chosen]), [24], 1)[0]

    firsts = [[head["first"] for head in point(model)["heads"]] for model in models]
    monkeypatch.setattr(context_views, "SINK", np.sort(firsts[0])[-2:].mean())
    rates = [np.mean(np.array(own) > context_views.SINK) for own in firsts]
    assert rates[0] > 0 and rates[0] != rates[1]
    both = point(*models)
    assert both["sink_rate"] == pytest.approx(np.mean(rates))
    assert list(both["numbers"]["sink_rate"].values()) == pytest.approx(rates)


def test_drawn_positions_leave_distances_in_tokens(tiny_model, tiny_config):
    """Without a scheme positions change no weight, so neither may they change where heads look."""
    model = tiny_model("none", attention="sdpa", train_length=8, vocab_size=500)
    drawn = TransformerLM(
        tiny_config, POSITIONS["none"](), "sdpa", 500, 8, training_positions=RandomisedConfig(num_positions=900)
    )
    drawn.load_state_dict(model.state_dict())
    text = TextTask(np.random.default_rng(1).integers(1, 500, 24), 0)
    plain, other = (
        context_views.attention(views.Group("none", 8, [Passes(one, text)]), [8, 24], 1)
        for one in (model, drawn.eval())
    )
    assert other == plain


def test_a_scheme_without_such_positions_is_told(tiny_model, text):
    model = tiny_model("learned", train_length=8, vocab_size=500)
    (point,) = context_views.attention(views.Group("learned", 8, [Passes(model, text)]), [24], 1)
    assert point["nats"] is None and "8 positions" in point["reason"]
    with pytest.raises(ValueError, match="does not show its attention weights"):
        context_views.attention(views.Group("toy", 16, [Passes(Copier(reach=1), text)]), [16], 1)


@pytest.mark.parametrize("position", ["alibi", "none"])
def test_the_receptive_field_holds_99_percent_of_the_gradient(tiny_model, position, monkeypatch):
    model = tiny_model(position, attention="sdpa", train_length=8, vocab_size=500)
    text, targets = TextTask(np.random.default_rng(1).integers(1, 500, 60), 0), np.array([23, 40, 59])
    norms = torch.zeros(24)
    for target in targets:
        ids = torch.tensor([[0, *text.tokens.tolist()][target - 23 : target + 1]])
        leaf = model.vocabulary.embed(ids).detach().requires_grad_()
        logits = brute_force(model, leaf, 24)[1][0, -1] @ model.vocabulary.output_table.T
        (-logits.log_softmax(-1)[int(text.tokens[target])]).backward()
        norms += leaf.grad[0].norm(dim=-1)
    shares = [float(norms[24 - n :].sum() / norms.sum()) for n in range(1, 25)]
    for field in (0.3, 0.6, 0.9, 0.99):
        monkeypatch.setattr(context_views, "FIELD", field)
        wanted = next(n for n, share in enumerate(shares, start=1) if share >= field)
        found = context_views.receptive_field(Passes(model, text, tokens_per_forward=48), 24, targets)
        assert found == wanted and (field > 0.6 or wanted < 24)
    assert "embed" not in vars(model.vocabulary)
