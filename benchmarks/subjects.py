"""What is measured: language models of the same sizes, with a step of training and a pass of evaluation.

All of them get the same tokens. Other libraries' models train with the same optimizer and clipping as ours; their
own code computes model and loss. The benchmark uses `alibi_lm`'s models only in this file.
"""

from __future__ import annotations

import functools
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from alibi_lm import runtime
from alibi_lm.model.compiled import CompiledNats
from alibi_lm.model.transformer import ModelConfig, TransformerLM
from alibi_lm.optim import AdamWConfig, build_optimizer
from alibi_lm.positions import POSITIONS

OURS = "ours"
"""Name of this package among the implementations."""
Kind = Literal["train", "eval"]
Loss = Callable[[Tensor, Tensor], Tensor]
"""(inputs (B, T), targets (B, T)) -> mean nats per token, or a similar loss."""


class CannotRun(Exception):
    """An implementation cannot do a task: out of memory, or refused by its own code."""


@dataclass(frozen=True)
class Setup:
    """What all implementations of a benchmark have in common."""

    sizes: ModelConfig
    vocab_size: int
    train_length: int
    """Tokens of the longest sequence in training."""
    longest: int
    """Tokens of the longest sequence in training or evaluation."""
    device: torch.device
    precision: str
    """Dtype of training: float32 or bfloat16. Evaluation is in float32."""
    clock: str = "wall"
    """See `BenchConfig.clock`."""
    positions: tuple[str, ...] = ()
    """The schemes of ours that are measured."""


@dataclass(frozen=True)
class Task:
    """Steps on `batch` sequences of `length` tokens; only evaluation unless `trains`."""

    batch: int
    length: int
    trains: bool = True


