"""The model's doors: scores, losses, caches, positions and lengths; what is wrong is refused before any work."""

import copy
import pickle

import pytest
import torch

from alibi_lm.attention import ATTENTION
from alibi_lm.model.compiled import CompiledNats
from alibi_lm.model.layers import ModelConfig
from alibi_lm.model.transformer import KeyValueCache, TransformerLM
from alibi_lm.positions import POSITIONS


def ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, 50, (batch, length))


def test_scores_and_probabilities_are_those_of_the_next_token(tiny_model):
    model, inputs, targets = tiny_model("alibi"), ids(2, 7), ids(2, 7)
    logits = model(inputs)
    assert logits.shape == (2, 7, 50) and logits.dtype == torch.float32
    table = model.vocabulary.embedding
    torch.testing.assert_close(logits, model.hidden(inputs) @ table.T)
    expected = logits.double().log_softmax(-1).gather(2, targets[..., None])[..., 0]
    torch.testing.assert_close(model.log_prob(inputs, targets).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(-model.nats(inputs, targets), model.log_prob(inputs, targets), rtol=0, atol=0)
    torch.testing.assert_close(model(inputs, last=True), logits[:, -1:])
    torch.testing.assert_close(model.logits(inputs), logits, rtol=0, atol=0)


INPUTS, TARGETS = torch.arange(20).view(2, 10), torch.arange(20).view(2, 10)


@pytest.mark.parametrize(
    ("inputs", "targets", "message"),
    [
        (INPUTS, TARGETS[:1], r"target_ids of shape \(1, 10\) with input_ids of shape \(2, 10\)"),
        (INPUTS, TARGETS[:, :9], r"target_ids of shape \(2, 9\)"),
        (INPUTS, TARGETS[:1, :9], r"target_ids of shape \(1, 9\)"),
        (INPUTS[0], TARGETS[0], r"input_ids = a tensor of shape \(10,\), torch.int64\. Use a tensor \(B, T\)"),
        (INPUTS.float(), TARGETS, r"input_ids = .*torch.float32"),
        (INPUTS, TARGETS.int(), r"target_ids = .*torch.int32"),
        (INPUTS[:, :0], TARGETS[:, :0], r"at least one token"),
        (INPUTS.tolist(), TARGETS, r"input_ids = list"),
        (INPUTS + 40, TARGETS, r"input_ids holds 59, and the vocabulary has 50 words\. Use ids from 0 to 49"),
        (INPUTS, TARGETS - 1, r"target_ids holds -1"),
        (
            INPUTS.view(1, 20),
            TARGETS.view(1, 20),
            r"has 12 positions; got position 19\.\s+Use inference_length <= 12",
        ),
    ],
)
def test_what_is_no_batch_of_tokens_is_refused(tiny_model, inputs, targets, message):
    model = tiny_model("learned", train_length=12)
    for call in (model.log_prob, model.score):
        with pytest.raises(ValueError, match=message):
            call(inputs, targets)
    if "target" not in message:
        with pytest.raises(ValueError, match=message):
            model(inputs)


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([-1, 0, 1], r"positions = -1 \.\.\. 1\. Use whole numbers from 0 on, each above the one before"),
        ([0, 2, 1], "each above the one before"),
        ([0, 1, 1], "each above the one before"),
        ([2, 1, 0], "each above the one before"),
        ([0, 1], r"positions of shape \(2,\), torch.int64, with 3 tokens"),
        ([0.0, 1.0, 2.0], r"torch.float32, with 3 tokens"),
    ],
)
@pytest.mark.parametrize("name", ["learned", "alibi"])
def test_positions_out_of_order_are_refused(tiny_model, name, positions, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(name).hidden(ids(1, 3), positions=torch.tensor(positions))


def test_positions_that_a_cache_has_passed_are_refused(tiny_model):
    model, cache = tiny_model("alibi"), KeyValueCache()
    model(ids(1, 4), cache=cache)
    with pytest.raises(ValueError, match=r"Use whole numbers from 4 on.*the cache holds the positions before"):
        model(ids(1, 2), positions=torch.tensor([3, 4]), cache=cache)
    learned, cache = tiny_model("learned", train_length=32), KeyValueCache()
    learned(ids(1, 32), cache=cache)
    with pytest.raises(ValueError, match="got position 32"):
        learned(ids(1, 1), cache=cache)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("seen", [0, 5])
def test_a_pass_that_raises_leaves_the_cache_as_it_was(tiny_model, monkeypatch, layer, seen):
    model, tokens, cache = tiny_model("rotary"), ids(2, 9), KeyValueCache()
    if seen:
        model(tokens[:, :seen], cache=cache)
    with monkeypatch.context() as broken, pytest.raises(RuntimeError, match="no memory"):
        error = RuntimeError("no memory")
        broken.setattr(model.blocks[layer].ffn, "forward", lambda x: (_ for _ in ()).throw(error))
        model(ids(3 if not seen else 2, 4), cache=cache)
    assert cache.next_position == seen
    rest = model(tokens[:, seen:], cache=cache)
    torch.testing.assert_close(rest, model(tokens)[:, seen:], rtol=1e-4, atol=1e-5)
    assert cache.next_position == 9 and cache.layers[0][0].shape[2] == 9


def test_positions_are_drawn_in_training_alone(tiny_model):
    model, tokens, seen = tiny_model("learned", train_length=64, rows=100, random_offset=True), ids(1, 8), []
    scheme = model.schemes[0]
    plain = scheme.add_to_embeddings
    scheme.add_to_embeddings = lambda x, positions: seen.append(positions) or plain(x, positions)
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        model.train().nats(tokens, tokens)
    model.eval().nats(tokens, tokens)
    model.train().nats(tokens, tokens, positions=torch.arange(8) + 3)
    torch.manual_seed(5)
    assert torch.equal(seen[0], torch.arange(8) + torch.randint(100 - 8 + 1, ()))
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])
    assert torch.equal(seen[3], torch.arange(8)) and torch.equal(seen[4], torch.arange(8) + 3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own modules, at their import
def test_a_compiled_step_draws_positions_too(tiny_model):
    model = tiny_model("learned", train_length=64, rows=100, random_offset=True).train()
    tokens, compiled, results = ids(1, 8), CompiledNats(model), []
    for nats in (model.nats, compiled):
        torch.manual_seed(5)
        results.append(nats(tokens, tokens))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "settings"), [("rotary", {"scaling": "yarn"}), ("t5", {}), ("learned", {}), ("alibi", {})]
)
def test_serving_another_length_equals_a_fresh_build(tiny_model, name, settings):
    model = tiny_model(name, train_length=64, **settings)
    parameters = list(model.parameters())
    tokens = ids(1, 64)
    before = model(tokens)
    for length in (256, 64, 100):
        model.serve(length)
        fresh = tiny_model(name, train_length=64, context_length=length, **settings)
        assert torch.equal(model(tokens), fresh(tokens))
        assert torch.equal(model(tokens), before) != (name == "rotary" and length > 64)
        assert all(x is y for x, y in zip(model.parameters(), parameters, strict=True))
        assert not model.schemes[0].training


