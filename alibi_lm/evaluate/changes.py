"""Test-time changes of a trained model for longer inputs, tuned on one split and scored on another.

Each change is tried with several values at each inference length, and the one with the lowest loss on the
validation split is scored on the test split. What is tried:

    crop            the last L tokens before a target are its only input: the baseline that a change must beat
    unchanged       the model as it was trained
    of the scheme   the changes that the config of the position scheme lists in `test_changes`
    log n           query_scale=log_n, with several lengths from which scores grow
    SSMax           query_scale=ssmax, with s = m / ln L for several m; the same in all heads
    temperature     query_scale=constant, with several factors

Scales of the queries are not tried on a run that was trained with one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from alibi_lm import runtime
from alibi_lm.config import TrainConfig
from alibi_lm.data.prepare import prepare
from alibi_lm.evaluate.config import EvaluateConfig, EvaluateData
from alibi_lm.evaluate.passes import Passes
from alibi_lm.evaluate.plan import EXPECTED, PlannedRun, open_run, plan, raise_failures
from alibi_lm.evaluate.rows import common_fields, measure
from alibi_lm.evaluate.store import Stored
from alibi_lm.load import run_tokenizer
from alibi_lm.positions import POSITIONS
from alibi_lm.results.curves import CHECKPOINT
from alibi_lm.results.rows import ResultRow, locked, read_rows, write_rows
from alibi_lm.runs import experiment_folder
from alibi_lm.settings import require
from alibi_lm.tasks.base import Task

CROP, UNCHANGED = "crop to L", "unchanged"
Candidate = dict[str, Any]
"""Changes as an EvaluateConfig takes them: {"position": {...}} or {"query_scale": {...}}."""


@dataclass
class ChangesConfig:
    """Which runs to change, and at which lengths."""

    runs: str
    """A run folder or a glob of them, in quotes."""
    experiment: str = "quick"
    """The experiment, which gives the default output_dir."""
    lengths: list[int] | None = None
    """Inference lengths; null: the run's own lengths above its training length."""
    checkpoint: str = "best"
    """best (lowest validation loss), last, or step:<number> of a kept checkpoint."""
    data: EvaluateData = field(default_factory=EvaluateData)
    attention: str = "auto"
    """Attention backend."""
    device: str = "auto"
    """auto, cpu or cuda."""
    precision: str = "float32"
    """Precision of scoring: float32, bfloat16 or auto."""
    threads: int | None = None
    """CPU threads; null: torch's choice."""
    output_dir: str | None = None
    """Where results go; null: outputs/<experiment>/test_time."""

    @property
    def output(self) -> Path:
        """Folder of the results."""
        return Path(self.output_dir) if self.output_dir else experiment_folder(self.experiment) / "test_time"

    def evaluation(self, split: str, length: int, changes: Candidate) -> EvaluateConfig:
        """An evaluation with some changes."""
        own = {"lengths": [length], "mode": "nonoverlapping", "split": split, "output_dir": str(self.output)}
        return EvaluateConfig(**vars(self) | own | changes)


