"""What is measured: language models of the same sizes, with a step of training and a pass of evaluation.

All of them see the same tokens. Peers train with the same optimizer and clipping as our schemes; their own code
computes model and loss.
"""

from __future__ import annotations

import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from alibi_lm import runtime
from alibi_lm.bench.config import BenchConfig
from alibi_lm.bench.timing import matmul_speeds, timed
from alibi_lm.model.transformer import CompiledNats, ModelConfig, TransformerLM
from alibi_lm.optim import AdamWConfig, build_optimizer
from alibi_lm.positions import POSITIONS

OURS = "ours"
"""Name of this package among the implementations."""
Loss = Callable[[Tensor, Tensor], Tensor]
"""(inputs (B, T), targets (B, T)) -> mean nats per token, or the like."""


@dataclass(frozen=True)
class Task:
    """One training step, if `trains`, and one evaluation, of `batch` sequences of `length` random tokens."""

    batch: int
    length: int
    vocab_size: int
    trains: bool
    clock: str
    """See `BenchConfig.clock`."""
    first: bool
    """Whether this task is new to the subject: compile before, and measure memory."""

    def tokens(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Inputs and targets, each (B, T) int64; the same at every call."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, self.vocab_size, (self.batch, self.length + 1), generator=generator).to(device)
        return ids[:, :-1], ids[:, 1:]


@dataclass(frozen=True)
class Measurement:
    """Of one task: seconds, None where it is not measured or out of memory; bytes, where it was the first."""

    train: float | None
    evaluate: float | None
    flops_per_second: float | None = None
    """Of a large matrix product right before and after the training step, in its precision."""
    peak_memory_bytes: int | None = None


@dataclass
class Implementation(ABC):
    """One implementation of one scheme, wherever it runs."""

    implementation: str
    position: str
    backend: str
    compiled: bool
    device: torch.device
    precision: str
    """Of training."""
    flushes_denormals: bool
    """See `runtime.start`."""

    @property
    def ours(self) -> bool:
        """Whether it is this package."""
        return self.implementation == OURS

    @property
    def label(self) -> str:
        """Name in the table."""
        return f"{self.implementation} {self.position}" + (" compiled" if self.compiled else "")

    @property
    @abstractmethod
    def num_parameters(self) -> int:
        """Trained numbers."""

    @abstractmethod
    def measure(self, task: Task) -> Measurement:
        """Do a task and time it."""


@dataclass
class Subject(Implementation):
    """An implementation in this process."""

    module: nn.Module
    loss: Loss
    optimizer: torch.optim.Optimizer
    evaluates_in: str = "float32"

    @property
    def num_parameters(self) -> int:
        """Trained numbers."""
        return sum(p.numel() for p in self.module.parameters())

    def measure(self, task: Task) -> Measurement:
        """Do a task and time it."""
        inputs, targets = task.tokens(self.device)
        if task.first and task.trains and self.compiled:
            self.train_step(inputs, targets)  # compiles, which may take as long as a thousand steps
        train = evaluate = speed = None
        # The products lie outside of what memory is measured in.
        speeds = matmul_speeds(self.device, self.precision, task.clock) if task.trains else []
        before = runtime.reset_peak_memory(self.device) if task.first else 0
        if task.first and task.trains and self.ours:
            self.train_step(inputs, targets)  # makes the memory that later steps find (see runtime.start)
        if task.trains:
            train = timed(self.device, partial(self.train_step, inputs, targets), task.clock)
        evaluate = timed(self.device, partial(self.evaluate, inputs, targets), task.clock)
        peak = runtime.peak_memory_bytes(self.device) if task.first else None
        if task.trains:
            speed = statistics.median(speeds + matmul_speeds(self.device, self.precision, task.clock))
        if peak is not None:
            # A first step allocates the optimizer's means; count state once, as parameters plus step.
            peak = max(0, peak - before) + self.state_bytes() // 4
        return Measurement(train, evaluate, speed, peak)

    def train_step(self, inputs: Tensor, targets: Tensor) -> None:
        """Forward, backward, clipping, update."""
        self.module.train()
        with runtime.autocast(self.device, self.precision):
            loss = self.loss(inputs, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @torch.inference_mode()
    def evaluate(self, inputs: Tensor, targets: Tensor) -> None:
        """Loss of the tokens, without gradients."""
        self.module.eval()
        with runtime.autocast(self.device, self.evaluates_in):
            self.loss(inputs, targets)

    def state_bytes(self) -> int:
        """Memory of parameters, their gradients and the optimizer's two means."""
        return 4 * sum(p.numel() * p.element_size() for p in self.module.parameters())


def ours(config: BenchConfig, sizes: ModelConfig, vocab_size: int, device: torch.device) -> Iterator[Subject]:
    """Our schemes, `none` first."""
    longest = max([*config.lengths, *(config.eval_lengths or [])])
    names = ["none", *(name for name in config.positions if name != "none")]
    for compiled in (False, True) if config.compile else (False,):
        for backend in config.backends:
            for name in names:
                torch.manual_seed(0)
                model = TransformerLM(
                    sizes, POSITIONS[name](), backend, vocab_size, max(config.lengths or [longest]), longest
                ).to(device)
                optimizer = build_optimizer(AdamWConfig(), model)
                nats = CompiledNats(model) if compiled else model.nats

                def loss(
                    inputs: Tensor, targets: Tensor, nats: Any = nats, model: TransformerLM = model
                ) -> Tensor:
                    # As in training and evaluation: only the training step is ever compiled.
                    return (nats if model.training else model.nats)(inputs, targets).mean()

                backend_name = model.backend.name
                yield Subject(
                    OURS, name, backend_name, compiled, device, config.precision, True, model, loss, optimizer
                )
