"""FlexAttention against `eager`: the forward pass on the CPU, everything on a GPU where there is one."""

import pytest
import torch

from alibi_lm.attention import build_backend
from alibi_lm.model.transformer import KeyValueCache
from alibi_lm.positions import POSITIONS, PositionShape

ALL = sorted(POSITIONS)
VARIANTS = [(name, {}) for name in ALL] + [("alibi", {"learned_slopes": True})]


@pytest.mark.parametrize(("name", "settings"), VARIANTS)
@pytest.mark.parametrize("length", [1, 17, 130])
@pytest.mark.parametrize("window", [None, 5])
def test_forward_equals_eager(tiny_model, name, settings, length, window):
    tokens = torch.randint(0, 50, (2, length))
    with torch.no_grad():
        flex, eager = (
            tiny_model(name, a, train_length=130, **settings)(tokens, window=window) for a in ("flex", "eager")
        )
    torch.testing.assert_close(flex, eager, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["none", "alibi", "t5"])
def test_decoding_in_pieces(tiny_model, name):
    model, tokens, cache = tiny_model(name, "flex"), torch.randint(0, 50, (1, 40)), KeyValueCache()
    with torch.no_grad():
        pieces = [model(piece, cache=cache) for piece in tokens.split([20, 1, 19], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens), rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(("name", "settings"), VARIANTS)
def test_score_mod_is_the_bias(name, settings):
    scheme = POSITIONS[name](**settings).build(PositionShape(24, 8, 3, 2, 64, 64))
    q_pos, k_pos = torch.arange(20, 33), torch.arange(33)
    modify, bias = scheme.score_mod(q_pos, k_pos), scheme.bias(q_pos, k_pos)
    assert (modify is None) == (bias is None)
    if bias is None:
        return
    zero = torch.zeros(())
    for head in range(3):
        for q in range(13):
            for k in range(20 + q + 1):
                index = [torch.tensor(i) for i in (0, head, q, k)]
                torch.testing.assert_close(modify(zero, *index), bias[head, q, k])


def test_alibi_reads_no_table_of_pairs(monkeypatch):
    scheme = POSITIONS["alibi"]().build(PositionShape(24, 8, 3, 2, 64, 64))
    monkeypatch.setattr(scheme, "bias", lambda *_: pytest.fail("built a (T, S) table"))
    assert scheme.score_mod(torch.arange(5), torch.arange(5)) is not None


def test_training_on_the_cpu_is_refused(tiny_model):
    model, tokens = tiny_model("alibi", "flex").train(), torch.randint(0, 50, (1, 8))
    with pytest.raises(ValueError, match=r"attention = flex on the CPU.*no backward pass.*attention=sdpa"):
        model.nats(tokens, tokens)


def test_dropout_is_refused():
    scheme, positions = POSITIONS["none"]().build(PositionShape(24, 8, 3, 2, 64, 64)), torch.arange(4)
    backend, q = build_backend("flex"), torch.randn(1, 3, 4, 8)
    with pytest.raises(ValueError, match=r"model\.attention_dropout = 0\.1.*set model\.attention_dropout=0"):
        backend(q, q, q, backend.prepare(scheme, positions, positions, None, q.dtype), 0.1)


def test_the_causal_mask_is_made_once_for_each_length():
    scheme, backend = POSITIONS["alibi"]().build(PositionShape(24, 8, 3, 2, 64, 64)), build_backend("flex")
    first, again, longer = (
        backend.prepare(scheme, torch.arange(n), torch.arange(n), None, torch.float32).block_mask
        for n in (9, 9, 12)
    )
    assert first is again and longer is not first


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["flex", "sdpa"])
@pytest.mark.parametrize("name", ["none", "alibi", "t5"])
def test_outputs_and_gradients_on_a_gpu(name, backend, dtype):
    scheme = POSITIONS[name]().build(PositionShape(384, 64, 6, 2, 64, 64)).cuda()
    positions = torch.arange(1000, device="cuda")
    results = []
    for attention, precision in (("eager", torch.float64), (backend, dtype)):
        torch.manual_seed(0)
        q, k, v, grad = (torch.randn(2, 6, 1000, 64).bfloat16().to("cuda", precision) for _ in range(4))
        leaves = [x.requires_grad_() for x in (q, k, v)]
        used = build_backend(attention)
        out = used(q, k, v, used.prepare(scheme, positions, positions, None, precision), 0.0)
        results.append([out, *torch.autograd.grad(out, leaves, grad)])
    for expected, actual in zip(*results, strict=True):
        error = (actual.double() - expected).abs().max() / expected.abs().max()
        assert error < (2e-2 if dtype == torch.bfloat16 else 2e-3)
