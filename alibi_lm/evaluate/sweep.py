"""Runs times inference lengths: the rows of an extrapolation curve, and the views of an analysis.

Both commands find and open runs in the same way (`plan`, `open_run`) and take passes from the same store. A run
that fails does not stop the others: `FailedRuns` reports the failures at the end.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alibi_lm import runtime
from alibi_lm.distributed import World
from alibi_lm.evaluate import views
from alibi_lm.evaluate.config import STREAM, VIEWS, EvaluateConfig
from alibi_lm.evaluate.plan import EXPECTED, OpenRun, PlannedRun, open_run, plan, raise_failures
from alibi_lm.evaluate.rows import baseline, changes_of, common_fields, curve_name, keep, measure, measure_stream
from alibi_lm.evaluate.self_longppl import finish
from alibi_lm.evaluate.stream import Policy
from alibi_lm.files import write_text
from alibi_lm.results.rows import ResultRow, read_rows, refuse_another_run, upsert_rows, write_csv
from alibi_lm.runs import short_hash
from alibi_lm.settings import counting, require
from alibi_lm.tasks.items import Synthetic
from alibi_lm.tracking import open_tracker

CURVE_COLUMNS = (
    "curve", "run", "position", "train_length", "seed", "inference_length", "mode", "stride", "split",
    "task", "value", "tokens_per_second", "peak_memory_bytes",
)  # fmt: skip
"""Columns of the tables in Weights & Biases: the name of a row's curve, and fields; `value` goes by its metric."""


def evaluate(config: EvaluateConfig, world: World | None = None) -> Iterator[ResultRow]:
    """Evaluate every run at every length, writing and yielding each row as soon as it is known.

    Raises:
        ValueError: see `plan`.
        FailedRuns: at the end, where some of several runs could not be evaluated; with several processes the first
            failure of an opened run ends the work instead.
    """
    require(
        config.view == "curve", f"view = {config.view} is a view of scripts/analyse.py. Use that, or view=curve."
    )
    world = world or World()
    device = runtime.start(config.device, world.local_rank, config.threads)
    runs, failures = plan(config)
    results, output = config.output / "results.jsonl", config.output if world.is_main else None
    if world.is_main:
        _make(config.output)
    if results.exists():
        # Find out before the work whether rows can be added to the file.
        refuse_another_run(read_rows(results), {run.name: (run.run_id, str(run.folder)) for run in runs})
    total, texts = len(runs) + len(failures), set()
    for run in runs:
        try:
            opened = open_run(config, run, device, world)
            task = opened.passes.task
            if (task.corpus, task.split) not in texts:
                texts.add((task.corpus, task.split))
                if row := baseline(config, opened):
                    yield from keep(output, [row])
            if config.mode == STREAM:
                common = common_fields(config, opened, opened.passes.text)
                yield from measure_stream(opened.passes, Policy.of(config), output, **common)
                continue
            for passes in opened.asked:
                common = common_fields(config, opened, passes.task)
                for length in run.settings.lengths:
                    yield from measure(passes, length, output, **common)
        except EXPECTED as error:
            if world.world_size > 1:  # the other processes may wait for this one in this run
                raise
            failures[run.name] = error
    if world.is_main and results.exists():
        write_csv(config.output / "results.csv", upsert_rows(results, []))
    raise_failures(failures, total)


def log_curve(config: EvaluateConfig) -> None:
    """Log the curves to Weights & Biases, if it is chosen: a table and a plot for each metric, in one run."""
    if config.tracking.name != "wandb":
        return
    rows = [
        row
        for row in read_rows(config.output / "results.jsonl")
        if row.run is not None and row.value is not None and row.inference_length is not None
    ]
    settings = {"experiment": config.experiment, "runs": sorted({str(row.run) for row in rows})}
    name = f"{config.experiment} extrapolation"
    with open_tracker(config.tracking, config.output, name, config.experiment, settings) as tracker:
        for metric, title in (("perplexity", "extrapolation"), ("accuracy", "accuracy")):
            own = [row for row in rows if row.metric == metric]
            columns = [metric if column == "value" else column for column in CURVE_COLUMNS]
            body = [[curve_name(row), *(getattr(row, column) for column in CURVE_COLUMNS[1:])] for row in own]
            if own:
                tracker.table(title, columns, body, line_plot=("inference_length", metric, "curve"))
                tracker.summary({f"{title}/{curve_name(r)}@{r.inference_length}": r.value for r in own})


