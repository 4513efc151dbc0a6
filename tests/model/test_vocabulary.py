"""Vocabularies: the adaptive one against a full softmax and an embedding table, both written out word by word."""

import math
import re

import pytest
import torch

from alibi_lm.model.vocabulary import AdaptiveVocabulary, Vocabulary

VOCAB, DIM, CUTOFFS, FACTOR = 23, 12, [7, 15], 2.0


@pytest.fixture
def vocabulary() -> AdaptiveVocabulary:
    torch.manual_seed(0)
    vocabulary = AdaptiveVocabulary(VOCAB, DIM, CUTOFFS, FACTOR, dropout=0.0).double()
    vocabulary.initialise()
    return vocabulary


def band_of(word: int) -> tuple[int, int]:
    """(band, index within the band), by counting."""
    starts = [0, *CUTOFFS]
    band = max(i for i, start in enumerate(starts) if word >= start)
    return band, word - starts[band]


def reference_vectors(vocabulary: AdaptiveVocabulary) -> torch.Tensor:
    """The input vector of every word: (V, D)."""
    rows = []
    for word in range(VOCAB):
        band, index = band_of(word)
        rows.append(vocabulary.projections[band] @ vocabulary.embeddings[band][index])
    return torch.stack(rows)


def reference_log_probs(vocabulary, hidden: torch.Tensor) -> torch.Tensor:
    """The distribution from its definition, in probabilities rather than logarithms: (N, V)."""
    tables, projections = vocabulary.embeddings, vocabulary.projections
    rows = []
    for h in hidden:
        scores = [math.exp((v @ h).item()) for v in tables[0]] + [
            math.exp((c @ h).item()) for c in vocabulary.clusters
        ]
        head = [s / sum(scores) for s in scores]
        probabilities = head[: CUTOFFS[0]]
        for tail in (1, 2):
            within = [math.exp(((projections[tail] @ v) @ h).item()) for v in tables[tail]]
            probabilities += [head[CUTOFFS[0] + tail - 1] * w / sum(within) for w in within]
        rows.append(torch.tensor(probabilities, dtype=torch.float64).log())
    return torch.stack(rows)


def test_shapes_of_bands(vocabulary):
    assert [tuple(e.shape) for e in vocabulary.embeddings] == [(7, 12), (8, 6), (8, 3)]
    assert [tuple(p.shape) for p in vocabulary.projections] == [(12, 12), (12, 6), (12, 3)]
    assert tuple(vocabulary.clusters.shape) == (2, 12)
    assert sum(p.numel() for p in vocabulary.parameters()) == 84 + 48 + 24 + 144 + 72 + 36 + 24


def test_embed_equals_the_table_of_all_words(vocabulary):
    ids = torch.arange(VOCAB).repeat(2, 1).flip(1)
    torch.testing.assert_close(vocabulary.embed(ids), reference_vectors(vocabulary)[ids], rtol=1e-12, atol=1e-12)


def test_distribution_equals_the_definition_and_sums_to_one(vocabulary):
    hidden = torch.randn(5, DIM, dtype=torch.float64)
    log_probs = vocabulary.logits(hidden)
    torch.testing.assert_close(log_probs, reference_log_probs(vocabulary, hidden), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("words", [[6], [7], [15], [0, 6, 3], [7, 14], [15, 22, 16], list(range(22, -1, -1))])
def test_nats_of_every_word_and_of_batches_that_leave_bands_empty(vocabulary, words: list[int]):
    hidden = torch.randn(len(words), DIM, dtype=torch.float64)
    expected = -reference_log_probs(vocabulary, hidden)[torch.arange(len(words)), words]
    torch.testing.assert_close(vocabulary.nats(hidden, torch.tensor(words)), expected, rtol=1e-12, atol=1e-12)


def test_without_narrowing_it_equals_one_full_softmax():
    """With P = identity and cluster scores equal to each tail's log-sum-exp, the hierarchy is one softmax."""
    torch.manual_seed(1)
    vocabulary = AdaptiveVocabulary(VOCAB, DIM, CUTOFFS, factor=1.0, dropout=0.0).double()
    vocabulary.initialise()
    with torch.no_grad():
        for projection in vocabulary.projections:
            projection.copy_(torch.eye(DIM))
    table = torch.cat([*vocabulary.embeddings]).detach()
    hidden = torch.randn(1, DIM, dtype=torch.float64)
    scores = (hidden @ table.T)[0]
    sums = torch.stack([scores[7:15].logsumexp(0), scores[15:].logsumexp(0)])
    with torch.no_grad():
        vocabulary.clusters.copy_(sums[:, None] * hidden / hidden.pow(2).sum())
    torch.testing.assert_close(vocabulary.embed(torch.arange(VOCAB)[None])[0], table)
    torch.testing.assert_close(vocabulary.logits(hidden)[0], scores.log_softmax(0), rtol=1e-12, atol=1e-12)


def test_gradients_equal_those_of_the_dense_distribution(vocabulary):
    targets = torch.tensor([0, 6, 7, 14, 15, 22, 3])
    hidden = torch.randn(len(targets), DIM, dtype=torch.float64, requires_grad=True)
    parameters = [hidden, *vocabulary.parameters()]
    embedded = vocabulary.embed(targets[None])[0]
    ours = torch.autograd.grad(vocabulary.nats(hidden + embedded, targets).sum(), parameters)
    dense = vocabulary.logits(hidden + reference_vectors(vocabulary)[targets])
    theirs = torch.autograd.grad(-dense.gather(1, targets[:, None]).sum(), parameters)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_every_parameter_has_a_gradient_even_when_no_target_is_in_a_tail(vocabulary):
    ids = torch.tensor([[0, 1, 2]])
    vocabulary.nats(vocabulary.embed(ids)[0], ids[0]).sum().backward()
    assert all(p.grad is not None for p in vocabulary.parameters())
    assert vocabulary.embeddings[2].grad.abs().sum() == 0
    assert vocabulary.clusters.grad.abs().sum() > 0


def test_initial_distributions():
    torch.manual_seed(2)
    vocabulary = AdaptiveVocabulary(6000, 64, [2000, 4000], 4.0, 0.0)
    vocabulary.initialise()
    for table, dim in zip(vocabulary.embeddings, (64, 16, 4), strict=True):
        assert table.shape == (2000, dim)
        assert torch.equal(table[1], torch.zeros(dim))
        assert (table[[0, 2]] != 0).all()
        assert table.std().item() == pytest.approx(dim**-0.5, rel=0.05)
    for weight in (*vocabulary.projections, vocabulary.clusters):
        bound = math.sqrt(6 / sum(weight.shape))
        assert weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)


