"""Heads that leave far keys out: what is left out weighs nothing, and what is computed is the definition."""

import math
from pathlib import Path

import pytest
import torch

from alibi_lm.attention import key_bias
from alibi_lm.positions.alibi import alibi_slopes

from .test_sdpa import LargestTensor, assert_within

BUDGET = {torch.float32: 3e-6, torch.bfloat16: 2e-2}


def alibi_row(num_heads: int, length: int) -> torch.Tensor:
    return torch.tensor(alibi_slopes(num_heads))[:, None] * (torch.arange(length) - length // 2)


def draw(num_heads: int, length: int, batch: int = 2, size: float = 1.0) -> list[torch.Tensor]:
    """q, k, v and a gradient, (B, H, T, K), as a model has them: views of one tensor, tokens before heads."""
    torch.manual_seed(length)
    qkvg = torch.randn(batch, length, 4, num_heads, 8).bfloat16().float() * size
    return list(qkvg.permute(2, 0, 3, 1, 4).unbind(0))


def definition(q, k, v, grad, row) -> list[torch.Tensor]:
    """Output and gradients of q, k, v in float64, from the definition."""
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    scores = leaves[0] @ leaves[1].mT * q.shape[-1] ** -0.5 + row.double()[:, None]
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    out = scores.masked_fill(hidden, -math.inf).softmax(-1) @ leaves[2]
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.double())]


def attend(q, k, v, grad, row) -> list[torch.Tensor]:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = key_bias.attend_key_bias(*leaves, row)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def heads_in_blocks(q, k, row) -> int:
    length = q.shape[2]
    return sum(key_bias._blocks(reach, length) is not None for reach in key_bias.reaches(q, k, row).tolist())


@pytest.mark.parametrize("dtype", BUDGET)
@pytest.mark.parametrize("length", [257, 384, 449, 700, 1025])
@pytest.mark.parametrize("num_heads", [1, 3, 6, 8])
def test_equal_to_the_definition(num_heads, length, dtype):
    q, k, v, grad = draw(num_heads, length)
    row = alibi_row(num_heads, length)
    # One head alone has the slope of the gentlest of eight: no block of it would save anything.
    assert heads_in_blocks(q, k, row) >= (num_heads > 1 and length > 300)
    actual = attend(*(x.to(dtype) for x in (q, k, v, grad)), row)
    assert_within(actual, definition(q, k, v, grad, row), BUDGET[dtype] + length * 6e-8)


@pytest.mark.parametrize("reach", [1, 64, 65, 250, 257, 384, 500, 513, 700])
def test_blocks_of_every_size_equal_the_definition(monkeypatch, reach):
    """The reach is given and the keys past it do weigh nothing: slope 1, and scores that are small."""
    monkeypatch.setattr(key_bias, "WORTHWHILE", 10)
    monkeypatch.setattr(key_bias, "reaches", lambda q, k, row: torch.tensor([reach, 1100, 1000]))
    q, k, v, grad = draw(3, 1100, size=0.01)
    row = torch.tensor([1.0 if reach > 1 else 30.0, 1.0, 1.0])[:, None] * (torch.arange(1100) - 550)
    assert key_bias._blocks(reach, 1100) is not None and key_bias._blocks(1100, 1100) is None
    assert_within(attend(q, k, v, grad, row), definition(q, k, v, grad, row), 1e-4)


@pytest.mark.parametrize("size", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("num_heads", [4, 6])
@pytest.mark.parametrize("opposed", [False, True])
def test_what_lies_past_the_reach_weighs_less_than_float32_rounds_away(size, num_heads, opposed):
    length = 600
    q, k, _, _ = draw(num_heads, length, size=size)
    if opposed:  # every query shuns its own key and seeks the early ones
        q[:], k[:, :, :300], k[:, :, 300:] = size, size, -size
    row = alibi_row(num_heads, length)
    reach = key_bias.reaches(q, k, row)
    weights = (q.double() @ k.double().mT * 8**-0.5 + row.double()[:, None]).tril()
    weights = weights.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -math.inf).softmax(-1)
    distance = torch.arange(length)[:, None] - torch.arange(length)
    for head in range(num_heads):
        past = (weights[:, head] * (distance >= reach[head])).sum(-1)
        assert past.max() <= 2.0**-25
    assert reach.min() < length  # and the steepest head does leave keys out


