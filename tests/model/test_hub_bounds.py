"""Windows of imported ALiBi models: no text may lose more attention outside of them than was promised."""

import os
from types import SimpleNamespace

import pytest
import torch
from hub_models import VOCAB, build

from alibi_lm.model.hub_bounds import _PARTS, head_bounds, lost_shares
from alibi_lm.model.huggingface import HuggingFaceLM

os.environ["TRANSFORMERS_VERBOSITY"] = "error"


def plain(name, **settings):
    model = build(name, **settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))  # gains, shifts and constants that are not 1 and 0
    return HuggingFaceLM(model, name, 32)


@pytest.mark.parametrize("name", ["bloom", "mpt"])
def test_no_text_loses_more_than_the_share(name):
    model = plain(name)
    model.serve(256)
    ids = torch.randint(VOCAB, (1, 256))
    lost = lost_shares(model, ids)
    for share in (1e-1, 1e-3):
        bounds = head_bounds(model, 256, share)
        assert len(bounds) == len(lost) == 2
        for layer, shares in zip(bounds, lost, strict=True):
            for head, window in enumerate(layer.windows.tolist()):
                if window < 256:
                    assert shares[head, window] <= share
    assert head_bounds(model, 256, 1e-1)[0].windows.min() < 256, "the bound says something here"


@pytest.mark.parametrize("name", ["bloom", "mpt", "falcon"])
def test_queries_keys_and_slopes_are_the_models(name):
    """Attention made anew from what was taken out of the model gives what the model's own gives."""
    model = plain(name)
    seen = {}
    slopes, layers = _PARTS[name](model.model)
    w_q, w_k, b_q, norm, scale = layers[0]
    block = (model.model.transformer.blocks if name == "mpt" else model.model.transformer.h)[0]
    attention = block.attn if name == "mpt" else block.self_attention
    fused = attention.Wqkv if name == "mpt" else attention.query_key_value
    out = attention.out_proj if name == "mpt" else attention.dense
    hooks = [
        norm.register_forward_hook(lambda module, inputs, output: seen.update(x=output)),
        out.register_forward_pre_hook(lambda module, inputs: seen.update(mixed=inputs[0])),
    ]
    ids = torch.randint(VOCAB, (1, 20))
    with torch.no_grad():
        model.model(ids, use_cache=False)
        whole = fused(seen["x"])
        v = whole.chunk(3, dim=-1)[2][0] if name == "mpt" else whole.view(20, len(slopes), 3, -1)[..., 2, :]
    for hook in hooks:
        hook.remove()
    x, heads = seen["x"][0].double(), len(slopes)
    q = x @ w_q.T.double() + (0 if b_q is None else b_q.double())
    k = x @ w_k.T.double()  # a constant of the keys would change all scores of a query alike
    q, k, v = (part.double().view(20, heads, -1).transpose(0, 1) for part in (q, k, v))
    distance = torch.arange(20)[:, None] - torch.arange(20)
    scores = q @ k.mT * scale - slopes[:, None, None] * distance
    expected = scores.masked_fill(distance < 0, -torch.inf).softmax(-1) @ v
    torch.testing.assert_close(
        seen["mixed"][0].double(), expected.transpose(0, 1).flatten(1), atol=1e-4, rtol=1e-4
    )


def test_others_are_refused():
    with pytest.raises(ValueError, match="BLOOM, MPT and Falcon"):
        head_bounds(HuggingFaceLM(build("llama"), "llama", 32), 32)
    falcon = plain("falcon")
    short, long = head_bounds(falcon, 32)[0], head_bounds(falcon, 4096)[0]
    assert (long.windows > short.windows).all(), "Falcon's biases are rounded, the more the longer the text"
    model = plain("mpt")
    model.model.config.attn_config.clip_qkv = 6.0
    with pytest.raises(ValueError, match="clip_qkv = 6"):
        head_bounds(model, 32)


def test_shares_are_summed_where_the_weights_are():
    class Elsewhere:
        config = SimpleNamespace(model_type="bloom")

        def __call__(self, ids, **options):
            return SimpleNamespace(attentions=[torch.empty(1, 2, 4, 4, device="meta")])

    (found,) = lost_shares(SimpleNamespace(model=Elsewhere()), torch.zeros(1, 4))
    assert found.shape == (2, 4) and found.is_meta
