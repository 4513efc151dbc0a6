"""One training run, from a config to a finished run folder.

Everything random in step n is a function of (seed, n), and the schedule and the data order are functions of n,
so a run that is killed and started again does exactly what it would have done.
"""

from __future__ import annotations

import math
import shlex
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from alibi_lm import distributed, runs, runtime
from alibi_lm.checkpoint import CheckpointStore
from alibi_lm.config import CONFIG_FILE, TrainConfig, to_dict
from alibi_lm.data.prepare import prepare
from alibi_lm.distributed import StopSignals, World
from alibi_lm.evaluate.score import Stopped, mean_nats, score
from alibi_lm.load import build_model, load_run
from alibi_lm.model.compiled import CompiledNats
from alibi_lm.model.transformer import TransformerLM
from alibi_lm.optim import build_optimizer
from alibi_lm.runs import CHECKPOINTS, finished, run_lock
from alibi_lm.settings import require
from alibi_lm.tasks.items import Synthetic
from alibi_lm.tasks.training import Batches, TrainingData, of_task, of_text
from alibi_lm.tracking import Tracker, open_tracker

SELF_CHECK_TOLERANCE = 1e-3
"""Nats by which the evaluator may differ from the trainer's validation loss, in the same precision."""


class Interrupted(Exception):
    """The run was asked to stop and has saved its state.

    Attributes:
        status: exit status by convention, 128 + the signal's number.
    """

    def __init__(self, signal_number: int, step: int) -> None:
        super().__init__(f"stopped by signal {signal_number} after step {step}; give the command again to resume")
        self.status = 128 + signal_number


class NonFiniteLoss(ValueError):
    """Training produced a loss or gradient that is NaN or infinite."""


@dataclass
class Progress:
    """What changes during a run besides weights and optimizer state. Saved with every checkpoint."""

    step: int = 0
    """Optimizer steps done."""
    validation_due: bool = False
    """Whether this step's model has yet to be validated, because the run was stopped before that was done."""
    validation_loss: float | None = None
    """Mean nats per token at the last validation."""
    best_validation_loss: float | None = None
    best_step: int | None = None
    losses_since_log: list[float] = field(default_factory=list)
    """Loss of each step since the last row of metrics."""
    metrics_rows: int = 0
    """Number of rows in metrics.jsonl so far."""
    solved: bool = False
    """Whether every item of the last validation was right, which ends training on a task."""


@dataclass(frozen=True)
class Run:
    """What stays the same during a run."""

    config: TrainConfig
    folder: Path
    world: World
    device: torch.device
    data: TrainingData
    model: TransformerLM
    optimizer: torch.optim.Optimizer
    batches: Batches
    nats: Callable[..., Tensor]
    """The model's function, or its compiled form."""

    @property
    def tokens_per_step(self) -> int:
        """Targets per optimizer step on a text, over all processes."""
        return self.config.rows_per_step * self.config.train_length

    @cached_property
    def signature(self) -> dict[str, str]:
        """The fields that mark a file as this run's."""
        return {"run": runs.folder_identity(self.folder), "run_name": runs.run_name(self.config)}

    def say(self, line: str) -> None:
        """Print a line, on the main process only."""
        if self.world.is_main:
            print(line, flush=True)