class CroppedPasses(Passes):
    """Passes in which a target has at most the last L tokens of its window as input."""

    def result(self, length: int, window: int | None = None, task: Task | None = None) -> Stored:
        own = self.model.train_length
        if length <= own or task is not None:
            return super().result(length, window, task)
        nats = self.reset(length, own, stride=max(1, own // 8))
        return Stored(nats, None, 0.0, None, runtime.code_version()[0])

    def refuses(self, length: int, window: bool = False, positions: bool = False) -> str:
        return super().refuses(min(length, self.model.train_length), window, positions)


def candidates(run: TrainConfig, length: int) -> dict[str, list[Candidate]]:
    """The changes to try on a run at an inference length: name of a change -> its values."""
    trained = run.train_length
    of_scheme = run.position.test_changes(length / trained) if hasattr(run.position, "test_changes") else {}
    found: dict[str, list[Candidate]] = {UNCHANGED: [{}]}
    found |= {name: [{"position": values} for values in tried] for name, tried in of_scheme.items()}
    if run.query_scale.name != "none" or trained < 4:
        return found
    scales: dict[str, list[dict[str, Any]]] = {
        "log n": [{"name": "log_n", "length": max(2, trained * k // 4)} for k in (2, 4, 8)],
        "SSMax": [{"name": "ssmax", "start": m / math.log(trained)} for m in (0.8, 0.9, 1.0, 1.2)],
        "temperature": [{"name": "constant", "factor": factor} for factor in (0.8, 0.9, 1.1, 1.25)],
    }
    return found | {name: [{"query_scale": values} for values in tried] for name, tried in scales.items()}


def untried(run: TrainConfig) -> str:
    """Which changes mean nothing for a run, in words; empty if all were tried."""
    own = set(candidates(run, 2 * run.train_length))
    others = dict.fromkeys(
        name
        for kind in POSITIONS.values()
        if hasattr(kind, "test_changes")
        for name in kind().test_changes(2.0)
        if name not in own
    )
    parts = [f"{', '.join(others)}: changes of another scheme than position={run.position.name}"] if others else []
    if run.query_scale.name != "none":
        parts.append(f"scales of the queries: the run was trained with query_scale={run.query_scale.name}")
    return "; ".join(parts)


def change_and_evaluate(config: ChangesConfig) -> Iterator[ResultRow]:
    """Tune each change on the validation split and score it on the test split; yields a row for each and length.

    Rows go to `results.jsonl` and `documents.jsonl` of the output folder. Passes are kept there too, so an
    interrupted command continues where it stopped.

    Raises:
        ValueError: no finished run, lengths within the training length, or a text without one of the splits.
        FailedRuns: at the end, where some of several runs could not be evaluated.
    """
    device = runtime.start(config.device, threads=config.threads)
    runs, failures = plan(config.evaluation("validation", 1, {}))
    total = len(runs) + len(failures)
    config.output.mkdir(parents=True, exist_ok=True)
    for run in runs:
        try:
            yield from _of_run(config, run, device)
        except EXPECTED as error:
            failures[run.name] = error
    raise_failures(failures, total)


def _of_run(config: ChangesConfig, run: PlannedRun, device: torch.device) -> Iterator[ResultRow]:
    own = run.config
    lengths = sorted(config.lengths or [n for n in own.evaluation.lengths if n > own.train_length])
    require(
        bool(lengths) and lengths[0] > own.train_length,
        f"lengths = {lengths} with {run.name}. Give lengths above its train_length = {own.train_length}: changes "
        "are for inputs longer than in training.",
    )
    # Check that both splits exist before any work.
    for split in ("validation", "test"):
        prepare(config.data.apply(own.data), run_tokenizer(run.folder), splits=(split,))
    for length in lengths:
        tried = candidates(own, length) | {CROP: [{}]}
        bar = tqdm(total=sum(map(len, tried.values())), desc=f"{run.name} at {length}", leave=False, disable=None)
        for name, values in tried.items():
            losses = []
            for value in values if len(values) > 1 else []:
                losses.append(_validation_nats(config, run, length, value, device))
                bar.update()
            chosen = values[int(np.argmin(losses))] if losses else values[0]
            evaluation = config.evaluation("test", length, chosen)
            opened = open_run(evaluation, replace(run, settings=evaluation.settings(own)), device)
            common = common_fields(evaluation, opened, opened.passes.task)
            passes = opened.passes
            if name == CROP:
                passes = CroppedPasses(**vars(passes))
                common["changes"] = common["changes"] | {"crop": own.train_length}
            tuned = "validation" if len(values) > 1 else None
            common["extra"] |= {"change": name, "tuned_on": tuned, "values_tried": len(values)}
            common["extra"]["untried"] = untried(own)
            rows = measure(passes, length, config.output, **common)
            _forget_other_values(config.output / "results.jsonl", rows)
            yield from rows
        bar.close()


def _forget_other_values(path: Path, rows: list[ResultRow]) -> None:
    """Drop rows of an earlier tuning that chose another value: a run has one row of a change at a length."""

    def what(row: ResultRow) -> tuple[Any, ...]:
        step = row.changes.get(CHECKPOINT)
        return row.run, row.extra.get("change"), row.inference_length, row.split, row.corpus, step

    new = {what(row): row.key for row in rows}
    with locked(path):
        write_rows(path, [row for row in read_rows(path) if new.get(what(row), row.key) == row.key])


def _validation_nats(
    config: ChangesConfig, run: PlannedRun, length: int, value: Candidate, device: torch.device
) -> float:
    """Sum of nats on the validation split; infinite where the model cannot run."""
    evaluation = config.evaluation("validation", length, value)
    passes = open_run(evaluation, replace(run, settings=evaluation.settings(run.config)), device).passes
    found = math.inf if passes.refuses(length) else float(passes.nats(length).sum(dtype=np.float64))
    return found if math.isfinite(found) else math.inf