# --- views ---------------------------------------------------------------------------------------


def analyse(config: EvaluateConfig) -> Iterator[Path]:
    """Compute the requested views of all runs, seeds of a curve together; yields the file of each view.

    Raises:
        ValueError: no runs, missing text, or a setting out of range.
        FailedRuns: at the end, where some of several runs could not be analysed.
    """
    require(
        config.view != "curve", "view = curve is what scripts/evaluate.py computes. Use that, or another view."
    )
    device = runtime.start(config.device, threads=config.threads)
    runs, failures = plan(config)
    for run in runs:
        require(
            not isinstance(run.config.task, Synthetic),
            f"view = {config.view} needs a text, and {run.name} was trained on items of {run.config.task.name}. "
            "Use view=curve (scripts/evaluate.py), or name runs that were trained on a text.",
        )
    total = len(runs) + len(failures)
    series: dict[str, list[dict[str, Any]]] = {
        name: [] for name in (VIEWS if config.view == "all" else [config.view])
    }
    corpora: dict[str, str] = {}
    for members in _by_seed(runs):
        opened = []
        for run in members:
            try:
                opened.append(open_run(config, run, device))
            except EXPECTED as error:
                failures[run.name] = error
        if not opened:
            continue
        try:
            who = ", ".join(run.plan.name for run in opened)
            require(
                len({run.passes.text.sha256 for run in opened}) == 1,
                f"runs {who} differ in their seed only, but their texts are encoded differently. "
                "Analyse them one at a time: runs=<run folder>.",
            )
            first = opened[0].plan.config
            group = views.Group(first.position.name, first.train_length, [run.passes for run in opened])
            corpora[str(opened[0].passes.text.corpus)] = getattr(opened[0].corpus, "name", "")
        except EXPECTED as error:
            failures |= {run.plan.name: error for run in opened}
            continue
        for name, found in series.items():
            print(f"{name}: {', '.join(group.labels)}", flush=True)
            try:
                found.append(_series(config, name, opened, group))
            except EXPECTED as error:  # of view=all the others can still be had
                for lost in opened:
                    failures.setdefault(lost.plan.name, error)
    finish(series.get("self_longppl", []))
    for name, found in series.items():
        if found:
            content = {
                "view": name,
                "experiment": config.experiment,
                "split": runs[0].settings.split,
                "corpora": corpora,
                "commit": runtime.code_version()[0],
                "series": found,
            }
            _make(config.output)
            path = config.output / f"{name}.json"
            write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
            yield path
    raise_failures(failures, total)


def _by_seed(runs: list[PlannedRun]) -> list[list[PlannedRun]]:
    """Group runs that differ only in their seed; longest training length first, then by scheme."""
    found: dict[str, list[PlannedRun]] = {}
    for run in runs:
        key = short_hash({k: v for k, v in counting(run.config, "run").items() if k != "seed"})
        members = found.setdefault(key, [])
        if any(run.config.seed == other.config.seed for other in members):
            members = found[f"{key} {run.folder}"] = []
        members.append(run)
    return sorted(found.values(), key=lambda m: (-m[0].config.train_length, m[0].config.position.name))


def _series(config: EvaluateConfig, view: str, opened: list[OpenRun], group: views.Group) -> dict[str, Any]:
    """One curve of a view; for `self_longppl` the data from which `finish` makes it once all curves are done."""
    lengths = opened[0].plan.settings.lengths
    if view == "documents" and config.lengths is None:
        lengths = sorted({group.train_length, max(lengths)})
    own = {name: getattr(config, name) for name in VIEWS[view].settings if name != "lengths"}
    points = VIEWS[view].measure(group, lengths, **own)
    found: dict[str, Any] = {
        "position": group.position,
        "train_length": group.train_length,
        "corpus": opened[0].passes.text.corpus,
        "tokens": group.num_tokens,
        "documents": len(group.documents),
        "runs": group.labels,
        "changes": changes_of(config),
        "interval": "seeds and documents" if len(opened) > 1 else "documents, given this seed",
        **(points if isinstance(points, dict) else {"points": points}),
    }
    if "verdict" in found:
        print(f"  {found['verdict']}", flush=True)
    return found | ({"note": group.note} if group.note else {})


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"output_dir = {folder} cannot be written ({error.strerror or error}). Give another folder."
        ) from error
