"""Which runs to score and how: finds them, checks them against each other, and opens each once.

A run that fails does not stop the others: `FailedRuns` reports the failures at the end.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from alibi_lm import runtime
from alibi_lm.checkpoint import CheckpointError
from alibi_lm.config import EvaluationConfig, TrainConfig, load_config
from alibi_lm.data.corpus import Corpus
from alibi_lm.data.hub_tokenizer import HubTokenizer
from alibi_lm.data.prepare import prepare
from alibi_lm.distributed import World
from alibi_lm.evaluate.config import EvaluateConfig
from alibi_lm.evaluate.passes import OutOfMemory, Passes, enough_memory
from alibi_lm.evaluate.score import mean_nats
from alibi_lm.evaluate.store import TokenStore
from alibi_lm.files import read_json
from alibi_lm.load import load_run, require_own_text, run_tokenizer
from alibi_lm.model.hub_folder import PREFIX, HubFolder, open_hub_folder
from alibi_lm.model.huggingface import HuggingFaceLM, load_huggingface
from alibi_lm.model.interface import LanguageModel
from alibi_lm.positions.base import NoneConfig
from alibi_lm.runs import (
    CORPUS_FILE,
    experiment_folder,
    finished,
    folder_identity,
    run_folders,
    short_hash,
)
from alibi_lm.settings import require
from alibi_lm.tasks.base import Task
from alibi_lm.tasks.items import ItemTask, Synthetic
from alibi_lm.tasks.needle import NeedleConfig, NeedleTask, PasskeyTask
from alibi_lm.tasks.text import TextTask

EXPECTED = (ValueError, OSError, CheckpointError)
"""Errors that can be a run's fault; any other is a bug of ours and ends the command."""

VALIDATION_TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}
"""Nats per token by which an evaluation may differ from the validation in training, by training precision."""


class FailedRuns(ValueError):
    """Some of `total` runs could not be evaluated; the message has the reason for each, by the run's name."""

    def __init__(self, failures: Mapping[str, Exception], total: int) -> None:
        rest = "; the others were" if len(failures) < total else ""
        lines = [f"{len(failures)} of {total} runs could not be evaluated{rest}."]
        lines += [f"  {name}: {error}" for name, error in failures.items()]
        super().__init__("\n".join(lines))
        self.failures = dict(failures)


def raise_failures(failures: Mapping[str, Exception], total: int) -> None:
    """Raise FailedRuns if a run failed, or the error itself if all runs failed for the same reason."""
    if len(failures) == total and len({str(error) for error in failures.values()}) == 1:
        raise next(iter(failures.values()))
    if failures:
        raise FailedRuns(failures, total)


@dataclass(frozen=True)
class PlannedRun:
    """A run folder and how it is to be evaluated."""

    folder: Path
    config: TrainConfig
    settings: EvaluationConfig
    run_id: str
    found: HubFolder | None = None
    """For a model of transformers: what is known about it. `config` then holds only its training length, the text,
    and its kind as the name of its position scheme."""

    @property
    def name(self) -> str:
        """Its name in rows and figures."""
        return self.folder.resolve().name if self.found is None else self.found.name


@dataclass(frozen=True)
class OpenRun:
    """A run with its model and its tasks, ready to be scored."""

    plan: PlannedRun
    corpus: Corpus | None
    """The corpus of a run that was trained on a text."""
    passes: Passes
    """Passes over its text, or over the items of its task."""
    way: dict[str, str]
    """How it is scored: checkpoint, attention, precision; each row names them."""
    asked: list[Passes]
    """Everything that rows are made of: the text, needles in it, and other tasks that were asked for."""