def test_the_reach_is_what_the_formula_says():
    """q = 0 makes every score 0: the far keys' weight is a geometric series over the query's own 1."""
    q = torch.zeros(1, 2, 500, 8)
    row = torch.tensor([0.5, 0.25])[:, None] * torch.arange(500)
    reach = key_bias.reaches(q, torch.randn(1, 2, 500, 8), row).tolist()
    for slope, found in zip((0.5, 0.25), reach, strict=True):
        total = [sum(math.exp(-slope * d) for d in range(start, 2000)) for start in (found - 1, found)]
        assert total[0] > 2.0**-25 >= total[1]


def test_one_far_key_of_great_weight_keeps_its_place():
    """A key whose score outweighs any distance: the bound sees its norm, so nothing is left out."""
    length = 600
    q, k, v, grad = draw(2, length)
    q[:] = q.abs()
    k[:, 0, 3] = 200.0
    row = torch.tensor([0.5, 0.25])[:, None] * (torch.arange(length) - 300)
    reach = key_bias.reaches(q, k, row)
    assert reach[0] == length and reach[1] < length
    expected = definition(q, k, v, grad, row)
    assert (expected[0][:, 0, 5:200] - v[:, 0, 3:4].double()).abs().max() < 1e-3  # they all look at it
    assert_within(attend(q, k, v, grad, row), expected, 1e-4)


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(-0.5 * torch.arange(600.0), id="falling"),
        pytest.param(torch.zeros(600), id="flat"),
        pytest.param(torch.arange(600.0) ** 2 / 600, id="curved"),
        pytest.param(0.5 * torch.cat([torch.arange(300.0), torch.arange(301.0, 601.0)]), id="gap in positions"),
    ],
)
def test_other_rows_leave_nothing_out(row):
    q, k, v, grad = draw(1, 600)
    assert key_bias.reaches(q, k, row[None]).tolist() == [600]
    assert_within(attend(q, k, v, grad, row[None]), definition(q, k, v, grad, row[None]), 5e-5)


def test_not_a_number_is_passed_on():
    q, k, v, _ = draw(2, 600)
    k[0, 0, 400, 0] = math.nan
    row = alibi_row(2, 600)
    assert key_bias.reaches(q, k, row)[0] == 600
    out = key_bias.attend_key_bias(q, k, v, row)
    assert out[0, 0, 400:].isnan().all() and out[:, 1].isfinite().all()


@pytest.mark.parametrize("reach", [1, 63, 64, 200, 300, 1000, 3000, 5000])
@pytest.mark.parametrize("length", [128, 500, 4096, 16384])
def test_blocks_cover_every_row_once_with_all_keys_in_reach(reach, length):
    plan = key_bias._blocks(reach, length)
    if plan is None:
        return
    first, block, seen = plan
    assert (length - first) % block == 0 and seen % block == 0
    assert reach <= seen <= first <= length


def test_memory_is_linear_inside_the_operators():
    length = 3000
    q, k, v, grad = draw(8, length, batch=1)
    row = alibi_row(8, length)
    with LargestTensor() as seen:
        saved = key_bias.forward(q, k, v, row)
        key_bias.backward(grad, q, k, v, row, *saved)
    assert 0 < seen.elements < length * length // 4


def test_a_compiler_sees_the_operators_as_they_are():
    q, k, v, grad = draw(8, 600)
    row = alibi_row(8, 600)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(key_bias._operator, (*leaves, row))
    saved = key_bias.forward(q, k, v, row)
    torch.library.opcheck(key_bias._operator_backward, (grad, q, k, v, row, *saved))


def test_the_documented_share_of_the_triangle():
    """docs/speed.md says what eight heads compute with a bound of 20."""

    def share(length: int) -> float:
        whole = length * (length + 256) / 2
        computed = 0.0
        for slope in alibi_slopes(8):
            reach = math.ceil((20 + key_bias.NEGLIGIBLE - math.log1p(-math.exp(-slope))) / slope)
            plan = key_bias._blocks(min(length, reach), length)
            if plan is None:
                computed += whole
            else:
                first, block, seen_before = plan
                computed += first * (first + 64) / 2 + (length - first) * (seen_before + block)
        return computed / 8 / whole

    text = " ".join((Path(__file__).resolve().parents[2] / "docs" / "speed.md").read_text().split())
    assert (
        f"blocks compute {share(4096):.2f} of the triangle's scores at 4,096 tokens, {share(16384):.2f} at 16,384"
        in text
    )