@pytest.mark.parametrize("cutoffs", [[], [20, 35]])
@pytest.mark.parametrize("score_from", [0, 4])
def test_scores_and_hits(tiny_config, cutoffs, score_from):
    tiny_config.adaptive_cutoffs = cutoffs
    model = TransformerLM(tiny_config, POSITIONS["alibi"](), "eager", 50, 64).eval()
    inputs = ids(3, 10)
    best = model(inputs).argmax(-1)
    targets = torch.where(torch.rand(3, 10) < 0.5, best, ids(3, 10))
    scores = model.score(inputs, targets, score_from=score_from, hits=True)
    assert (
        torch.equal(scores.hits, (best == targets)[:, score_from:]) and 0 < scores.hits.sum() < scores.hits.numel()
    )
    torch.testing.assert_close(scores.nats, model.nats(inputs, targets)[:, score_from:], rtol=1e-6, atol=1e-6)
    assert model.score(inputs, targets).hits is None and not scores.nats.requires_grad


def test_columns_before_the_scored_ones_cost_no_loss(tiny_model, monkeypatch):
    model, rows = tiny_model("alibi"), []
    nats = model.vocabulary.nats
    monkeypatch.setattr(model.vocabulary, "nats", lambda h, t: rows.append(len(h)) or nats(h, t))
    model.score(ids(2, 10), ids(2, 10), score_from=7)
    assert rows == [2 * 3]