def plan(config: EvaluateConfig) -> tuple[list[PlannedRun], dict[str, Exception]]:
    """Find the runs and settle lengths, mode, stride and split; nothing is loaded yet.

    Returns the planned runs and, by name, the errors of those that cannot be planned.

    Raises:
        ValueError: no run, a run that is not finished, two runs with one name, or rows of another run of that name
            in the results.
    """
    if config.model is not None:
        return [plan_model(config)], {}
    pattern = config.runs or str(experiment_folder(config.experiment) / "runs" / "*")
    folders = run_folders(pattern)
    require(
        bool(folders),
        f"runs = {pattern} matches no folder. Train first (make train), or give runs=<run folder or glob>.",
    )
    if not Path(pattern).is_dir():
        # A sweep that is still running has unfinished folders beside finished ones, which can be evaluated.
        unfinished = [f.name for f in folders if finished(f) is None]
        folders = [f for f in folders if finished(f) is not None]
        require(bool(folders), f"runs = {pattern} holds no finished run yet ({', '.join(unfinished)}).")
        if unfinished:
            print(f"left out, not finished: {', '.join(unfinished)}", flush=True)
    runs: dict[str, PlannedRun] = {}
    failures: dict[str, Exception] = {}
    for folder in folders:
        try:
            settings = load_config(folder)
            run = PlannedRun(folder, settings, config.settings(settings), folder_identity(folder))
        except EXPECTED as error:
            failures[folder.name] = error
            continue
        other = runs.setdefault(run.name, run)
        require(
            other.folder.resolve() == folder.resolve(),
            f"runs = {pattern}: {other.folder} and {folder} have the same name, {run.name}, which rows and curves "
            "use for a run. Evaluate them one after another, each with its own output_dir, or rename one.",
        )
    if not runs:
        raise_failures(failures, len(folders))
    return list(runs.values()), failures


