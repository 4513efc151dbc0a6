"""Optimizers and learning-rate schedules.

A schedule is a function of the step number alone, so that nothing about it has to be saved. Steps are counted
from 0: the first update uses lr(0).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from alibi_lm.settings import require, require_at_least


@dataclass
class AdamWConfig:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv 1711.05101)."""

    name: str = "adamw"
    lr: float = 1e-3
    """Peak learning rate; the schedule scales it."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """Decay rates of the running means of the gradient and of its square."""
    eps: float = 1e-8
    """Added to the root of the mean square, in the denominator."""
    weight_decay: float = 0.1
    """Decoupled decay of the linear layers' weights; see `build_optimizer`."""

    def __post_init__(self) -> None:
        _check_lr(self.lr)
        require(
            len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas),
            f"optimizer.betas = {self.betas}. Give two numbers in [0, 1), like [0.9, 0.95].",
        )
        require(self.eps > 0, f"optimizer.eps = {self.eps}. Use a number > 0.")
        require(self.weight_decay >= 0, f"optimizer.weight_decay = {self.weight_decay}. Use a number >= 0.")


@dataclass
class NAGConfig:
    """Nesterov's accelerated gradient in fairseq's form, the optimizer of the paper's WikiText-103 models."""

    name: str = "nag"
    lr: float = 1.0
    """Peak learning rate; the schedule scales it."""
    momentum: float = 0.99
    """Share of the velocity that is kept, in [0, 1)."""
    weight_decay: float = 0.0
    """Decoupled decay of all parameters."""

    def __post_init__(self) -> None:
        _check_lr(self.lr)
        require(0 <= self.momentum < 1, f"optimizer.momentum = {self.momentum}. Allowed: [0, 1).")
        require(self.weight_decay >= 0, f"optimizer.weight_decay = {self.weight_decay}. Use a number >= 0.")


OPTIMIZERS: dict[str, type] = {"adamw": AdamWConfig, "nag": NAGConfig}


class FairseqNAG(torch.optim.Optimizer):
    """Nesterov momentum with the correction for a moving learning rate (fairseq, optim/nag.py).

    With velocity v, gradient g, momentum m, and c = lr / (lr of the update before; the first time c = 1):

        p <- (1 - lr * weight_decay) p + m^2 c v - (1 + m) lr g
        v <- m c v - lr g

    The velocity holds the learning rate of its time, and c rescales it to the present one. `previous_lr` is
    kept in the parameter groups, so the optimizer's state dict carries it.
    """

    def __init__(self, params: Any, lr: float, momentum: float, weight_decay: float = 0.0) -> None:
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "previous_lr": None}
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. `closure` is not supported."""
        assert closure is None
        for group in self.param_groups:
            lr, momentum = float(group["lr"]), group["momentum"]
            previous = lr if group["previous_lr"] is None else group["previous_lr"]
            # A rate of exactly 0 leaves nothing to rescale by; fairseq then takes the new rate as factor.
            correction = lr / previous if previous > 0 else lr
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                grads = [p.grad for p in params if p.grad is not None]
                velocities = [self._velocity(p) for p in params]
                if group["weight_decay"] != 0:
                    torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
                torch._foreach_add_(params, velocities, alpha=momentum * momentum * correction)
                torch._foreach_add_(params, grads, alpha=-(1 + momentum) * lr)
                torch._foreach_mul_(velocities, momentum * correction)
                torch._foreach_add_(velocities, grads, alpha=-lr)
            group["previous_lr"] = lr

    def _velocity(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]


def build_optimizer(config: AdamWConfig | NAGConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a model's parameters.

    With AdamW, weight decay acts on the weight of every `nn.Linear` and on nothing else: not on biases and
    norms, and not on tables that are looked up (word vectors, learned positions, T5 biases) or on slopes,
    where decay would pull entries to zero that a batch did not use. NAG decays all parameters, as fairseq does.
    """
    if isinstance(config, NAGConfig):
        return FairseqNAG(model.parameters(), config.lr, config.momentum, config.weight_decay)
    decayed = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    # A table that is also an output layer's weight (tied) stays a table.
    decayed -= {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if id(p) in decayed], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if id(p) not in decayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
        fused=True,
    )


@dataclass
class CosineConfig:
    """Linear warm-up from 0, then half a cosine wave down to a share of the peak at the run's end."""

    name: str = "cosine"
    warmup_steps: int = 100
    """Steps until the peak is reached; step n < warmup_steps uses (n + 1) / warmup_steps of it."""
    min_lr_ratio: float = 0.1
    """Share of the peak at the end, in [0, 1]."""

    def __post_init__(self) -> None:
        _check_warmup(self.warmup_steps)
        require(0 <= self.min_lr_ratio <= 1, f"schedule.min_lr_ratio = {self.min_lr_ratio}. Allowed: [0, 1].")

    def lr(self, step: int, total_steps: int, peak_lr: float) -> float:
        """Learning rate of an update.

        Args:
            step: number of the update, from 0.
            total_steps: steps of the run.
            peak_lr: the optimizer's lr.
        """
        if step < self.warmup_steps:
            return peak_lr * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps)
        wave = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return peak_lr * (self.min_lr_ratio + (1 - self.min_lr_ratio) * wave)


