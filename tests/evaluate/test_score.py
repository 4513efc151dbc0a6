"""Identities that an honest scorer satisfies."""

import numpy as np
import pytest
import torch

from alibi_lm.distributed import World
from alibi_lm.evaluate.score import mean_nats, score, score_tokens
from alibi_lm.tasks.base import Batch
from alibi_lm.tasks.text import TextTask


@pytest.fixture
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 50, 333).astype(np.uint16)


def by_hand(model, tokens, length, stride) -> list[float]:
    """One forward pass for each target, as the protocol's words say."""
    inputs = [7, *tokens.tolist()]
    nats = []
    for t in range(len(tokens)):
        first = max(0, t // stride * stride - (length - stride))
        context = torch.tensor([inputs[first : t + 1]])
        log_probs = model(context)[0, -1:].log_softmax(-1)
        nats.append(-log_probs[0, int(tokens[t])].item())
    return nats


@pytest.mark.parametrize("position", ["alibi", "sinusoidal", "rotary"])
@pytest.mark.parametrize(("length", "stride"), [(16, None), (16, 16), (16, 5), (16, 1), (400, None)])
def test_scores_equal_one_pass_per_target(tiny_model, tokens, position, length, stride):
    model = tiny_model(position, "sdpa")
    tokens = tokens[:70]
    with torch.no_grad():
        expected = by_hand(model, tokens, length, stride or length)
    for tokens_per_forward in (1, 10_000):
        actual = score_tokens(model, tokens, 7, length, stride, tokens_per_forward)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5)


def test_a_model_of_known_probabilities_gives_their_entropy(tiny_model):
    """Logits fixed at log p: on a stream that holds each token p N times, perplexity is exp(entropy of p)."""
    model = tiny_model("none", "sdpa", vocab_size=3).double()
    p = np.array([0.5, 0.25, 0.25])
    with torch.no_grad():
        model.final_norm.weight.zero_()
        model.final_norm.bias.zero_()
        model.final_norm.bias[0] = 1
        model.vocabulary.embedding.zero_()
        model.vocabulary.embedding[:, 0] = torch.tensor(p).log()
    tokens = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [200, 100, 100]))
    nats = score_tokens(model, tokens, 0, 24, 7)
    assert mean_nats(nats) == pytest.approx(-(p * np.log(p)).sum(), rel=1e-12)


def test_processes_share_the_windows_and_score_each_target_once(tiny_model, tokens, monkeypatch):
    model = tiny_model("alibi", "sdpa")
    whole = score_tokens(model, tokens, 7, 16, 4)
    # Each process sums arrays that are zero outside of its share; here the sum is taken by hand.
    parts: list[list[torch.Tensor]] = []
    for rank in range(3):
        seen: list[torch.Tensor] = []

        def record(tensor, world, seen=seen):
            seen.append(tensor.clone())
            return torch.ones_like(tensor) if tensor.dtype == torch.int32 else tensor.clone()

        monkeypatch.setattr("alibi_lm.evaluate.score.all_reduce_sum", record)
        score_tokens(model, tokens, 7, 16, 4, world=World(rank, 3, 0))
        parts.append(seen)
    np.testing.assert_allclose(sum(p[0] for p in parts).numpy(), whole, rtol=0, atol=1e-5)
    assert (sum(p[1] for p in parts) == 1).all()


def test_training_mode_is_restored_and_off_while_scoring(tiny_model, tokens, tiny_config):
    model = tiny_model("alibi", "sdpa")
    model.dropout.p = 0.9
    model.train()
    first = score_tokens(model, tokens, 7, 16)
    assert model.training
    assert np.array_equal(first, score_tokens(model, tokens, 7, 16))


def test_hits_are_the_targets_that_are_the_first_choice(tiny_model, tokens):
    model, tokens = tiny_model("alibi", "sdpa"), tokens[:40]
    found = score(model, TextTask(tokens, 7, 5).batches(16), 40, hits=True)
    inputs = [7, *tokens.tolist()]
    with torch.no_grad():
        for t in range(40):
            first = max(0, t // 5 * 5 - 11)
            best = model(torch.tensor([inputs[first : t + 1]]))[0, -1:].argmax()
            assert found.hits[t] == (int(best) == tokens[t])
    wanted = np.full(40, int(best))  # a model of rare hits proves little: ask for what it does choose
    assert score(model, TextTask(wanted, 7).batches(1), 40, hits=True).hits.any()


def test_targets_that_do_not_count_are_left_out_and_each_other_must_come_once(tiny_model):
    model = tiny_model("alibi", "sdpa")
    ids = torch.randint(0, 50, (2, 6))
    numbers = np.array([[-1, 0, 2], [3, -1, 1]])
    nats = score(model, [Batch(ids, ids, numbers)], 4).nats
    whole = model.score(ids, ids, score_from=3).nats
    expected = [whole[0, 1], whole[1, 2], whole[0, 2], whole[1, 0]]
    np.testing.assert_allclose(nats, expected, atol=1e-6)
    for wrong in ([[-1, 0, 2], [3, -1, 2]], [[-1, 0, 2], [3, -1, -1]]):
        with pytest.raises(AssertionError, match="exactly once"):
            score(model, [Batch(ids, ids, np.array(wrong))], 4)


def test_an_error_leaves_the_model_in_training_mode(tiny_model, tokens):
    model = tiny_model("learned", "sdpa", train_length=8).train()
    for text, message in ((tokens, "8 positions"), (tokens[:0], "holds 0 tokens")):
        with pytest.raises(ValueError, match=message):
            score_tokens(model, text, 7, 16)
        assert model.training


def test_a_window_as_long_as_the_text_limits_nothing(tiny_model, tokens):
    model = tiny_model("alibi", "sdpa")
    full = score_tokens(model, tokens, 7, 64)
    np.testing.assert_allclose(score_tokens(model, tokens, 7, 64, window=64), full, atol=1e-5)
    assert np.abs(score_tokens(model, tokens, 7, 64, window=4) - full).max() > 1e-3