def train(config: TrainConfig, folder: Path) -> dict[str, Any]:
    """Train one run, or finish what an earlier process began.

    Args:
        config: checked settings.
        folder: the run folder.

    Returns:
        The payload of finished.json: steps, tokens_seen, final and best validation loss.

    Raises:
        ValueError: bad settings, a folder that holds another run or other files, unusable data, a loss that is NaN
            or infinite.
        Interrupted: SIGTERM or SIGINT; the state is saved.
    """
    try:
        world = distributed.start(config.device)
        device = runtime.start(config.device, world.local_rank, config.threads)
        if not world.is_main:
            done = distributed.gather_objects(None, world)[0]
            return _train(config, folder, world, device) if done is None else done
        cache = Path(config.data.cache_dir)
        runs.require_place(folder, cache)
        runs.require_readable(config)
        if config.overwrite or finished(folder) is None:
            require_trainable(config, device)
        if config.overwrite:
            runs.delete_run(folder, cache)
        with run_lock(folder):
            done = finished(folder)
            # Before any mark is touched: this may be another run.
            if done is not None or (folder / CONFIG_FILE).exists():
                runs.require_same_settings(config, folder)
            if done is not None:
                runs.require_own_files(folder, None)
                # The place of a text is not a setting of the run, but the text at another place may be another.
                if not runs.same_place(config, folder) and (data := _data_at_hand(config)):
                    runs.require_same_text(folder, data)
                step = done.get("steps")
                print(f"{folder}: already finished at step {step}. Use overwrite=true to start over.", flush=True)
            distributed.gather_objects(done, world)  # the other processes do as this one does
            if done is not None:
                return done
            runs.clear_failed(folder)
            try:
                return _train(config, folder, world, device)
            except Interrupted:
                raise
            except Exception as error:
                with suppress(OSError):  # the disk may be full; the error itself says what happened
                    runs.mark_failed(folder, f"{type(error).__name__}: {error}")
                raise
    finally:
        distributed.stop()


def _data(config: TrainConfig) -> TrainingData:
    """The training data that the settings name; a text is prepared."""
    if isinstance(config.task, Synthetic):
        return of_task(config.task, config.train_length)
    return of_text(prepare(config.data, config.tokenizer), config.train_length, config.task)


def _data_at_hand(config: TrainConfig) -> TrainingData | None:
    """The same, or None if it is not available; a finished run does not need it."""
    try:
        return _data(config)
    except ValueError:
        return None


def require_trainable(config: TrainConfig, device: torch.device) -> None:
    """Refuse what the attention backend cannot train on this device, before any file is written.

    Raises:
        ValueError: it cannot; the message has the backend, the reason and another backend.
    """
    # Everything that the answer depends on, without the weights of a model.
    small = replace(config, model=replace(config.model, num_layers=1, adaptive_cutoffs=[]))
    try:
        with torch.device("meta"):
            model = build_model(small, vocab_size=1)
        reason = model.to_empty(device=device).refuses("training")
    except RuntimeError as error:
        raise ValueError(
            f"model.model_dim = {config.model.model_dim}: a layer of this size does not fit into the memory "
            f"({error}). Use a smaller model."
        ) from error
    require(not reason, reason)


