"""Optimizers against independent arithmetic, schedules against hand-computed values."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from alibi_lm.model.transformer import ModelConfig, TransformerLM
from alibi_lm.optim import (
    AdamWConfig,
    ConstantConfig,
    CosineConfig,
    FairseqCosineConfig,
    FairseqNAG,
    LinearConfig,
    NAGConfig,
    build_optimizer,
)
from alibi_lm.positions import POSITIONS

PAPER = FairseqCosineConfig(period_steps=270_000, t_mult=2.0, shrink=0.75)


# -- NAG -----------------------------------------------------------------------------------------------------


def test_nag_with_a_constant_rate_is_nesterov_sgd() -> None:
    torch.manual_seed(0)
    ours, theirs = nn.Linear(5, 3).double(), nn.Linear(5, 3).double()
    theirs.load_state_dict(ours.state_dict())
    optimizers = [
        FairseqNAG(ours.parameters(), lr=0.1, momentum=0.9),
        torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, nesterov=True),
    ]
    for _ in range(10):
        x = torch.randn(4, 5, dtype=torch.float64)
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            model(x).pow(2).sum().backward()
            optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(ours.bias, theirs.bias, rtol=1e-12, atol=1e-14)


def test_nag_rescales_the_velocity_when_the_rate_moves() -> None:
    """One parameter, written out: p, v in Python floats."""
    momentum, decay = 0.99, 0.1
    parameter = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer = FairseqNAG([parameter], lr=1.0, momentum=momentum, weight_decay=decay)
    p, v, previous = 2.0, 0.0, None
    for lr, g in [(1e-7, 0.3), (0.25, -1.0), (0.5, 0.7), (0.1, 0.2), (0.75, -0.4)]:
        optimizer.param_groups[0]["lr"] = lr
        parameter.grad = torch.tensor([g], dtype=torch.float64)
        optimizer.step()
        c = 1.0 if previous is None else lr / previous
        p = p * (1 - lr * decay) + momentum * momentum * c * v - (1 + momentum) * lr * g
        v = momentum * c * v - lr * g
        previous = lr
        assert parameter.item() == pytest.approx(p, rel=1e-12)
        assert optimizer.state[parameter]["momentum_buffer"].item() == pytest.approx(v, rel=1e-12)


def test_nag_continues_exactly_from_its_state_dict() -> None:
    def build() -> tuple[nn.Parameter, torch.optim.Optimizer]:
        parameter = nn.Parameter(torch.tensor([1.0, -1.0]))
        return parameter, FairseqNAG([parameter], lr=1.0, momentum=0.99)

    def update(parameter: nn.Parameter, optimizer: torch.optim.Optimizer, step: int) -> None:
        optimizer.param_groups[0]["lr"] = 0.1 * (step + 1)
        parameter.grad = torch.tensor([1.0, 2.0]) / (step + 1)
        optimizer.step()

    whole, optimizer = build()
    for step in range(6):
        update(whole, optimizer, step)
    first, optimizer = build()
    for step in range(3):
        update(first, optimizer, step)
    second, resumed = build()
    second.data.copy_(first.data)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(3, 6):
        update(second, resumed, step)
    assert torch.equal(second, whole)


def test_nag_leaves_parameters_without_gradient_alone() -> None:
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = FairseqNAG([used, unused], lr=0.5, momentum=0.9, weight_decay=0.1)
    used.grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(unused, torch.ones(2))
    assert used[0].item() == pytest.approx(0.95 - 1.9 * 0.5)


# -- build_optimizer -----------------------------------------------------------------------------------------


def tiny(position: str, **settings: object) -> TransformerLM:
    config = ModelConfig(num_layers=1, model_dim=16, num_heads=2, ffn_dim=16, **settings)
    return TransformerLM(config, POSITIONS[position](), "eager", vocab_size=40, train_length=8)


@pytest.mark.parametrize("position", sorted(POSITIONS))
@pytest.mark.parametrize("cutoffs", [[], [10, 20]])
def test_adamw_decays_the_weights_of_linear_layers_only(position: str, cutoffs: list[int]) -> None:
    model = tiny(position, adaptive_cutoffs=cutoffs, adaptive_factor=2.0)
    optimizer = build_optimizer(AdamWConfig(weight_decay=0.3), model)
    decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] == 0.3 for p in g["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in decayed}
    layers = ("attention.qkv", "attention.out", "ffn.up", "ffn.down")
    assert names == {f"blocks.0.{layer}.weight" for layer in layers}
    everything = [id(p) for g in optimizer.param_groups for p in g["params"]]
    assert sorted(everything) == sorted(id(p) for p in model.parameters())
    assert {g["weight_decay"] for g in optimizer.param_groups} == {0.3, 0.0}


def test_adamw_does_not_decay_a_tied_table() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(5, 4), "output": nn.Linear(4, 5, bias=False)})
    model["output"].weight = model["table"].weight
    optimizer = build_optimizer(AdamWConfig(), model)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.0]


def test_settings_reach_the_optimizers() -> None:
    model = nn.Linear(2, 2)
    adamw = build_optimizer(AdamWConfig(lr=0.5, betas=[0.1, 0.2], eps=0.3), model)
    assert isinstance(adamw, torch.optim.AdamW)
    assert all((g["lr"], g["betas"], g["eps"]) == (0.5, (0.1, 0.2), 0.3) for g in adamw.param_groups)
    nag = build_optimizer(NAGConfig(lr=0.5, momentum=0.7, weight_decay=0.1), model)
    assert isinstance(nag, FairseqNAG)
    (group,) = nag.param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.5, 0.7, 0.1)
    assert len(group["params"]) == 2


# -- schedules -----------------------------------------------------------------------------------------------


def test_cosine() -> None:
    schedule = CosineConfig(warmup_steps=4, min_lr_ratio=0.1)
    rates = [schedule.lr(step, 12, 2.0) for step in range(12)]
    assert rates[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    assert rates[8] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))  # half way down
    assert schedule.lr(12, 12, 2.0) == pytest.approx(0.2)
    assert schedule.lr(500, 12, 2.0) == pytest.approx(0.2)
    assert all(a > b for a, b in pairwise(rates[4:]))
    assert CosineConfig(warmup_steps=0).lr(0, 10, 3.0) == 3.0
    assert CosineConfig(warmup_steps=10).lr(4, 5, 1.0) == 0.5  # a run shorter than its warm-up


def test_constant() -> None:
    assert [ConstantConfig(warmup_steps=2).lr(step, 5, 3.0) for step in range(4)] == [1.5, 3.0, 3.0, 3.0]
    assert ConstantConfig().lr(0, 5, 3.0) == 3.0


def test_fairseq_cosine_of_the_paper() -> None:
    """286,000 updates: warm-up from 1e-7 over 16,000, then exactly one period of 270,000."""
    assert PAPER.lr(0, 286_000, 1.0) == 1e-7
    assert PAPER.lr(8_000, 286_000, 1.0) == pytest.approx((1 + 1e-7) / 2)
    assert PAPER.lr(16_000, 286_000, 1.0) == 1.0
    assert PAPER.lr(16_000 + 135_000, 286_000, 1.0) == pytest.approx(0.5 * (1 + 1e-4))
    last = 0.5 * (1 - 1e-4) * (1 + math.cos(math.pi * 269_999 / 270_000)) + 1e-4
    assert PAPER.lr(285_999, 286_000, 1.0) == pytest.approx(last, rel=1e-12)
    assert FairseqCosineConfig().lr(285_999, 286_000, 1.0) == pytest.approx(last, rel=1e-12)


def test_fairseq_cosine_restarts() -> None:
    schedule = FairseqCosineConfig(warmup_steps=4, period_steps=8, t_mult=2.0, shrink=0.75)

    def rate(step: int) -> float:
        return schedule.lr(step, 100, 1.0)

    assert rate(11) == pytest.approx(1e-4 + 0.5 * (1 - 1e-4) * (1 + math.cos(math.pi * 7 / 8)))
    assert rate(12) == pytest.approx(0.75)  # the second period, 16 long
    assert rate(20) == pytest.approx(0.75 * 0.5 * (1 + 1e-4))
    assert rate(27) < 0.02
    assert rate(28) == pytest.approx(0.75**2)  # the third, 32 long
    assert rate(60) == pytest.approx(0.75**3)


def test_fairseq_cosine_with_periods_of_equal_length() -> None:
    schedule = FairseqCosineConfig(warmup_steps=0, period_steps=10, shrink=0.5, min_lr=0.0)
    assert [schedule.lr(step, 30, 1.0) for step in (0, 10, 20)] == [1.0, 0.5, 0.25]
    assert schedule.lr(5, 30, 1.0) == pytest.approx(0.5)


def test_borders_of_periods_that_a_logarithm_would_miss() -> None:
    schedule = FairseqCosineConfig(warmup_steps=0, period_steps=2, t_mult=3.0, shrink=0.5, min_lr=0.0)
    for period in range(1, 9):
        start = (3**period - 1) // 2 * 2
        assert schedule.lr(start, 0, 1.0) == 0.5**period
        assert schedule.lr(start - 1, 0, 1.0) < 0.5 ** (period - 1) / 2 + 1e-9


def test_a_peak_below_the_end_of_the_cosine_is_refused() -> None:
    with pytest.raises(ValueError, match=r"schedule\.min_lr = 0\.0001 is above optimizer\.lr = 1e-05"):
        FairseqCosineConfig().lr(0, 10, 1e-5)


def test_linear_rises_to_the_peak_and_falls_to_zero() -> None:
    rates = [LinearConfig(warmup_steps=4).lr(step, 10, 2.0) for step in range(11)]
    assert rates == pytest.approx([0.5, 1.0, 1.5, 2.0, *(2 * left / 6 for left in range(6, -1, -1))])
    assert [LinearConfig().lr(step, 2, 3.0) for step in range(3)] == [3.0, 1.5, 0.0]
    assert LinearConfig(warmup_steps=5).lr(5, 5, 1.0) == 0.0
