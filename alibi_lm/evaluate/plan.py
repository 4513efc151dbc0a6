"""Which runs to score and how: found, checked against one another, and opened once each, for rows and for views.

A run that fails stops no other: what went wrong is told at the end, by `FailedRuns`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from alibi_lm.checkpoint import CheckpointError
from alibi_lm.config import EvaluationConfig, TrainConfig, load_config
from alibi_lm.data.corpus import Corpus, prepare
from alibi_lm.data.tokenizers import Tokenizer
from alibi_lm.distributed import World
from alibi_lm.evaluate.config import EvaluateConfig
from alibi_lm.evaluate.passes import Passes
from alibi_lm.evaluate.score import mean_nats
from alibi_lm.evaluate.store import TokenStore
from alibi_lm.files import read_json
from alibi_lm.runs import CORPUS_FILE, experiment_folder, finished, folder_identity, load_run, run_folders
from alibi_lm.settings import require
from alibi_lm.tasks.text import TextTask

EXPECTED = (ValueError, OSError, CheckpointError)
"""What can be wrong with a run; anything else is a mistake of ours and ends the command."""

VALIDATION_TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}
"""Nats per token by which an evaluation may differ from the validation of the training, by its precision."""


class FailedRuns(ValueError):
    """Some of `total` runs could not be evaluated: what is wrong with each, by the run's name."""

    def __init__(self, failures: Mapping[str, Exception], total: int) -> None:
        rest = "; the others were" if len(failures) < total else ""
        lines = [f"{len(failures)} of {total} runs could not be evaluated{rest}."]
        lines += [f"  {name}: {error}" for name, error in failures.items()]
        super().__init__("\n".join(lines))
        self.failures = dict(failures)


def raise_failures(failures: Mapping[str, Exception], total: int) -> None:
    """Tell what went wrong, if anything did; where all runs failed for one reason, its own error says it all."""
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

    @property
    def name(self) -> str:
        """What rows and figures call it."""
        return self.folder.resolve().name


@dataclass(frozen=True)
class OpenRun:
    """A run with its model and its text, ready to be scored."""

    plan: PlannedRun
    corpus: Corpus
    passes: Passes
    way: dict[str, str]
    """How it is scored: checkpoint, attention, precision; each row names them."""


def plan(config: EvaluateConfig) -> tuple[list[PlannedRun], dict[str, Exception]]:
    """Find the runs and settle lengths, mode, stride and split; nothing is loaded yet.

    Returns what is wrong with those that cannot be planned, by name, beside the others.

    Raises:
        ValueError: no run, a run that is not finished, two runs of one name, or rows of another run of that name
            in the results.
    """
    pattern = config.runs or str(experiment_folder(config.experiment) / "runs" / "*")
    folders = run_folders(pattern)
    require(
        bool(folders),
        f"runs = {pattern} matches no folder. Train first (make train), or give runs=<run folder or glob>.",
    )
    if not Path(pattern).is_dir():
        # A sweep still under way has unfinished folders beside finished ones: those can be evaluated already.
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
            f"runs = {pattern}: {other.folder} and {folder} have one name, {run.name}, by which rows and curves "
            "know a run. Evaluate them one after another, each with an output_dir of its own, or rename one.",
        )
    if not runs:
        raise_failures(failures, len(folders))
    return list(runs.values()), failures


def open_corpus(config: EvaluateConfig, run: PlannedRun) -> Corpus:
    """The text to evaluate on, encoded with the run's own tokenizer.

    Raises:
        ValueError: the text is missing, or a prepared stream belongs to another tokenizer.
    """
    changes = {name: value for name, value in dataclasses.asdict(config.data).items() if value is not None}
    data = dataclasses.replace(run.config.data, **changes)
    path = run.folder / "tokenizer.json"
    tokenizer = Tokenizer.load(path)
    record = run.folder / CORPUS_FILE
    if record.is_file():
        trained_with = (read_json(record).get("tokenizer") or {}).get("sha256")
        require(
            tokenizer.hash == trained_with,
            f"{path} is not the tokenizer that the run was trained with ({str(trained_with)[:12]} by corpus.json, "
            f"{tokenizer.hash[:12]} now). Put the right one back, or train the run anew.",
        )
    return prepare(data, tokenizer, splits=(run.settings.split,))


def open_run(config: EvaluateConfig, run: PlannedRun, device: torch.device, world: World | None = None) -> OpenRun:
    """Load a run's model, once for all lengths, and open its text.

    Raises:
        ValueError: see `open_corpus` and `load_run`.
    """
    corpus = open_corpus(config, run)
    model = load_run(
        run.folder,
        checkpoint=config.checkpoint,
        attention=config.attention,
        device=device,
        position=config.position or None,
        precision=config.precision,
        query_scale=config.query_scale or None,
    )
    require(
        model.vocab_size == corpus.vocab_size,
        f"{run.folder / 'tokenizer.json'} has {corpus.vocab_size} tokens, the run's model {model.vocab_size}. "
        "Put the run's own tokenizer back.",
    )
    stream = corpus.split(run.settings.split)
    text = TextTask(
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
    store, tokens_per_forward = TokenStore(config.tokens), run.settings.tokens_per_forward
    passes = Passes(model, text, store, tokens_per_forward, world, run.config.position.name)
    way = {"checkpoint": config.checkpoint, "attention": model.backend.name, "precision": str(model.precision)}
    opened = OpenRun(run, corpus, passes, way)
    _check_validation(config, opened)
    return opened


def _check_validation(config: EvaluateConfig, opened: OpenRun) -> None:
    """Refuse a run whose model does not have the validation loss that its training recorded.

    It can be known where the training's own validation is repeated: same text, split, length and windows.
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
