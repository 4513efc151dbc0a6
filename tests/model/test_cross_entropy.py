"""The chunked cross-entropy against log_softmax in float64; values, gradients, memory."""

import functools
import weakref

import pytest
import torch
import torch.nn.functional as F
from largest_tensor import LargestTensor
from torch.utils._python_dispatch import TorchDispatchMode

from alibi_lm.model.cross_entropy import chunk_rows, linear_cross_entropy
from alibi_lm.model.vocabulary import Vocabulary

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2}
ROUTES = {
    "whole": {},
    "chunks kept": {"rows": 64, "keep": True},
    "chunks computed again": {"rows": 64, "keep": False},
    "filled up": {"multiple": 64},
    "filled up in chunks": {"rows": 64, "keep": False, "multiple": 8},
}


@pytest.fixture(params=ROUTES)
def cross_entropy(request):
    return functools.partial(linear_cross_entropy, **ROUTES[request.param])


def inputs(num_tokens: int, dtype: torch.dtype = torch.float64, vocab_size: int = 37, scale: float = 1.0):
    torch.manual_seed(num_tokens)
    hidden = (torch.randn(num_tokens, 12) * scale).bfloat16().to(dtype).requires_grad_()
    table = torch.randn(vocab_size, 12).bfloat16().to(dtype).requires_grad_()
    weights = torch.rand(num_tokens).bfloat16().to(torch.promote_types(dtype, torch.float32))
    return hidden, table, torch.randint(0, vocab_size, (num_tokens,)), weights


def reference(hidden, table, targets, weights):
    hidden, table = (x.detach().double().requires_grad_() for x in (hidden, table))
    log_probs = (hidden @ table.T).log_softmax(dim=1)
    nats = -log_probs[torch.arange(len(targets)), targets]
    return nats, *torch.autograd.grad((nats * weights.double()).sum(), (hidden, table))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("num_tokens", [1, 64, 65])
def test_values_and_gradients(cross_entropy, dtype, num_tokens):
    hidden, table, targets, weights = inputs(num_tokens, dtype)
    nats = cross_entropy(hidden, table, targets)
    assert nats.dtype == torch.promote_types(dtype, torch.float32) and nats.shape == (num_tokens,)
    got = (nats, *torch.autograd.grad((nats * weights).sum(), (hidden, table)))
    for mine, theirs in zip(got, reference(hidden, table, targets, weights), strict=True):
        error = (mine.double() - theirs).abs().max() / theirs.abs().max().clamp_min(1)
        # The loss of half-precision arguments is that of float32; only gradients are rounded to their dtype.
        assert error < (1e-6 if mine is nats and dtype == torch.bfloat16 else TOLERANCE[dtype])


def test_large_scores_neither_overflow_nor_vanish(cross_entropy):
    hidden, table, targets, weights = inputs(65, torch.float32, scale=300.0)
    nats = cross_entropy(hidden, table, targets)
    expected = reference(hidden, table, targets, weights)[0]
    assert torch.isfinite(nats).all() and nats.max() > 1000
    torch.testing.assert_close(nats.double(), expected, rtol=1e-5, atol=1e-3)


def test_a_second_backward_pass_gives_the_same(cross_entropy):
    hidden, table, targets, weights = inputs(130)
    loss = (cross_entropy(hidden, table, targets) * weights).sum()
    first = torch.autograd.grad(loss, (hidden, table), retain_graph=True)
    for mine, again in zip(first, torch.autograd.grad(loss, (hidden, table)), strict=True):
        torch.testing.assert_close(mine, again, rtol=1e-12, atol=1e-14)


def test_only_one_argument_needs_a_gradient(cross_entropy):
    hidden, table, targets, weights = inputs(65)
    expected = reference(hidden, table, targets, weights)
    for index, arguments in enumerate(((hidden, table.detach()), (hidden.detach(), table))):
        loss = (cross_entropy(*arguments, targets) * weights).sum()
        torch.testing.assert_close(torch.autograd.grad(loss, arguments[index])[0], expected[index + 1])


@pytest.mark.parametrize("tied", [True, False])
def test_the_vocabulary_and_its_tied_table(tied):
    vocabulary = Vocabulary(37, 12, tied).double()
    vocabulary.initialise()
    ids, targets = torch.randint(0, 37, (100,)), torch.randint(0, 37, (100,))
    nats = vocabulary.nats(vocabulary.embed(ids), targets)
    nats.sum().backward()
    got = {name: p.grad.clone() for name, p in vocabulary.named_parameters()}
    vocabulary.zero_grad()
    table = vocabulary.embedding if tied else vocabulary.output
    expected = F.cross_entropy(vocabulary.embedding[ids] @ table.T, targets, reduction="none")
    expected.sum().backward()
    torch.testing.assert_close(nats, expected, rtol=1e-12, atol=1e-12)
    for name, parameter in vocabulary.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(vocabulary.logits(vocabulary.embed(ids)), vocabulary.embedding[ids] @ table.T)


def test_autocast_rounds_the_products_alone(cross_entropy):
    hidden, table, targets, weights = inputs(130, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        nats = cross_entropy(hidden, table, targets)
    assert nats.dtype == torch.float32
    got = (nats, *torch.autograd.grad((nats * weights).sum(), (hidden, table)))
    assert got[1].dtype == got[2].dtype == torch.float32
    for mine, theirs in zip(got, reference(hidden, table, targets, weights), strict=True):
        assert (mine.double() - theirs).abs().max() < 2e-2 * theirs.abs().max().clamp_min(1) * 3


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_evaluation_has_one_chunk_of_scores_at_a_time(context):
    """Nothing waits for a backward pass that never comes, although the table is a parameter."""
    hidden, table, targets, weights = inputs(200, torch.float32)
    chunks: list[weakref.ref[torch.Tensor]] = []
    most = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal most
            result = func(*args, **(kwargs or {}))
            if (
                isinstance(result, torch.Tensor)
                and result.shape[1:] == table.shape[:1]
                and result.shape != table.shape[::-1]
            ):
                chunks.append(weakref.ref(result))
            most = max(most, len({x.data_ptr() for ref in chunks if (x := ref()) is not None}))
            return result

    with Watch(), context():
        nats = linear_cross_entropy(hidden, table, targets, rows=64)
    assert most == 1
    torch.testing.assert_close(nats.double(), reference(hidden, table, targets, weights)[0], rtol=1e-6, atol=1e-6)


def test_scores_of_the_whole_batch_never_exist():
    hidden, table, targets, _ = inputs(1000, torch.float32, vocab_size=500)
    with LargestTensor() as seen:
        linear_cross_entropy(hidden, table, targets, rows=64, keep=False).sum().backward()
    assert 0 < seen.elements <= 64 * 500


def test_a_chunk_has_a_bounded_number_of_scores_but_not_too_few_rows():
    assert [chunk_rows(words) for words in (8, 8192, 20_002, 267_744)] == [1 << 20, 1024, 512, 512]
