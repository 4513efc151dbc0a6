"""FlexAttention against `eager`: the forward pass on the CPU, everything on a GPU where there is one."""

import math

import pytest
import torch
from largest_tensor import LargestTensor
from torch.nn.attention import flex_attention

from alibi_lm.attention import Backends
from alibi_lm.attention.flex import BLOCK, LOST, near_blocks, tail_sums
from alibi_lm.positions import POSITIONS, PositionScheme, PositionShape

from .kernels import attend, draw, request, scheme_of, weights


@pytest.mark.parametrize(
    ("name", "length", "queries", "width", "window", "step"),
    [
        ("alibi", 130, 130, 8, None, 1),
        ("none", 130, 130, 5, 5, 1),  # queries and keys wider than values, as PoPE's
        ("t5", 40, 19, 8, None, 1),  # as in decoding
        ("alibi", 130, 130, 8, 17, 1),  # no block may be skipped by distance alone
        ("fire", 130, 130, 8, 50, 4),  # more than a function of the distance
    ],
)
@torch.no_grad()
def test_forward_equals_eager(name, length, queries, width, window, step):
    """What a score gets is `score_mod`, which the contract tests compare with the bias of every scheme."""
    scheme, (q, k, v, _) = scheme_of(name, 3), draw(2, 3, length, 8)
    flex, eager = (
        attend(a, scheme, q[:, :, length - queries :], k, v[..., :width], torch.arange(length) * step, window)
        for a in ("flex", "eager")
    )
    torch.testing.assert_close(flex, eager, rtol=1e-5, atol=1e-5)


def test_no_table_of_pairs_is_built(monkeypatch):
    """What a generated kernel reads for T5 is one number for each head and distance."""
    monkeypatch.setattr(PositionScheme, "bias", lambda *_: pytest.fail("built a (T, S) table"))
    for name in ("alibi", "t5"):
        modify = scheme_of(name, 3).score_mod(torch.arange(50), torch.arange(50), 49)
        sizes = [c.cell_contents.numel() for c in modify.__closure__ if isinstance(c.cell_contents, torch.Tensor)]
        assert sizes and max(sizes) <= 3 * 50


def test_training_on_the_cpu_is_refused(tiny_model):
    model, tokens = tiny_model("alibi", "flex").train(), torch.randint(0, 50, (1, 8))
    message = r"attention=flex cannot run position=alibi \(on a CPU .* no backward pass.*\)\. Use attention=sdpa"
    with pytest.raises(ValueError, match=message):
        model.nats(tokens, tokens)


def test_dropout_is_refused():
    q = torch.randn(1, 3, 4, 8)
    with torch.no_grad(), pytest.raises(ValueError, match=r"model\.attention_dropout = 0\.1.*Use attention=sdpa"):
        attend("flex", scheme_of("none", 3), q, q, q, dropout=0.1)


@pytest.mark.parametrize("name", ["none", "alibi", "t5"])
def test_a_whole_pass_makes_nothing_of_the_size_of_all_pairs(name):
    with torch.no_grad(), LargestTensor() as seen:
        Backends("flex", name).prepare(scheme_of(name, 3), request(2000))
    assert seen.elements < 2000 * 2000 // 10


def test_a_mask_of_inference_mode_is_not_trained_with(tiny_model, monkeypatch):
    """A validation may have the very length of the training step after it."""
    model, masks, run = tiny_model("none", "flex"), [], flex_attention.flex_attention
    monkeypatch.setattr(flex_attention, "flex_attention", lambda *a: masks.append(a[4]) or run(*a))
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            model(torch.randint(0, 50, (1, 9)))
    assert masks[0].kv_indices.is_inference() and not masks[-1].kv_indices.is_inference()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["none", "alibi", "t5"])