def test_precision_is_that_of_the_scores(tiny_model):
    model, inputs = tiny_model("alibi"), ids(2, 10)
    exact = model.score(inputs, inputs).nats
    model.precision = "bfloat16"
    rounded = model.score(inputs, inputs).nats
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().max() < 0.3


def test_dropout_acts_on_embeddings_on_branches_and_inside_the_ffn(tiny_model):
    """With everything dropped at one place, what is left tells where that was."""
    model, inputs = tiny_model("sinusoidal").train(), ids(2, 7)
    block, places = model.layers[0], torch.arange(7)
    vectors = model.vocabulary.embed(inputs) * model.config.model_dim**0.5
    with torch.no_grad():
        x = model.schemes[0].add_to_embeddings(vectors, places)
        for layer in model.layers:
            layer.dropout.p = 1.0  # neither attention nor feed-forward adds anything
        torch.testing.assert_close(model.hidden(inputs), model.final_norm(x))
        model.dropout.p = 1.0
        torch.testing.assert_close(model.hidden(inputs), model.final_norm(torch.zeros_like(x)))
        block.ffn.dropout.p = 1.0
        torch.testing.assert_close(block.ffn(x), block.ffn.down.bias.expand_as(x))
        model.eval()
        assert not torch.allclose(model.hidden(inputs), model.final_norm(x))


def uniform(bound):
    return lambda x: x.abs().max() <= bound and x.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)


def normal(std):
    return lambda x: x.abs().max() > 2.5 * std and x.std().item() == pytest.approx(std, rel=0.1)


@pytest.mark.parametrize("form", ["scaled", "fairseq"])
def test_initial_weights_are_those_of_the_table(form):
    dim, ffn, layers = 64, 128, 3
    config = ModelConfig(num_layers=layers, model_dim=dim, num_heads=4, ffn_dim=ffn, initialisation=form)
    block = TransformerLM(config, POSITIONS["none"](), "eager", 50, 16).layers[1]
    zero, one = (lambda x: not x.any()), (lambda x: bool((x == 1).all()))
    expected = {
        "scaled": {
            "attention.qkv": (normal(dim**-0.5), zero),
            "attention.out": (normal((2 * layers * dim) ** -0.5), zero),
            "ffn.up": (normal(dim**-0.5), zero),
            "ffn.down": (normal((2 * layers * ffn) ** -0.5), zero),
        },
        "fairseq": {
            # Xavier: sqrt(6 / (inputs + outputs)) of a (dim, dim) matrix, times the gain
            "attention.qkv": (uniform((3 / dim) ** 0.5 / 2**0.5), uniform(dim**-0.5)),
            "attention.out": (uniform((3 / dim) ** 0.5), zero),
            "ffn.up": (uniform(dim**-0.5), uniform(dim**-0.5)),
            "ffn.down": (uniform(ffn**-0.5), uniform(ffn**-0.5)),
        },
    }[form]
    for name, (weight, bias) in expected.items():
        layer = block.get_submodule(name)
        assert weight(layer.weight) and bias(layer.bias), name
    for norm in (block.attention_norm, block.ffn_norm):
        assert one(norm.weight) and zero(norm.bias)


@pytest.mark.parametrize("attention", sorted(ATTENTION))
def test_a_used_model_can_be_copied_and_pickled(tiny_model, attention):
    model, inputs = tiny_model("alibi", attention=attention), ids(2, 7)
    with torch.no_grad():
        expected = model(inputs)
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(again(inputs), expected) and type(again.backend) is type(model.backend)