def _train(config: TrainConfig, folder: Path, world: World, device: torch.device) -> dict[str, Any]:
    """The run itself, with its folder locked by the main process."""
    began = time.perf_counter()
    # The main process prepares the corpus, the others find it done.
    data = _data(config) if world.is_main else None
    distributed.barrier(world)
    data = data or _data(config)
    torch.manual_seed(config.seed)
    model = build_model(config, data.vocab_size).to(device)
    model.precision = config.precision  # for validation; a step sets its own
    if world.is_main:
        runs.require_same_text(folder, data)
        runs.write_records(config, folder, data, model)
    optimizer = build_optimizer(config.optimizer, model)
    batches = data.make_batches(config.rows_per_step, config.seed)
    nats = CompiledNats(model) if config.compile else model.nats
    run = Run(config, folder, world, device, data, model, optimizer, batches, nats)
    store = CheckpointStore(folder / CHECKPOINTS, config.keep_last, config.keep_every)
    progress = restore(run, store)
    step, steps = progress.step, config.steps
    begin = f"resumes at step {step} of {steps}" if step else f"starts, {steps} steps"
    run.say(
        f"{folder.name}: {begin}; {model.num_parameters():,} parameters, "
        f"{run.tokens_per_step:,} tokens per step, {data.name}, attention={model.backend.name}"
    )
    facts = {"num_parameters": model.num_parameters(), "corpus": data.hash, "backend": model.backend.name}
    with StopSignals(world) as signals:
        tracker = Tracker()
        if world.is_main:
            settings = to_dict(config) | facts
            tracker = open_tracker(
                config.tracking, folder, folder.name, config.experiment, settings, progress.metrics_rows
            )
        with tracker:
            _loop(run, store, progress, tracker, signals)
        result = {
            "steps": progress.step,
            "tokens_seen": progress.step * run.tokens_per_step,
            "train_length": config.train_length,
            "position": config.position.name,
            "num_parameters": model.num_parameters(),
            "position_parameters": model.position_parameters(),
            "validation_loss": progress.validation_loss,
            "best_validation_loss": progress.best_validation_loss,
            "corpus": data.train_hash,
            "device": runtime.environment(device)["device"],
        }
        if not world.is_main:
            return result
        result |= run.signature
        store.prune(progress.step)  # removes an older best checkpoint, or what a kill left
        try:
            result["self_check_difference"] = _self_check(run, result, signals)
        except Stopped:
            raise Interrupted(signals.received, progress.step) from None
        runs.mark_finished(folder, result)
    assert progress.validation_loss is not None
    run.say(
        f"{folder.name}: finished {progress.step} steps in {time.perf_counter() - began:,.0f} s; validation "
        f"loss {progress.validation_loss:.4f} nats per token. Run folder: {folder}\n"
        f"To evaluate it: python scripts/evaluate.py experiment={config.experiment} "
        + shlex.quote(f"runs={folder}")
    )
    return result


def _loop(run: Run, store: CheckpointStore, progress: Progress, tracker: Tracker, signals: StopSignals) -> None:
    """Steps, rows of metrics, validations and checkpoints, from where `progress` is to the end of the run."""
    config, steps = run.config, run.config.steps
    pending: list[tuple[int, Tensor, Tensor]] = []
    bar = tqdm(
        total=steps,
        initial=progress.step,
        desc=run.folder.name,
        unit="step",
        disable=not (run.world.is_main and sys.stderr.isatty()),
    )
    clock, timed = time.perf_counter(), progress.step
    while (progress.step < steps and not progress.solved) or progress.validation_due:
        if not progress.validation_due:  # true if the run was stopped before a validation
            pending.append((progress.step + 1, *step(run, progress.step)))
            progress.step += 1
            bar.update()
            logs = progress.step % config.log_every == 0 or progress.step == steps
            # Without a progress bar on a terminal, print a line for each tenth of the run.
            tells = bar.disable and progress.step * 10 // steps > (progress.step - 1) * 10 // steps
            if logs or tells:
                norm = collect(store, progress, pending)
                loss = sum(progress.losses_since_log) / len(progress.losses_since_log)
                speed = run.tokens_per_step * (progress.step - timed) / (time.perf_counter() - clock)
                bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tok/s")
            if tells:
                at = f"step {progress.step} of {steps}"
                run.say(f"{run.folder.name}: {at}, training loss {loss:.4f}, {speed:,.0f} tokens/s")
            if logs:
                values = {
                    "tokens_seen": progress.step * run.tokens_per_step,
                    "train/loss": loss,
                    "train/lr": config.schedule.lr(progress.step - 1, steps, config.optimizer.lr),
                    "train/grad_norm": norm,
                    "train/tokens_per_second": speed,
                }
                tracker.log(progress.step, values)
                progress.losses_since_log.clear()
                clock, timed = time.perf_counter(), progress.step
            progress.validation_due = progress.step % config.validate_every == 0 or progress.step == steps
        stop, better = signals.agreed(), False
        if progress.validation_due and not stop:
            try:
                better = validate(run, tracker, progress, signals)
            except Stopped:
                stop = signals.agreed()
        last = progress.step == steps or progress.solved
        if progress.step % config.checkpoint_every == 0 or last or stop or better:
            collect(store, progress, pending)
            save(run, store, progress, tracker)
            clock, timed = time.perf_counter(), progress.step
        if stop and (progress.validation_due or not last):
            bar.close()
            raise Interrupted(stop, progress.step)
    bar.close()