def test_a_compiled_model_stays_one_graph(tiny_model, name):
    import torch._dynamo

    model, tokens = tiny_model(name, "flex"), torch.randint(0, 50, (1, 40))
    with torch.no_grad():
        explained = torch._dynamo.explain(model.hidden)(tokens)
    assert explained.graph_break_count == 0 and explained.graph_count == 1, explained.break_reasons


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["flex", "sdpa"])
@pytest.mark.parametrize("name", ["none", "alibi", "t5"])
def test_outputs_and_gradients_on_a_gpu(name, backend, dtype):
    scheme = POSITIONS[name]().build(PositionShape(384, 64, 6, 2, 64, 64)).cuda()
    results = []
    for attention, precision in (("eager", torch.float64), (backend, dtype)):
        torch.manual_seed(0)
        q, k, v, grad = (torch.randn(2, 6, 1000, 64).bfloat16().to("cuda", precision) for _ in range(4))
        leaves = [x.requires_grad_() for x in (q, k, v)] + list(scheme.parameters())
        out = attend(attention, scheme, q, k, v)
        results.append([out, *torch.autograd.grad(out, leaves, grad)])
    for expected, actual in zip(*results, strict=True):
        error = (actual.double() - expected.double()).abs().max() / expected.double().abs().max()
        assert error < (2e-2 if dtype == torch.bfloat16 else 2e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_many_lengths_and_schemes_never_build_all_scores():
    """More kernels than torch's own limit of recompilations allows: past it the scores of all pairs are built."""
    for length in range(1100, 1124, 2):
        for name in ("none", "alibi", "t5"):
            scheme = POSITIONS[name]().build(PositionShape(384, 64, 6, 2, 64, 64)).cuda()
            q, k, v = (torch.randn(1, 6, length, 64, device="cuda") for _ in range(3))
            attend("flex", scheme, q, k, v)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            with torch.no_grad():
                attend("flex", scheme, q, k, v)
            assert torch.cuda.max_memory_allocated() - before < 6 * length * length * 4


# --- blocks that a falling bias leaves no weight -------------------------------------------------


def shares_left_out(q: torch.Tensor, k: torch.Tensor, line: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Share of each query's weights outside of the kept blocks, in float64: (B, H, T)."""
    tokens = q.shape[2]
    keys = kept.repeat_interleave(BLOCK, -1).repeat_interleave(BLOCK, -2)[..., :tokens, :tokens]
    return weights(q, k, line).masked_fill(keys, 0).sum(-1)


@pytest.mark.parametrize(("tokens", "size"), [(BLOCK, 1.0), (5 * BLOCK - 1, 0.1), (5 * BLOCK - 1, 3.0)])
def test_skipped_blocks_hold_less_weight_than_float32_can_tell(tokens, size):
    slopes = torch.tensor([2.0, 0.5, 0.05, 1e-3])
    line = -slopes[:, None] * torch.arange(tokens)
    q, k = size * torch.randn(2, 4, tokens, 8), size * torch.randn(2, 4, tokens, 8)
    # The worst case: the last query meets keys along itself at the far end, and an opposite one of its own.
    q[:, :, -1] *= q[:, :, :-1].norm(dim=-1).amax(-1)[..., None] / q[:, :, -1].norm(dim=-1, keepdim=True)
    along = q[:, :, -1:] / q[:, :, -1:].norm(dim=-1, keepdim=True) * k.norm(dim=-1).amax(-1)[..., None, None]
    k[:, :, : tokens // 2], k[:, :, -1:] = along, -along
    mask = near_blocks(q, k, tail_sums(line))
    kept = mask.to_dense()[0].bool()
    assert shares_left_out(q, k, line, kept).max() < LOST
    blocks = kept.shape[-1]
    causal = torch.ones(blocks, blocks, dtype=torch.bool).tril()
    assert not (kept & ~causal).any() and kept.diagonal(dim1=-2, dim2=-1).all()
    assert bool(kept[3].eq(causal).all()), "the flattest head needs everything"
    if tokens > 4 * BLOCK and size <= 1:
        assert kept[0].sum() == 2 * blocks - 1, "the steepest head needs its own block and the one before"


def test_the_blocks_are_as_few_as_the_bound_allows():
    """With the largest possible excess in every pair, one block less would lose too much."""
    tokens, slope = 6 * BLOCK, 0.1
    line = -slope * torch.arange(tokens, dtype=torch.float32)[None]
    q = torch.tensor([3.0, 0.0]).expand(1, 1, tokens, 2).contiguous()
    k = torch.tensor([2.0, 0.0]).expand(1, 1, tokens, 2).contiguous()
    k[:, :, -1] *= -1
    kept = near_blocks(q, k, tail_sums(line)).to_dense()[0, 0].bool()
    first = int(kept[-1].int().argmax())
    reach = (2 * 6 / 2**0.5 - math.log(LOST) - math.log(1 - math.exp(-slope))) / slope
    nearest_query = 5 * BLOCK
    assert first == int((nearest_query - reach + 1) // BLOCK) > 0


class Plateau(PositionScheme):
    """A bias that falls from distance 200 on."""

    def distance_bias(self, distance):
        return -(distance - 200).clamp_min(0).float().expand(3, *distance.shape)


@torch.no_grad()
def test_blocks_are_skipped_by_distance_where_positions_begin_late(monkeypatch):
    scheme, (q, k, v, _) = Plateau(PositionShape(24, 8, 3, 2, 64, 64)), draw(1, 3, 500, 8)
    masks, run = [], flex_attention.flex_attention
    monkeypatch.setattr(flex_attention, "flex_attention", lambda *a: masks.append(a[4]) or run(*a))
    attend("flex", scheme, q, k, v, torch.arange(200, 700))
    kept = masks[0].to_dense()[0].bool()
    assert shares_left_out(q, k, scheme.distance_bias(torch.arange(500)), kept).max() < LOST


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own modules, at their import
@pytest.mark.parametrize("heads", [4, 8])
def test_a_generated_kernel_that_skips_blocks_equals_the_definition(heads):
    from torch.nn.attention.flex_attention import flex_attention

    tokens = 2100
    scheme, positions = scheme_of("alibi", heads), torch.arange(tokens)
    q, k, v = (torch.randn(1, heads, tokens, 16) for _ in range(3))
    with torch.no_grad():
        mask = near_blocks(q, k, tail_sums(scheme.distance_bias(positions)))
        assert mask.sparsity() > 55, "a causal mask alone leaves out 47 of 100 blocks"
        modify = scheme.score_mod(positions, positions, tokens - 1)
        got = torch.compile(flex_attention, dynamic=False)(q, k, v, modify, mask)
        torch.testing.assert_close(got, attend("eager", scheme, q, k, v), rtol=1e-5, atol=1e-5)
