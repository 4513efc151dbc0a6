"""What is measured: language models of the same sizes, with a step of training and a pass of evaluation.

All of them see the same tokens. Other libraries' models train with the same optimizer and clipping as ours; their
own code computes model and loss. What the benchmark needs of `alibi_lm`'s models is called here and nowhere else.
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
"""(inputs (B, T), targets (B, T)) -> mean nats per token, or the like."""


class CannotRun(Exception):
    """Why an implementation cannot do a task: no memory, or a refusal of its own."""


@dataclass(frozen=True)
class Setup:
    """What all implementations of a benchmark have in common."""

    sizes: ModelConfig
    vocab_size: int
    train_length: int
    """Tokens of the longest sequence in training."""
    longest: int
    """Tokens of the longest sequence at all."""
    device: torch.device
    precision: str
    """Of training: float32 or bfloat16. Evaluation is in float32."""
    clock: str = "wall"
    """See `BenchConfig.clock`."""
    positions: tuple[str, ...] = ()
    """Our schemes that are measured."""


@dataclass(frozen=True)
class Task:
    """Steps on `batch` sequences of `length` tokens; only evaluation unless `trains`."""

    batch: int
    length: int
    trains: bool = True


@functools.lru_cache(maxsize=2)
def words(batch: int, length: int, vocab_size: int) -> Tensor:
    """Words drawn by the frequency that words of a text have: (batch, length) int64, the same at every call.

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
    """One implementation of one scheme, wherever it runs."""

    implementation: str
    position: str
    backend: str = "its own"
    compiled: bool = False
    flushes_denormals: bool
    """See `runtime.start`."""
    parameters: int
    """Trained numbers."""
    ready: dict[int, bool] = field(default_factory=dict)
    """Lengths it is prepared for, and whether it can train at them."""
    peak_memory_bytes: dict[int, int | None] = field(default_factory=dict)
    """By length, from `prepare`."""

    @property
    def label(self) -> str:
        """Name in messages."""
        return label(vars(self))

    @abstractmethod
    def prepare(self, task: Task) -> int | None:
        """Compile, fill caches and the allocator, without being timed.

        Returns:
            The most memory in use during a step: parameters and the optimizer's state, which are there before,
            and what the step adds. None where the system does not tell.

        Raises:
            CannotRun: out of memory, or refused.
        """

    @abstractmethod
    def seconds(self, kind: Kind, task: Task) -> float:
        """Do one step and say what it took; nothing else computes meanwhile.

        Raises:
            CannotRun: out of memory, or refused.
        """

    @abstractmethod
    def release(self) -> None:
        """Leave the GPU's memory to others until `prepare` is called again."""


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
    """Our schemes with each backend, `none` first: the reference. On a GPU they wait in the host's memory.

    Args:
        setup: sizes and the like.
        positions: schemes; `none` is added.
        backends: attention backends.
        compile: whether each is measured compiled as well.
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
    """The loss as in training and evaluation: only the training step is ever compiled."""
    training: Any = CompiledNats(model) if compiled else model.nats
    return lambda inputs, targets: (training if model.training else model.nats)(inputs, targets).mean()


def flops_per_token(sizes: ModelConfig, vocab_size: int, length: int) -> float:
    """Floating-point operations of forward and backward for one token.

    6 for each weight that multiplies the token (2 forward, 4 backward), and causal attention: a token meets
    length / 2 keys, twice (scores, weighted sum), at 2 operations a dimension, times 3 for the backward pass.
    An adaptive vocabulary counts its first band alone, so that utilisation is a lower bound.
    """
    dim = sizes.model_dim
    scores = sizes.adaptive_cutoffs[0] + len(sizes.adaptive_cutoffs) if sizes.adaptive_cutoffs else vocab_size
    weights = sizes.num_layers * (4 * dim * dim + 2 * dim * sizes.ffn_dim) + scores * dim
    return 6 * weights + 6 * sizes.num_layers * dim * length


def matmul_flops_per_second(setup: Setup) -> float:
    """Speed of a large matrix product now, with which a training step is compared: the median of three."""
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