def step(run: Run, number: int) -> tuple[Tensor, Tensor]:
    """One optimizer step (counted from 0).

    The gradient is that of the sum of nats over all processes and micro-batches, divided by the number of targets.
    In an item of a task only the targets of its answer count.

    Returns:
        Two scalars on the device: mean nats per token before the update, and the gradient norm before clipping.
    """
    config, model, optimizer = run.config, run.model, run.optimizer
    model.train()
    runtime.seed_step(config.seed, number, run.world.rank)
    model.set_strength(config.position_strength(number))
    share = distributed.shard(config.rows_per_step, run.world)
    micro_rows = max(1, (config.micro_batch_tokens or run.tokens_per_step) // config.train_length)
    total = torch.zeros((), device=run.device)
    num_targets = run.batches.targets(number)
    for first in range(share.start, share.stop, micro_rows):
        batch = run.batches.batch(number, slice(first, min(first + micro_rows, share.stop)))
        if run.device.type == "cuda":
            batch = tuple(tensor.pin_memory() for tensor in batch)
        batch = tuple(tensor.to(run.device, non_blocking=True) for tensor in batch)
        # The same draw in all micro-batches and processes.
        places = config.training_positions.draw(batch[0].shape[1], runtime.step_seed(config.seed, number))
        options = {} if places is None else {"positions": places.to(run.device)}
        with runtime.autocast(run.device, config.precision):
            nats = run.nats(*batch, **options).sum()
        (nats / num_targets).backward()
        total += nats.detach()
    distributed.all_reduce_gradients(model, run.world)
    distributed.all_reduce_sum(total, run.world)
    norm = torch.nn.utils.clip_grad_norm_(
        model.parameters(), config.clip_norm if config.clip_norm > 0 else math.inf
    )
    rate = config.schedule.lr(number, config.steps, config.optimizer.lr)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total / num_targets, norm


def collect(store: CheckpointStore, progress: Progress, pending: list[tuple[int, Tensor, Tensor]]) -> float:
    """Read (step, loss, gradient norm) of the latest steps from the device. Each read stalls the device.

    Returns:
        The last gradient norm.

    Raises:
        NonFiniteLoss: one of them is NaN or infinite.
    """
    if not pending:
        return math.nan
    values = torch.stack([torch.stack([loss.float(), norm.float()]) for _, loss, norm in pending]).tolist()
    for (number, _, _), (loss, norm) in zip(pending, values, strict=True):
        if not (math.isfinite(loss) and math.isfinite(norm)):
            kept = store.find("last")
            raise NonFiniteLoss(
                f"step {number}: loss = {loss}, gradient norm = {norm}. Training has diverged; the last good "
                f"checkpoint is {'none' if kept is None else f'step {kept.step}'}. Lower optimizer.lr or "
                "clip_norm, or lengthen the warm-up."
            )
        progress.losses_since_log.append(loss)
    pending.clear()
    return float(values[-1][1])


def validate(run: Run, tracker: Tracker, progress: Progress, signals: StopSignals) -> bool:
    """Measure the validation split at the training length, by the evaluator's scorer.

    Returns:
        Whether the model is better than at all earlier validations.

    Raises:
        Stopped: a process was asked to stop. The validation is still due.
    """
    run.model.set_strength(run.config.position_strength(progress.step))
    loss, accuracy = _validation(run, run.model, signals, run.world)
    values: dict[str, float | None] = {"validation/loss": loss}
    if accuracy is None:
        values["validation/perplexity"] = math.exp(loss) if loss < math.log(sys.float_info.max) else None
    else:
        values["validation/accuracy"] = accuracy
        progress.solved = accuracy == 1 and run.config.task.stop_when_solved
        run.say(f"{run.folder.name}: step {progress.step}, validation accuracy {accuracy:.4f}")
    tracker.log(progress.step, values)
    progress.validation_due, progress.validation_loss = False, loss if math.isfinite(loss) else None
    best = progress.best_validation_loss
    # A model that still has positions that it will lose later does not count as the best one.
    whole = progress.step > (run.config.positions_until or 0)
    better = whole and loss < (math.inf if best is None else best)
    if better:
        progress.best_validation_loss, progress.best_step = loss, progress.step
    return better


def _validation(
    run: Run, model: TransformerLM, signals: StopSignals, world: World | None = None
) -> tuple[float, float | None]:
    """Mean nats of the validation's targets and, for a task, the share of items that are right."""
    task, length = run.data.validation, run.config.train_length
    scored = score(
        model,
        task.batches(length, run.config.evaluation.tokens_per_forward, world),
        task.num_targets(length),
        hits="accuracy" in task.metrics,
        world=world,
        progress="self-check" if world is None else "validation",
        interrupt=lambda: signals.received != 0,
    )
    right = None if scored.hits is None else np.logical_and.reduceat(scored.hits, task.groups(length))
    return mean_nats(scored.nats), None if right is None else float(right.mean())


def save(run: Run, store: CheckpointStore, progress: Progress, tracker: Tracker) -> None:
    """Save the state; called on every process, written by the main one."""
    if run.world.is_main:
        progress.metrics_rows = tracker.rows
        state = asdict(progress) | run.signature
        state |= {
            "vocab_size": run.data.vocab_size,
            "corpus": run.data.hash,
            "tokens_seen": progress.step * run.tokens_per_step,
        }
        store.save(progress.step, run.model, run.optimizer, state)
        if progress.best_step == progress.step:
            _mark_best(run, store, progress)
    distributed.barrier(run.world)


def _mark_best(run: Run, store: CheckpointStore, progress: Progress) -> None:
    store.mark_best(progress.step, {"validation_loss": progress.best_validation_loss} | run.signature)


def restore(run: Run, store: CheckpointStore) -> Progress:
    """Load the newest whole checkpoint, if there is one; returns what was done by then.

    Raises:
        ValueError: it belongs to another run, metrics.jsonl does not fit it, or a weight is NaN or infinite.
    """
    latest = store.find("last")
    if latest is None:
        return Progress()
    runs.require_own_files(run.folder, latest)
    latest.restore(run.model, run.optimizer)
    bad = [n for n, weight in run.model.named_parameters() if not bool(torch.isfinite(weight).all())]
    if bad:
        raise NonFiniteLoss(
            f"{latest.path} holds NaN or infinite values ({', '.join(bad[:3])}): the training had diverged. "
            "Delete that folder to resume from an earlier checkpoint, or start over with overwrite=true and a "
            "lower optimizer.lr."
        )
    names = {f.name for f in fields(Progress)}
    progress = Progress(**{k: v for k, v in latest.state.items() if k in names} | {"step": latest.step})
    if run.world.is_main:
        progress.metrics_rows = runs.own_metrics(run.folder, latest)
        if progress.best_step == latest.step:
            # The process may have died between writing this checkpoint and pointing at it.
            _mark_best(run, store, progress)
    return progress


def _self_check(run: Run, result: dict[str, Any], signals: StopSignals) -> float:
    """Check that the saved run, loaded as a user would load it, gives the trainer's validation loss.

    Returns:
        The difference in nats per token.
    """
    config = run.config
    options = {"attention": config.attention.name, "device": run.device, "precision": config.precision}
    model = load_run(run.folder, config.task.width(config.train_length), "last", **options)
    loss, trained = _validation(run, model, signals)[0], result["validation_loss"]
    require(
        trained is not None and abs(loss - trained) <= SELF_CHECK_TOLERANCE,
        f"self-check: the evaluator gives {loss} nats per token at train_length = {config.train_length}, the "
        f"trainer's validation {trained}. The saved run is not the trained model, or it diverged; do not use it.",
    )
    return abs(loss - trained)
