"""What a run does on a GPU, against float64 on the CPU: schemes, both precisions, losses, a training step."""

import copy

import numpy as np
import pytest
import torch

from alibi_lm import runtime
from alibi_lm.evaluate.passes import Passes
from alibi_lm.evaluate.views import Group
from alibi_lm.evaluate.windows import windows
from alibi_lm.model.compiled import CompiledNats
from alibi_lm.model.cross_entropy import linear_cross_entropy
from alibi_lm.model.streaming import open_cache
from alibi_lm.model.transformer import KeyValueCache, ModelConfig, TransformerLM
from alibi_lm.positions import POSITIONS
from alibi_lm.tasks.text import TextTask

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("default"),  # cuDNN and the compiler warn about machines, not about this code
]
# Share of the largest value: bfloat16 has 8 bits, float32 products on a GPU sum in another order.
BUDGET = {"float32": 1e-3, "bfloat16": 5e-2}
LENGTH = 300


def pair(name: str, attention: str = "auto", cutoffs: tuple[int, ...] = ()) -> tuple[TransformerLM, TransformerLM]:
    """One model twice: float64 on the CPU, float32 on the GPU."""
    torch.manual_seed(1)
    sizes = ModelConfig(num_layers=2, model_dim=128, num_heads=2, ffn_dim=256, adaptive_cutoffs=list(cutoffs))
    model = TransformerLM(sizes, POSITIONS[name](), attention, 1003, LENGTH)
    with torch.no_grad():
        for table in getattr(model.vocabulary, "embeddings", []):
            table[1].normal_()  # a vector of zeros has no direction: GRAPE-AP's norm would magnify its rounding
        for scheme in model.schemes:
            for parameter in scheme.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    exact = TransformerLM(sizes, POSITIONS[name](), "eager", 1003, LENGTH)
    exact.load_state_dict(model.state_dict())
    return exact.double(), model.cuda()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(2)
    return torch.randint(0, 1003, (2, LENGTH)), torch.randint(0, 1003, (2, LENGTH))


def gradients(model: TransformerLM, nats) -> dict[str, torch.Tensor]:
    model.zero_grad()
    nats.mean().backward()
    return {name: p.grad.double().cpu() for name, p in model.named_parameters()}


def assert_close(actual: torch.Tensor, expected: torch.Tensor, budget: float, what: str = "") -> None:
    error = (actual.double().cpu() - expected.double()).abs().max() / expected.abs().max()
    assert error < budget, (what, float(error))


@pytest.mark.parametrize("precision", BUDGET)
@pytest.mark.parametrize("cutoffs", [(), (402, 700)], ids=["plain", "adaptive"])
@pytest.mark.parametrize("name", sorted(POSITIONS))
def test_losses_and_gradients(name, cutoffs, precision):
    (exact, model), (inputs, targets) = pair(name, cutoffs=cutoffs), batch()
    expected = exact.nats(inputs, targets)
    with runtime.autocast(model.device, precision):
        nats = model.nats(inputs.cuda(), targets.cuda())
    assert nats.dtype == torch.float32
    assert_close(nats.detach(), expected.detach(), BUDGET[precision])
    theirs = gradients(exact, expected)
    mine = gradients(model, nats)
    error = sum((mine[p] - theirs[p]).square().sum() for p in theirs).sqrt()
    assert error < BUDGET[precision] * sum(g.square().sum() for g in theirs.values()).sqrt()
    if precision == "float32":
        largest = max(g.abs().max() for g in theirs.values())
        for parameter, expected in theirs.items():
            if expected.abs().max() > 1e-6 * largest:  # softmax ignores a number per head, such as FIRE's b2
                assert_close(mine[parameter], expected, 1e-2, parameter)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "flex"])
@pytest.mark.parametrize("name", ["none", "alibi", "t5"])
def test_a_training_step(name, attention, compiled):
    """Two steps lower the loss of a batch, as far as they do on the CPU."""
    (exact, model), (inputs, targets), losses = pair(name, attention), batch(), []
    for each, device in ((exact, "cpu"), (model, "cuda")):
        nats = CompiledNats(each) if compiled and device == "cuda" else each.nats
        optimizer = torch.optim.AdamW(each.train().parameters(), lr=1e-3)
        for _ in range(3):
            loss = nats(inputs.to(device), targets.to(device)).mean()
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert losses[3:] == pytest.approx(losses[:3], rel=1e-3)
    assert losses[5] < losses[4] < losses[3]


@pytest.mark.parametrize("name", sorted(POSITIONS))
def test_decoding_and_scoring(name):
    (exact, model), (inputs, targets), cache = pair(name), batch(), KeyValueCache()
    with torch.inference_mode():
        pieces = [model(p, cache=cache) for p in inputs.cuda().split([200, 1, 99], dim=1)]
        assert_close(torch.cat(pieces, dim=1), exact(inputs), 1e-3)
    scores = model.score(inputs.cuda(), targets.cuda(), score_from=100, hits=True)
    assert_close(scores.nats, exact.score(inputs, targets, score_from=100).nats, 1e-3)


@pytest.mark.parametrize("policy", ["proved", "certified"])
def test_decoding_through_a_cache_with_a_bound(policy):
    (exact, model), (inputs, _) = pair("alibi"), batch()
    cache = open_cache(model, policy, lost_share=1e-6)
    with torch.inference_mode():
        pieces = [model(p, cache=cache) for p in inputs.cuda().split([200, 1, 99], dim=1)]
        assert_close(torch.cat(pieces, dim=1), exact(inputs), 1e-3)
    assert cache.lost_share <= 1e-5


def test_the_view_of_windows():
    tokens = np.random.default_rng(0).integers(0, 1003, 700)
    (exact, model), found = pair("alibi"), []
    for one in (exact.float(), model):
        passes = Passes(one.eval(), TextTask(tokens, 7, documents=np.array([0, 200])))
        found.append(windows(Group("alibi", LENGTH, [passes]), [LENGTH]))
    for mine, theirs in zip(*found, strict=True):
        for share, keys in theirs["needed"].items():
            assert abs(mine["needed"][share] - keys) <= 1
        assert mine["windows"] == theirs["windows"]
    assert model.device.type == "cuda"


@pytest.mark.parametrize("words", [1000, 1002, 20_002])
def test_a_table_filled_up_to_whole_tiles_changes_nothing(words):
    torch.manual_seed(3)
    hidden, table = (
        torch.randn(300, 64, device="cuda").bfloat16(),
        torch.randn(words, 64, device="cuda").bfloat16(),
    )
    targets, results = torch.randint(0, words, (300,), device="cuda"), []
    for multiple in (None, 1):
        leaves = [x.clone().requires_grad_() for x in (hidden, table)]
        nats = linear_cross_entropy(*leaves, targets, multiple=multiple)
        results.append([nats.detach(), *torch.autograd.grad(nats.sum(), leaves)])
    for filled, plain in zip(*results, strict=True):
        assert filled.shape == plain.shape
        assert_close(filled, plain.cpu(), 1e-2)


def test_a_long_window_of_evaluation_keeps_memory_linear():
    _, model = pair("alibi")
    peaks = []
    for length in (4096, 16_384):
        tokens = torch.randint(0, 1003, (1, length), device="cuda")
        torch.cuda.reset_peak_memory_stats()
        copy.copy(model).score(tokens, tokens)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] < 6 * peaks[0]