@functools.lru_cache(maxsize=2)
def words(batch: int, length: int, vocab_size: int) -> Tensor:
    """Words drawn with frequencies as in a text: (batch, length) int64, the same at every call.

    Word r (from 1) has a probability proportional to (r + 10)^-1.3 (Zipf's law in Mandelbrot's form). Of 267,744
    words, the first 20,000 then make up 0.94 of the text and those after the first 60,000 make up 0.03, as in
    WikiText-103 (0.93 and 0.02): an adaptive vocabulary computes 27,000 scores per token. It would compute 187,000
    if all words were equally likely.
    """
    weights = (torch.arange(1, vocab_size + 1, dtype=torch.float64) + 10) ** -1.3
    cumulative = weights.cumsum(0) / weights.sum()
    uniform = torch.rand(batch, length, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return torch.searchsorted(cumulative, uniform).clamp_(max=vocab_size - 1)


def label(described: Mapping[str, Any]) -> str:
    """Name in tables and messages, from the fields of an `Implementation` or of a result row."""
    name = f"{described['implementation']} {described['position']}" + " compiled" * described["compiled"]
    return name if described["backend"] == "its own" else f"{name} ({described['backend']})"


@dataclass(kw_only=True)
class Implementation(ABC):
    """One implementation of one scheme, in this or another process."""

    implementation: str
    position: str
    backend: str = "its own"
    compiled: bool = False
    flushes_denormals: bool
    """See `runtime.start`."""
    parameters: int
    """Number of trained parameters."""
    ready: dict[int, bool] = field(default_factory=dict)
    """Lengths that it is prepared for, and whether it can train at them."""
    peak_memory_bytes: dict[int, int | None] = field(default_factory=dict)
    """Peak memory in bytes by length, from `prepare`."""

    @property
    def label(self) -> str:
        """Name in messages."""
        return label(vars(self))

    @abstractmethod
    def prepare(self, task: Task) -> int | None:
        """Compile, fill caches and the allocator, without being timed.

        Returns:
            Peak memory of a step, in bytes: parameters and the optimizer's state, which exist before it, and what
            the step adds. None if the system does not say.

        Raises:
            CannotRun: out of memory, or refused.
        """

    @abstractmethod
    def seconds(self, kind: Kind, task: Task) -> float:
        """Do one step and return its seconds; nothing else computes meanwhile.

        Raises:
            CannotRun: out of memory, or refused.
        """

    @abstractmethod
    def release(self) -> None:
        """Free the GPU's memory for others until `prepare` is called again."""


@dataclass(kw_only=True)
class Subject(Implementation):
    """An implementation in this process."""

    setup: Setup
    module: nn.Module
    loss: Loss
    optimizer: torch.optim.Optimizer

    def prepare(self, task: Task) -> int | None:
        self.module.to(self.setup.device)
        if task.trains and not self.optimizer.state:
            self.seconds("train", replace(task, batch=1, length=min(8, task.length)))
        if task.trains and self.compiled:
            self.seconds("train", task)
        held: list[Tensor] = [*self.module.parameters()]
        held += [t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        before = runtime.reset_peak_memory(self.setup.device)
        if task.trains:
            self.seconds("train", task)
        self.seconds("eval", task)
        peak = runtime.peak_memory_bytes(self.setup.device)
        return None if peak is None else max(0, peak - before) + sum(t.numel() * t.element_size() for t in held)

    def seconds(self, kind: Kind, task: Task) -> float:
        step = self.train_step if kind == "train" else self.evaluate
        ids = words(task.batch, task.length + 1, self.setup.vocab_size).to(self.setup.device)
        try:
            return timed(self.setup, lambda: step(ids[:, :-1], ids[:, 1:]))
        except torch.OutOfMemoryError:
            self.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            raise CannotRun("out of memory") from None
        except (ValueError, NotImplementedError) as error:
            raise CannotRun(str(error)) from None

    def release(self) -> None:
        if self.setup.device.type == "cuda":
            self.ready.clear()
            self.optimizer.state.clear()
            self.module.to("cpu")
            torch.cuda.empty_cache()

    def train_step(self, inputs: Tensor, targets: Tensor) -> None:
        """Forward, backward, clipping, update."""
        self.module.train()
        with runtime.autocast(self.setup.device, self.setup.precision):
            loss = self.loss(inputs, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @torch.inference_mode()
    def evaluate(self, inputs: Tensor, targets: Tensor) -> None:
        """Loss of the tokens, without gradients."""
        self.module.eval()
        self.loss(inputs, targets)


def ours(setup: Setup, positions: Sequence[str], backends: Sequence[str], compile: bool) -> list[Subject]:
    """Our schemes with each backend; `none`, the reference, comes first. On a GPU they wait in host memory.

    Args:
        setup: sizes and other common settings.
        positions: schemes; `none` is added.
        backends: attention backends.
        compile: whether each is also measured compiled.
    """
    subjects = []
    schemes = ["none", *(name for name in positions if name != "none")]
    for compiled in (False, True) if compile else (False,):
        for backend in backends:
            for name in schemes:
                torch.manual_seed(0)
                position = POSITIONS[name]()
                model = TransformerLM(
                    setup.sizes, position, backend, setup.vocab_size, setup.train_length, setup.longest
                )
                subjects.append(
                    Subject(
                        implementation=OURS,
                        position=name,
                        backend=model.backend.name,
                        compiled=compiled,
                        flushes_denormals=True,
                        parameters=model.num_parameters(),
                        setup=setup,
                        module=model,
                        loss=_mean_nats(model, compiled),
                        optimizer=build_optimizer(AdamWConfig(), model),
                    )
                )
    return subjects


def _mean_nats(model: TransformerLM, compiled: bool) -> Loss:
    """The loss as in training and evaluation; only the training step may be compiled."""
    training: Any = CompiledNats(model) if compiled else model.nats
    return lambda inputs, targets: (training if model.training else model.nats)(inputs, targets).mean()


def flops_per_token(sizes: ModelConfig, vocab_size: int, length: int) -> float:
    """Floating-point operations of forward and backward for one token.

    6 for each weight that multiplies the token (2 forward, 4 backward), and causal attention: a token sees
    length / 2 keys, in two products (scores, weighted sum) with 2 operations per dimension, times 3 with the
    backward pass. For an adaptive vocabulary only the first band counts, so utilisation is a lower bound.
    """
    dim = sizes.model_dim
    scores = sizes.adaptive_cutoffs[0] + len(sizes.adaptive_cutoffs) if sizes.adaptive_cutoffs else vocab_size
    weights = sizes.num_layers * (4 * dim * dim + 2 * dim * sizes.ffn_dim) + scores * dim
    return 6 * weights + 6 * sizes.num_layers * dim * length


def matmul_flops_per_second(setup: Setup) -> float:
    """Speed of a large matrix product now, to compare a training step with: the median of three."""
    a, b = _factors(setup.device, setup.device.type == "cuda" and setup.precision != "float32")
    seconds = sorted(timed(setup, lambda: a @ b) for _ in range(3))[1]
    return 2 * a.shape[0] * a.shape[1] * b.shape[1] / max(seconds, 1e-9)


@functools.cache
def _factors(device: torch.device, half: bool) -> tuple[Tensor, Tensor]:
    size = 1024 if device.type == "cpu" else 8192
    dtype = torch.bfloat16 if half else torch.float32
    a = torch.randn(2 * size, size, device=device, dtype=dtype)
    b = torch.randn(size, size, device=device, dtype=dtype)
    a @ b  # the first product prepares the library
    return a, b


def timed(setup: Setup, run: Callable[[], Any]) -> float:
    """Seconds of a call by the clock of the setup."""
    now = time.process_time if setup.clock == "cpu" else time.perf_counter
    finish = torch.cuda.synchronize if setup.device.type == "cuda" else (lambda: None)
    finish()
    began = now()
    run()
    finish()
    return now() - began