def test_dropout_acts_on_input_and_on_tail_projections():
    torch.manual_seed(3)
    vocabulary = AdaptiveVocabulary(VOCAB, DIM, CUTOFFS, FACTOR, dropout=0.5).double()
    vocabulary.initialise()
    seen: list[tuple[int, ...]] = []
    vocabulary.dropout.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    hidden = torch.randn(3, DIM, dtype=torch.float64)
    targets = torch.tensor([2, 8, 20])
    vocabulary.nats(hidden, targets)
    assert seen == [(3, 12), (1, 6), (1, 3)]
    vocabulary.eval()
    first = vocabulary.nats(hidden, targets)
    assert torch.equal(first, vocabulary.nats(hidden, targets))


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("cutoffs", [[], [100, 200]])
def test_half_precision_scores_are_summed_in_float32(autocast: bool, cutoffs: list[int]):
    torch.manual_seed(4)
    vocabulary = AdaptiveVocabulary(300, 16, cutoffs, 4.0, 0.0) if cutoffs else Vocabulary(300, 16, tied=True)
    vocabulary.initialise()
    hidden, targets = torch.randn(60, 16), torch.randint(300, (60,))
    exact = vocabulary.nats(hidden, targets)
    if not autocast:
        vocabulary, hidden = vocabulary.bfloat16(), hidden.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        nats, best = vocabulary.nats(hidden, targets), vocabulary.first_choices(hidden)
        logits = vocabulary.logits(hidden.requires_grad_())
        (gradient,) = torch.autograd.grad(logits.sum(), hidden)
    assert nats.dtype == logits.dtype == torch.float32 and gradient.abs().sum() > 0
    assert (nats - exact).abs().max() < 0.05  # bfloat16 factors are off by up to 2^-8 of their size
    # All ways to the same distribution take the same products, unrounded: what is scored is what is generated.
    log_probs = logits.log_softmax(-1)
    assert (log_probs.gather(1, targets[:, None])[:, 0] + nats).abs().max() < 1e-5
    assert torch.equal(logits.argmax(-1), best)


@pytest.mark.parametrize("tied", [True, False])
def test_first_choices_are_the_most_probable_words(vocabulary, tied: bool):
    plain = Vocabulary(VOCAB, DIM, tied).double()
    plain.initialise()
    for hidden in (torch.randn(1200, DIM, dtype=torch.float64), torch.randn(1, DIM, dtype=torch.float64)):
        for each in (vocabulary, plain):
            best = each.first_choices(hidden)
            assert torch.equal(best, each.logits(hidden).argmax(-1)) and best.shape == (len(hidden),)
    table = plain.embedding if tied else plain.output
    assert torch.equal(plain.first_choices(hidden), (hidden @ table.T).argmax(-1))


@pytest.mark.parametrize("cutoffs", [[], [0, 5], [5, 5], [8, 3], [23], [5, 30]])
def test_wrong_cutoffs_are_refused(cutoffs: list[int]):
    with pytest.raises(ValueError, match=re.escape(f"model.adaptive_cutoffs = {cutoffs}")):
        AdaptiveVocabulary(VOCAB, DIM, cutoffs, FACTOR, 0.0)


def test_factor_that_leaves_no_dimension_is_refused():
    with pytest.raises(ValueError, match=r"model.adaptive_factor = 4.0 .* band 3"):
        AdaptiveVocabulary(VOCAB, 8, CUTOFFS, 4.0, 0.0)
