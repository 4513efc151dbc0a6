"""The training loop: one optimizer step after another, logging, validation, checkpoints.

Everything random in step n is a function of (seed, n), and the schedule and the data order are functions of n,
so a loop that starts from a checkpoint does exactly what the loop that wrote it would have done.
"""

from __future__ import annotations

import math
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from alibi_lm import distributed, runtime
from alibi_lm.checkpoint import CheckpointStore
from alibi_lm.config import TrainConfig
from alibi_lm.data.corpus import Corpus
from alibi_lm.data.windows import TrainingBatches
from alibi_lm.distributed import World
from alibi_lm.evaluate.score import mean_nats, score_tokens
from alibi_lm.model.transformer import CompiledNats, TransformerLM


class Interrupted(Exception):
    """The run was asked to stop and has saved its state.

    Attributes:
        status: exit status by convention, 128 + the signal's number.
    """

    def __init__(self, signal_number: int, step: int) -> None:
        super().__init__(f"stopped by signal {signal_number} after step {step}; give the command again to resume")
        self.status = 128 + signal_number


class NonFiniteLoss(ValueError):
    """Training produced a loss or gradient that is no number."""


class Trainer:
    """The loop and the few things that change in it."""

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        world: World,
        device: torch.device,
        corpus: Corpus,
        model: TransformerLM,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self.config, self.folder, self.world, self.device = config, folder, world, device
        self.corpus, self.model, self.optimizer = corpus, model, optimizer
        rows = config.rows_per_step
        self.tokens_per_step = rows * config.train_length
        self.batches = TrainingBatches(
            corpus.split("train").tokens, corpus.start_id, config.train_length, rows, config.seed
        )
        self.share = distributed.shard(rows, world)
        self.micro_rows = max(1, (config.micro_batch_tokens or rows * config.train_length) // config.train_length)
        self.store = CheckpointStore(folder / "checkpoints", config.keep_last, config.keep_every)
        self.best, self.best_step = math.inf, 0
        self.validation = math.inf
        """Validation loss when it was last measured, mean nats per token."""
        self.losses: list[float] = []
        """Loss of each step since the last row of metrics."""
        self.pending: list[tuple[int, Tensor, Tensor]] = []
        """(step, loss, gradient norm) still on the device: reading them at once would stall it."""
        self.last_loss = self.last_norm = math.nan
        self.nats = CompiledNats(model) if config.compile else model.nats

    def restore(self) -> int:
        """Load the newest whole checkpoint; returns the number of steps done."""
        latest = self.store.latest()
        if latest is None:
            return 0
        latest.restore(self.model, self.optimizer)
        bad = [n for n, weight in self.model.named_parameters() if not bool(torch.isfinite(weight).all())]
        if bad:
            raise NonFiniteLoss(
                f"{latest.path} holds NaN or infinite values ({', '.join(bad[:3])}): the training had diverged. "
                "Delete that folder to resume from an earlier checkpoint, or start over with overwrite=true and a "
                "lower optimizer.lr."
            )
        if latest.state["validation_loss"] is not None:
            self.validation = latest.state["validation_loss"]
        if latest.state["best_step"] is not None:
            self.best, self.best_step = latest.state["best_validation_loss"], latest.state["best_step"]
        if self.best_step == latest.step and self.world.is_main:
            # The process may have died between writing this checkpoint and pointing at it.
            self.store.mark_best(latest.step, {"validation_loss": self.best})
        self.losses = list(latest.state["losses_since_log"])
        return latest.step

    def run(self, step: int, tracker: Any) -> dict[str, Any]:
        """Train from `step` to the end; returns the payload of finished.json."""
        config = self.config
        bar = tqdm(
            total=config.steps,
            initial=step,
            desc=self.folder.name,
            unit="step",
            disable=not (self.world.is_main and sys.stderr.isatty()),
        )
        clock, timed = time.perf_counter(), step
        with _StopSignals(self.world) as signals:
            while step < config.steps:
                self.pending.append((step + 1, *self.step(step)))
                step += 1
                bar.update()
                stop = signals.agreed()
                last = step == config.steps
                better = False
                if step % config.log_every == 0 or last:
                    self.collect()
                    now = time.perf_counter()
                    speed = self.tokens_per_step * (step - timed) / (now - clock)
                    self.log(tracker, step, speed)
                    bar.set_postfix_str(f"loss {self.last_loss:.3f}, {speed:,.0f} tok/s")
                    clock, timed = now, step
                if step % config.validate_every == 0 or last:
                    self.validation = self.validate(tracker, step)
                    better = self.validation < self.best
                    if better:
                        self.best, self.best_step = self.validation, step
                if step % config.checkpoint_every == 0 or last or stop or better:
                    self.checkpoint(step)
                    clock, timed = time.perf_counter(), step
                if stop and not last:
                    bar.close()
                    raise Interrupted(stop, step)
        bar.close()
        if self.world.is_main:
            self.store.prune()  # the best checkpoint before the last one, or what a kill left
        return {
            "steps": step,
            "tokens_seen": step * self.tokens_per_step,
            "train_length": config.train_length,
            "position": config.position.name,
            "num_parameters": self.model.num_parameters(),
            "validation_loss": self.validation,
            "best_validation_loss": self.best,
            "corpus": self.corpus.split("train").hash,
            "device": runtime.environment(self.device)["device"],
        }

    def step(self, step: int) -> tuple[Tensor, Tensor]:
        """One optimizer step (counted from 0).

        The gradient is that of the sum of nats over all processes and micro-batches, divided by the number of
        targets.

        Returns:
            Mean nats per token before the update, and the gradient norm before clipping; on the device.
        """
        config = self.config
        self.model.train()
        runtime.seed_step(config.seed, step, self.world.rank)
        total = torch.zeros((), device=self.device)
        for first in range(self.share.start, self.share.stop, self.micro_rows):
            rows = slice(first, min(first + self.micro_rows, self.share.stop))
            inputs, targets = self.batches.batch(step, rows)
            if self.device.type == "cuda":
                inputs, targets = inputs.pin_memory(), targets.pin_memory()
            inputs = inputs.to(self.device, non_blocking=True)
            targets = targets.to(self.device, non_blocking=True)
            with runtime.autocast(self.device, config.precision):
                nats = self.nats(inputs, targets).sum()
            (nats / self.tokens_per_step).backward()
            total += nats.detach()
        distributed.all_reduce_gradients(self.model, self.world)
        distributed.all_reduce_sum(total, self.world)
        norm = torch.nn.utils.clip_grad_norm_(
            self.model.parameters(), config.clip_norm if config.clip_norm > 0 else math.inf
        )
        rate = config.schedule.lr(step, config.steps, config.optimizer.lr)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total / self.tokens_per_step, norm

    def collect(self) -> None:
        """Read the pending losses and gradient norms from the device, and refuse what is no number."""
        if not self.pending:
            return
        values = torch.stack([torch.stack([loss.float(), norm.float()]) for _, loss, norm in self.pending])
        for (step, _, _), (loss, norm) in zip(self.pending, values.tolist(), strict=True):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                kept = self.store.latest()
                raise NonFiniteLoss(
                    f"step {step}: loss = {loss}, gradient norm = {norm}. Training has diverged; the last good "
                    f"checkpoint is {'none' if kept is None else f'step {kept.step}'}. Lower optimizer.lr or "
                    "clip_norm, or lengthen the warm-up."
                )
            self.losses.append(loss)
            self.last_norm = norm
        self.pending.clear()

    def log(self, tracker: Any, step: int, speed: float) -> None:
        """Write a row of training metrics."""
        self.last_loss = sum(self.losses) / len(self.losses)
        self.losses.clear()
        tracker.log(
            step,
            {
                "tokens_seen": step * self.tokens_per_step,
                "train/loss": self.last_loss,
                "train/lr": self.config.schedule.lr(step - 1, self.config.steps, self.config.optimizer.lr),
                "train/grad_norm": self.last_norm,
                "train/tokens_per_second": speed,
            },
        )

    def validate(self, tracker: Any, step: int) -> float:
        """Mean nats per token of the validation split at the training length, by the evaluator's scorer."""
        nats = score_tokens(
            self.model,
            self.corpus.split("validation").tokens,
            self.corpus.start_id,
            self.config.train_length,
            tokens_per_forward=self.config.evaluation.tokens_per_forward,
            autocast=runtime.autocast(self.device, self.config.precision),
            world=self.world,
            progress="validation",
        )
        loss = mean_nats(nats)
        tracker.log(step, {"validation/loss": loss, "validation/perplexity": math.exp(min(loss, 700))})
        return loss

    def checkpoint(self, step: int) -> None:
        """Save the state after `step` steps; called on every process, written by the main one."""
        self.collect()
        if self.world.is_main:
            state = {
                "vocab_size": self.corpus.vocab_size,
                "corpus": self.corpus.hash,
                "tokens_seen": step * self.tokens_per_step,
                "best_validation_loss": self.best if self.best_step else None,
                "best_step": self.best_step or None,
                "validation_loss": self.validation if math.isfinite(self.validation) else None,
                "losses_since_log": self.losses,
            }
            self.store.save(step, self.model, self.optimizer, state)
            if self.best_step == step:
                self.store.mark_best(step, {"validation_loss": self.best})
        distributed.barrier(self.world)


class _StopSignals:
    """Turns SIGTERM and SIGINT into a request that the loop reads between steps."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.received = 0

    def agreed(self) -> int:
        """The signal to stop for, 0 for none; the same on every process at the same step."""
        if self.world.world_size == 1:
            return self.received
        return max(distributed.gather_objects(self.received, self.world))

    def __enter__(self) -> _StopSignals:
        try:
            self.before = {s: signal.signal(s, self._receive) for s in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:  # not the main thread: leave signals alone
            self.before = {}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