def plan_model(config: EvaluateConfig) -> PlannedRun:
    """Plan the evaluation of `model=hf:...`; its weights are not read yet.

    Raises:
        ValueError: see `open_hub_folder`; no text.
    """
    assert config.model is not None
    data = config.data.apply(None)
    found = open_hub_folder(config.model, config.model_config, config.train_length, config.trust_remote_code)
    length = found.train_length
    known = TrainConfig(
        position=NoneConfig(getattr(found.config, "position_scheme", None) or str(found.config.model_type)),
        data=data,
        train_length=length,
        tokens_per_step=length,
        evaluation=EvaluationConfig(sorted({max(1, length // 2), length, 2 * length, 4 * length})),
    )
    place = Path(config.model.removeprefix(PREFIX))
    return PlannedRun(place, known, config.settings(known), short_hash(found.files, digits=12), found)


def open_model(config: EvaluateConfig, run: PlannedRun, device: torch.device) -> tuple[Corpus, HuggingFaceLM]:
    """The text, encoded by the model's own tokenizer, and the model.

    Raises:
        ValueError: no tokenizer, one that does not fit the model, or see `load_huggingface`.
    """
    found, precision = run.found, runtime.resolve_precision(device, config.precision)
    assert found is not None
    tokenizer = HubTokenizer(found.folder, found.trust_remote_code)
    words = int(found.config.get_text_config().vocab_size)
    require(
        tokenizer.vocab_size <= words,
        f"model = {found.source} has {words} words, its tokenizer {tokenizer.vocab_size}: they do not belong "
        "together. Put the model's own tokenizer into its folder.",
    )
    corpus = prepare(run.config.data, tokenizer, splits=(run.settings.split,))
    model = load_huggingface(found, device, precision, config.attention)
    settings = {name: value for name, value in found.config.to_dict().items() if name != "_name_or_path"}
    settings |= {"files": found.files, "attention": model.attention, "precision": precision}
    model.identity = short_hash(settings | {"library": model.version}, digits=12)
    return corpus, model


def open_run(config: EvaluateConfig, run: PlannedRun, device: torch.device, world: World | None = None) -> OpenRun:
    """Load a run's model, once for all lengths, and open its text, or the items of its task.

    Raises:
        ValueError: see `load_run`; the text is missing, a prepared stream belongs to another tokenizer, or the
            model does not fit into the memory.
    """
    with enough_memory("when its model was loaded"):
        opened = _open(config, run, device, world)
    if run.found is None and opened.corpus is not None:
        try:
            _check_validation(config, opened)
        except OutOfMemory:  # the row of this length will say so
            if world is not None and world.world_size > 1:  # the other processes wait in the same pass
                raise
    return opened


def _open(config: EvaluateConfig, run: PlannedRun, device: torch.device, world: World | None) -> OpenRun:
    corpus: Corpus | None = None
    model: LanguageModel
    if run.found is not None:
        corpus, model = open_model(config, run, device)
        attention = model.attention
    else:
        if not isinstance(run.config.task, Synthetic):
            data = config.data.apply(run.config.data)
            corpus = prepare(data, run_tokenizer(run.folder), splits=(run.settings.split,))
            if not config.data.another:
                require_own_text(run.folder, corpus, run.settings.split)
        model = own = load_run(
            run.folder,
            checkpoint=config.checkpoint,
            attention=config.attention,
            device=device,
            position=config.position or None,
            precision=config.precision,
            query_scale=config.query_scale or None,
        )
        attention = own.backend.name
        require(
            corpus is None or own.vocab_size == corpus.vocab_size + run.config.task.added_tokens,
            f"{run.folder / 'tokenizer.json'} has {getattr(corpus, 'vocab_size', 0)} tokens, the run's model "
            f"{own.vocab_size}. Put the run's own tokenizer back.",
        )
    tasks, asked = _tasks(config, run, corpus)
    scheme = run.config.position.name if run.found is None else ""
    store, first = TokenStore(config.tokens), next(iter(tasks.values()))
    passes = Passes(model, first, store, run.settings.tokens_per_forward, world, scheme)
    way = {"checkpoint": config.checkpoint, "attention": attention, "precision": str(model.precision)}
    return OpenRun(run, corpus, passes, way, [dataclasses.replace(passes, task=tasks[name]) for name in asked])


def _tasks(config: EvaluateConfig, run: PlannedRun, corpus: Corpus | None) -> tuple[dict[str, Task], list[str]]:
    """The tasks that a run can be asked, by name, and the names of those that rows are made of."""
    own, split = run.config.task, run.settings.split
    tasks: dict[str, Task] = {}
    if corpus is None:
        assert isinstance(own, Synthetic)
        require(
            config.mode is None and config.stride is None,
            f"mode = {config.mode}, stride = {config.stride}: {run.name} was trained on items of {own.name}, each "
            "a sequence of its own. Windows and streams are cut from texts: leave mode and stride out.",
        )
        tasks[own.name] = ItemTask(own, run.config.train_length, split)
    else:
        stream = corpus.split(split)
        tasks["text"] = TextTask(
            stream.tokens,
            corpus.start_id,
            run.settings.stride,
            np.asarray(stream.documents),
            stream.split,
            stream.hash,
            stream.sha256,
            stream.words,
            stream.bytes,
        )
        if isinstance(own, NeedleConfig):
            tasks["needle"] = NeedleTask(
                own, stream.tokens, corpus.start_id, corpus.vocab_size, split, stream.hash
            )
    asked = [config.task] if config.task else list(tasks)
    known = list(tasks) if corpus is None else [*tasks, "passkey"]
    if config.task == "passkey" and corpus is not None:
        tasks["passkey"] = PasskeyTask(corpus.tokenizer, split)
    require(
        set(asked) <= set(tasks),
        f"task = {config.task}: {run.name} was trained on {own.name}, and can be asked {', '.join(known)}. "
        "Use one of these, or leave task out.",
    )
    return tasks, asked


def _check_validation(config: EvaluateConfig, opened: OpenRun) -> None:
    """Refuse a run whose model does not have the validation loss that its training recorded.

    This can be checked if the evaluation repeats the training's validation: same text, split, length and windows.
    """
    run, text, done = opened.plan, opened.passes.text, finished(opened.plan.folder) or {}
    recorded = done.get({"best": "best_validation_loss", "last": "validation_loss"}.get(config.checkpoint, ""))
    record, length = run.folder / CORPUS_FILE, run.config.train_length
    splits = read_json(record).get("splits", {}) if record.is_file() else {}
    repeated = (text.mode, text.split) == ("nonoverlapping", "validation") and length in run.settings.lengths
    changed = config.position or config.query_scale
    same_text = (splits.get("validation") or {}).get("sha256") == text.sha256
    if recorded is None or not repeated or not same_text or changed or text.refuses(length):
        return
    loss = mean_nats(opened.passes.nats(length))
    trained_in = run.config.precision
    if trained_in == "auto":
        trained_in = "bfloat16" if "NVIDIA" in str(done.get("device")) else "float32"
    tolerance = max(VALIDATION_TOLERANCE[trained_in], VALIDATION_TOLERANCE[opened.way["precision"]])
    require(
        not math.isfinite(loss) or abs(loss - recorded) <= tolerance * max(1.0, recorded / 10),
        f"{run.folder}: the {config.checkpoint} checkpoint has {loss:.6f} nats per token where its training "
        f"recorded {recorded:.6f} on the same text, so these are not the weights of this run. Put its own "
        "checkpoint back, or train it again with overwrite=true.",
    )
