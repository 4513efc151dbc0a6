"""What a cache says it lost, and the windows that it certifies, against the formulas."""

import math

import pytest
import torch

from alibi_lm.attention.native import why_not
from alibi_lm.model.streaming import bias_tails, open_cache
from alibi_lm.model.window_cache import WindowCache

WINDOWS = [torch.tensor([60, 10_000, 15])]
"""One layer; its slopes are 1/16, 1/256 and 1/4."""
compiled = pytest.mark.skipif(bool(why_not()), reason=why_not())


@pytest.fixture
def one_layer(tiny_model):
    model = tiny_model("alibi", "eager")
    del model.blocks[1:]
    return model


def lost_shares(model, native, pieces):
    """What the cache says was lost, in each piece."""
    cache, found = WindowCache([w.clone() for w in WINDOWS], native, bias_tails(model)), []
    tokens = torch.randint(50, (2, sum(pieces)), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        for piece in tokens.split(pieces, dim=1):
            cache.lost_share = 0.0
            model(piece, cache=cache)
            found.append(cache.lost_share)
    return found


@pytest.mark.parametrize("native", [False, pytest.param(True, marks=compiled)])
def test_where_all_scores_are_equal_the_bound_is_the_share_itself(one_layer, native):
    with torch.no_grad():
        one_layer.layers[0].attention.qkv.weight[:24] = one_layer.layers[0].attention.qkv.bias[:24] = 0
    share = math.exp(-60 / 16)  # of all keys at distance 60 and more, in an endless stream
    found = lost_shares(one_layer, native, [100, 1, 3])
    assert found[1:] == pytest.approx([share / (1 - share)] * 2, rel=2e-3)


@compiled
def test_both_ways_to_decode_give_the_same_bound(one_layer):
    with torch.no_grad():
        one_layer.layers[0].attention.qkv.weight *= 0.3
    plain, native = (lost_shares(one_layer, native, [100, 1, 3, 40, 1, 1, 200]) for native in (False, True))
    assert max(plain) < 0.9
    assert native == pytest.approx(plain, rel=2e-3)


def test_certified_windows_follow_from_the_norms_seen(one_layer):
    """By the formula: the largest norms of any row, and the query that likes its own key least."""
    tokens, layer = torch.randint(50, (2, 300)), one_layer.layers[0]
    tokens[0] = 5  # one row has smaller norms than the other
    with torch.no_grad():
        layer.attention.qkv.weight *= 0.3
    cache = open_cache(one_layer, "certified", lost_share=1e-3)
    with torch.inference_mode():
        one_layer(tokens, cache=cache)
        x = layer.attention_norm(one_layer.vocabulary.embed(tokens) * math.sqrt(24))
        q, k, _ = layer.attention.qkv(x).double().unflatten(-1, (3, 3, -1)).permute(2, 3, 0, 1, 4).flatten(2, 3)
        far, own = q.norm(dim=-1).amax(-1) * k.norm(dim=-1).amax(-1), -(q * k).sum(-1).amin(-1)
    (tail,) = bias_tails(one_layer)
    wanted = tail.windows((far + own) * 8**-0.5, 1e-3)
    assert own.min() > 0
    assert torch.equal(cache.windows[0], wanted + wanted // 16)
