"""Cached decoding by the compiled kernel, against attention written out in float64."""

from __future__ import annotations

import pytest
import torch

from alibi_lm.attention.decode import HeldKeys, Lines, decode
from alibi_lm.attention.native import attend_to_cache, why_not

from .kernels import weights

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())
SLOPES = torch.tensor([0.5, 0.01, 0.0001])


@pytest.mark.parametrize("dim", [10, 16, 40])
@pytest.mark.parametrize("queries, keys", [(1, 1), (1, 70), (6, 5000), (7, 7), (50, 333)])
@pytest.mark.parametrize("biased", [False, True])
def test_the_last_queries_attend_to_all_keys_or_those_of_a_window(dim, queries, keys, biased):
    """5,000 keys of few queries are shared by threads, in segments that are put together again."""
    q, k, v = (torch.randn(2, 3, n, dim) for n in (queries, keys, keys))
    line = -SLOPES[:, None] * torch.arange(keys + 3) if biased else None
    for window in (keys, max(1, keys // 3)):
        found = attend_to_cache(q, k, v, None if line is None else Lines.alone(line), window)
        expected = weights(q, k, line, window) @ v.double()
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=2e-5)
    # One key far away that outweighs all others: segments differ in their largest score.
    k[:, :, 0] = 30 * q[:, :, -1]
    found = attend_to_cache(q, k, v, None, keys)
    torch.testing.assert_close(found.double(), weights(q, k) @ v.double(), rtol=1e-4, atol=2e-5)


def test_keys_of_any_layout_are_read_where_they_lie():
    k, v = (torch.randn(2, 50, 3, 16).transpose(1, 2)[:, :, 4:44] for _ in "kv")
    q = torch.randn(2, 3, 1, 16)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(attend_to_cache(q, k, v, None, 40), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("queries", [1, 50])
def test_a_far_key_of_great_weight_is_not_left_out(queries):
    """Its score outweighs its distance, so the bound must see its norm: with few queries and with many."""
    q, k, v = (torch.randn(1, 2, n, 16) for n in (queries, 400, 400))
    line = -torch.tensor([[0.5], [0.25]]) * torch.arange(400)
    k[:, :, 3] = 400 * q[:, :, -1]
    held = HeldKeys(2, k.stride(2))
    held.place([0, 1], k, v)
    held.keys[:] = held.windows[:] = 400
    norms = k[:, :, : 400 - queries].norm(dim=-1).amax(-1)
    expected = weights(q, k, line)
    assert (expected[0, :, -1, 3] > 0.5).all()
    found = decode(q, held, Lines.alone(line), norms=norms)
    torch.testing.assert_close(found.double(), expected @ v.double(), rtol=1e-4, atol=2e-5)