@dataclass
class ConstantConfig:
    """Linear warm-up from 0, then the peak to the end."""

    name: str = "constant"
    warmup_steps: int = 0
    """Steps until the peak is reached; step n < warmup_steps uses (n + 1) / warmup_steps of it."""

    def __post_init__(self) -> None:
        _check_warmup(self.warmup_steps)

    def lr(self, step: int, total_steps: int, peak_lr: float) -> float:
        """Learning rate of an update; see `CosineConfig.lr`."""
        return peak_lr * min(1.0, (step + 1) / max(1, self.warmup_steps))


@dataclass
class FairseqCosineConfig:
    """fairseq's cosine schedule with warm restarts (Loshchilov & Hutter 2017, arXiv 1608.03983).

    Warm-up is linear from warmup_init_lr, which the very first update uses, to the peak at step warmup_steps.
    Period i (from 0) is t_mult^i * period_steps long and goes from shrink^i times the peak down to shrink^i
    times min_lr. The paper's runs end with their first period.
    """

    name: str = "fairseq_cosine"
    warmup_steps: int = 16000
    """Updates of the warm-up."""
    warmup_init_lr: float = 1e-7
    """Learning rate of the first update, where there is a warm-up."""
    period_steps: int | None = None
    """Updates of the first period; null: all that follow the warm-up."""
    t_mult: float = 1.0
    """Each period is this many times as long as the one before, >= 1."""
    shrink: float = 1.0
    """Each period's rates are this many times those of the one before, in (0, 1]."""
    min_lr: float = 1e-4
    """Learning rate at the end of the first period, at most the optimizer's lr."""

    def __post_init__(self) -> None:
        _check_warmup(self.warmup_steps)
        for name in ("warmup_init_lr", "min_lr"):
            require(getattr(self, name) >= 0, f"schedule.{name} = {getattr(self, name)}. Use a number >= 0.")
        require(
            self.period_steps is None or self.period_steps >= 1,
            f"schedule.period_steps = {self.period_steps}. Use a whole number >= 1, or null for one period.",
        )
        require(self.t_mult >= 1, f"schedule.t_mult = {self.t_mult}. Use a number >= 1.")
        require(0 < self.shrink <= 1, f"schedule.shrink = {self.shrink}. Allowed: (0, 1].")

    def lr(self, step: int, total_steps: int, peak_lr: float) -> float:
        """Learning rate of an update; see `CosineConfig.lr`.

        Raises:
            ValueError: min_lr is above the peak.
        """
        if self.min_lr > peak_lr:
            raise ValueError(
                f"schedule.min_lr = {self.min_lr} is above optimizer.lr = {peak_lr}. "
                "Lower schedule.min_lr: it is where the cosine ends."
            )
        if step < self.warmup_steps:
            return self.warmup_init_lr + step * (peak_lr - self.warmup_init_lr) / self.warmup_steps
        period: float = self.period_steps or max(1, total_steps - self.warmup_steps)
        # Periods are subtracted one by one: the closed form's logarithm can fall on either side of a border.
        since, shrink = float(step - self.warmup_steps), 1.0
        while since >= period:
            since, period, shrink = since - period, period * self.t_mult, shrink * self.shrink
        wave = 0.5 * (1 + math.cos(math.pi * since / period))
        return shrink * (self.min_lr + (peak_lr - self.min_lr) * wave)


@dataclass
class LinearConfig:
    """Linear warm-up from 0, then linear down to 0 at the run's end."""

    name: str = "linear"
    warmup_steps: int = 0
    """Steps until the peak is reached; step n < warmup_steps uses (n + 1) / warmup_steps of it."""

    def __post_init__(self) -> None:
        _check_warmup(self.warmup_steps)

    def lr(self, step: int, total_steps: int, peak_lr: float) -> float:
        """Learning rate of an update; see `CosineConfig.lr`."""
        if step < self.warmup_steps:
            return peak_lr * (step + 1) / self.warmup_steps
        return peak_lr * max(0.0, (total_steps - step) / max(1, total_steps - self.warmup_steps))


SCHEDULES: dict[str, type] = {
    "cosine": CosineConfig,
    "constant": ConstantConfig,
    "fairseq_cosine": FairseqCosineConfig,
    "linear": LinearConfig,
}


def _check_lr(lr: float) -> None:
    require(0 < lr < math.inf, f"optimizer.lr = {lr}. Use a finite number > 0.")


def _check_warmup(steps: int) -> None:
    require_at_least("schedule.warmup_steps", steps, 0)
