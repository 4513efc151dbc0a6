"""An experiment by name: its runs, all of them side by side, their curves, and its further measurements."""

from __future__ import annotations

import copy
import functools
import itertools
import os
import queue
import shlex
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch

from alibi_lm.config import TrainConfig, load_config, register, spelled, to_config
from alibi_lm.evaluate.changes import ChangesConfig
from alibi_lm.evaluate.config import EvaluateConfig
from alibi_lm.files import require_writable
from alibi_lm.runs import Status, differing_settings, experiment_folder, failed, run_name, short_hash, status
from alibi_lm.runtime import allowed_cores
from alibi_lm.settings import describe_error, parse, require
from alibi_lm.tasks.items import Synthetic
from alibi_lm.tracking import METRICS_FILE, read_metrics

ROOT = Path(__file__).resolve().parent.parent
Work = Callable[[], int | None]


# --- settings of a run ---------------------------------------------------------------------------


def compose(overrides: list[str], name: str = "train", config: type = TrainConfig) -> Any:
    """The config that these Hydra overrides describe: a TrainConfig, or what configs/<name>.yaml stands on.

    Works inside and outside a Hydra job, without touching Hydra's global state.

    Raises:
        ValueError: settings that do not fit together.
        hydra.errors.HydraException: an override that does not fit the schema.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    loader = _loader(name, config)
    parsed = OverridesParser.create().parse_overrides(spelled(overrides, config))
    loader.validate_sweep_overrides_legal(parsed, RunMode.RUN, from_shell=True)
    # Like Hydra: first merge the chosen entries, which takes most of the time, then set values.
    values, choices = list[Any](), list[Any]()
    for override in parsed:
        key, single = override.key_or_group, not isinstance(override.value(), dict)
        group = key.startswith("hydra.") or (single and loader.repository.group_exists(key))
        (choices if group else values).append(override)
    changed = max(path.stat().st_mtime_ns for path in (ROOT / "configs").rglob("*"))
    cfg = copy.deepcopy(_merged(ROOT, name, config, tuple(str(o.input_line) for o in choices), changed))
    loader._apply_overrides_to_config(values, cfg)
    OmegaConf.resolve(cfg)
    return to_config(cfg)


@functools.lru_cache(maxsize=64)
def _merged(root: Path, name: str, config: type, choices: tuple[str, ...], changed: int) -> Any:
    """The chosen entries merged; `root` and the time of its files' last change are part of the cache's key."""
    from hydra.types import RunMode
    from omegaconf import open_dict

    cfg = _loader(name, config).load_configuration(Path(name).name, list(choices), RunMode.RUN)
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg


def _loader(name: str, config: type) -> Any:
    """Hydra's loader of the configs beside configs/<name>.yaml and of its groups' entries."""
    from hydra import version
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra._internal.utils import create_config_search_path

    version.setbase("1.3")
    root = ROOT / "configs" / name
    register(root.name, config)
    return ConfigLoaderImpl(create_config_search_path(str(root.parent)))


def run_folder(config: TrainConfig) -> Path:
    """The run's folder: `output_dir`, or its name below outputs/<experiment>/runs.

    The name carries a short hash of the settings that differ from the experiment's own, if any do.
    """
    if config.output_dir is not None:
        return Path(config.output_dir)
    own = {"experiment": config.experiment, "position": config.position.name}
    own |= {"train_length": str(config.train_length), "seed": str(config.seed), "task": config.task.name}
    differences = differing_settings(config, compose([f"{name}={value}" for name, value in own.items()]))
    name = run_name(config, short_hash(differences) if differences else "")
    return experiment_folder(config.experiment) / "runs" / name


def planned_runs(experiment: str, overrides: list[str]) -> dict[Path, tuple[list[str], TrainConfig]]:
    """An experiment's runs, from its `study` and further overrides, by the rules of a Hydra multirun.

    Returns:
        Run folder -> (the overrides that describe the run, its config), in the order of the study.

    Raises:
        ValueError: the experiment names no runs, or all of them would share a folder.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    for override in overrides:
        require(
            not override.startswith("output_dir="),
            f"{override}: the runs of an experiment have a folder each, outputs/{experiment}/runs/<name>. "
            "Leave it out here; make train takes it, for one run.",
        )
    sweeps = compose([f"experiment={experiment}", *_named("study", overrides)]).study
    require(bool(sweeps), f"experiment={experiment} has no `study`: it names no runs. Use make train instead.")
    parser = OverridesParser.create(_loader("train", TrainConfig))  # position=glob(*) needs to know all schemes
    runs = {}
    for sweep in sweeps:
        (jobs,) = BasicSweeper.split_arguments(parser.parse_overrides([*sweep.split(), *overrides]), None)
        for job in jobs:
            arguments = [f"experiment={experiment}", *job]
            config = compose(arguments)
            runs[run_folder(config)] = arguments, config
    return runs


def _named(name: str, overrides: list[str]) -> list[str]:
    return [override for override in overrides if override.startswith(f"{name}=")]


# --- single steps --------------------------------------------------------------------------------


def prepare_corpus(config: TrainConfig) -> None:
    """Prepare the corpus, verify every hash, and print what was found; nothing where a run has a task instead."""
    from alibi_lm.data.corpus import report, verify
    from alibi_lm.data.prepare import prepare

    if isinstance(config.task, Synthetic):
        return
    corpus = prepare(config.data, config.tokenizer)
    verify(corpus)
    print(report(corpus), flush=True)


def evaluate_and_draw(config: EvaluateConfig) -> None:
    """Evaluate, write results.jsonl row by row, then draw figure and table, even if some runs failed.

    Raises:
        ValueError: the output folder cannot be written, or see `evaluate`.
    """
    from alibi_lm import distributed
    from alibi_lm.evaluate.plan import FailedRuns
    from alibi_lm.evaluate.rows import describe
    from alibi_lm.evaluate.sweep import evaluate, log_curve
    from alibi_lm.study.figures import draw

    if config.model is not None:
        import alibi_lm.interop.huggingface  # noqa: F401, lets transformers load exported runs
    world = distributed.start(config.device)
    failure = None
    try:
        if world.is_main:
            require_writable(config.output)
        try:
            for row in evaluate(config, world):
                if world.is_main:
                    print(describe(row), flush=True)
        except FailedRuns as error:
            failure = error
        if world.is_main and config.draw:
            log_curve(config)
            paths = draw(config.output)
            print(next(p for p in paths if p.suffix == ".md").read_text(encoding="utf-8"), *paths, sep="\n")
    finally:
        distributed.stop()
    if failure is not None:
        raise failure


def analyse_and_draw(config: EvaluateConfig) -> None:
    """Compute each view, write its data, then its figure."""
    from alibi_lm.evaluate.sweep import analyse
    from alibi_lm.study.view_figures import draw_analysis

    if config.model is not None:
        import alibi_lm.interop.huggingface  # noqa: F401
    require_writable(config.output)
    for path in analyse(config):
        drawn = draw_analysis(path)
        print(drawn[-1].read_text(encoding="utf-8"), path, *drawn, sep="\n", flush=True)


def change_and_draw(config: ChangesConfig) -> None:
    """Tune and score test-time changes, write results.jsonl row by row, then the table."""
    from alibi_lm.evaluate.changes import change_and_evaluate
    from alibi_lm.evaluate.rows import describe
    from alibi_lm.files import write_text
    from alibi_lm.results.documents import read_documents
    from alibi_lm.results.rows import read_rows
    from alibi_lm.study.change_table import change_tables

    require_writable(config.output)
    for row in change_and_evaluate(config):
        print(describe(row), flush=True)
    text = change_tables(read_rows(config.output / "results.jsonl"), read_documents(config.output))
    write_text(config.output / "table.md", text)
    print(f"\n{text}\n{config.output / 'table.md'}")


# --- all runs, and what follows ------------------------------------------------------------------


def reproduce(experiment: str, overrides: list[str]) -> int:
    """Train and evaluate every run of an experiment, then draw; what is finished is skipped.

    On a CPU as many runs are trained in parallel as there are cores for their `threads`: two processes with one
    thread each do more than one process with two, and do not wait for each other when the machine is busy.

    Returns:
        Exit status: 0 if all went well. A run that fails does not stop the others.
    """
    runs = planned_runs(experiment, overrides)
    config = next(iter(runs.values()))[1]
    at_once = _at_once(config, len(runs))
    print(f"experiment={experiment}: {len(runs)} runs, {at_once} at a time", flush=True)
    shared = [*_named("device", overrides), *_named("threads", overrides)]
    if at_once > 1:
        shared.append(f"threads={config.threads or 1}")
    # The corpus first and alone, with its progress bars: the runs would only wait for each other.
    prepare_corpus(config)
    slots: queue.SimpleQueue[int] = queue.SimpleQueue()
    for slot in range(at_once):
        slots.put(slot)

    def run(folder: Path) -> int:
        arguments, config = runs[folder]
        if _is_finished(folder, config):
            print(f"{folder.name}: already finished", flush=True)
            return 0
        slot = slots.get()
        try:
            bar = {"TQDM_POSITION": str(slot)}  # a line of the terminal for each bar
            own = [f"experiment={experiment}", f"runs={folder}", "draw=false", *shared]
            return _child("train", arguments, bar) or _child("evaluate", own, bar)
        finally:
            slots.put(slot)

    with ThreadPoolExecutor(at_once) as pool:
        lost = [folder.name for folder, status in zip(runs, pool.map(run, runs), strict=True) if status]
    # This scores what is not scored yet, gathers and draws; also where a run failed.
    tracking = [o for o in overrides if o.startswith("tracking")]
    evaluation = compose([f"experiment={experiment}", *shared, *tracking], "evaluation/evaluate", EvaluateConfig)
    if _step(partial(evaluate_and_draw, evaluation)):
        lost.append("the curve of all runs")
    if lost:
        print(f"of {len(runs)} runs, these failed: {', '.join(lost)}", file=sys.stderr)
    return int(bool(lost))


def study(experiment: str, overrides: list[str]) -> int:
    """Do all of an experiment: runs, curves, `measurements`, claims, the paper's numbers, report, publication.

    What is done is skipped, so the command can be repeated until everything is done. A step that fails does not
    stop the others. Analyses that follow each other run side by side, as many as runs in training.

    Args:
        experiment: its name.
        overrides: of training; `device=`, `threads=` and `runs_at_once=` hold for the measurements too.

    Returns:
        Exit status: 0 if every step went well.

    Raises:
        ValueError: a measurement that is not a script, or settings that it does not know.
    """
    from alibi_lm.study import commands

    shared = [*_named("device", overrides), *_named("threads", overrides)]
    own = [*shared, *_named("runs_at_once", overrides), *_named("measurements", overrides)]
    config = compose([f"experiment={experiment}", *own])
    lines, at_once = config.measurements, _at_once(config, len(config.measurements))
    bench = "outputs/bench/results.jsonl" if any(line.startswith("bench") for line in lines) else None
    steps: list[tuple[str, Work]] = [
        (shlex.join(["reproduce", *overrides]), partial(reproduce, experiment, overrides)),
        *((line, measurement(experiment, line, shared, at_once)) for line in lines),
        ("claims", partial(commands.claims, commands.StudyConfig(experiment))),
        ("compare_paper", partial(commands.compare_paper, commands.ComparePaperConfig(experiment))),
        ("report", partial(commands.report, commands.StudyConfig(experiment))),
        ("publish", partial(commands.publish_results, commands.PublishConfig(experiment, bench=bench))),
    ]

    def do(step: tuple[str, Work]) -> int:
        print(f"\n== {step[0]}", flush=True)
        return _step(step[1])

    lost = []
    for analyses, group in itertools.groupby(steps, key=lambda step: step[0].startswith("analyse ")):
        together = list(group)
        if analyses and at_once > 1:
            with ThreadPoolExecutor(at_once) as pool:
                done = list(pool.map(do, together))
        else:
            done = list(map(do, together))
        lost += [name for (name, _), failed in zip(together, done, strict=True) if failed]
    if lost:
        print(f"{len(lost)} of {len(steps)} steps failed: {'; '.join(lost)}", file=sys.stderr)
    return int(bool(lost))


def measurement(experiment: str, line: str, shared: list[str], at_once: int = 1) -> Work:
    """One of an experiment's `measurements` as work to do; its settings are checked at once.

    Args:
        experiment: its name.
        line: evaluate, analyse or bench, and settings of that command; or cards, and those of evaluate.
        shared: further settings.
        at_once: how many analyses go side by side; each has a process of its own if it is more than one.

    Raises:
        ValueError: another command, or settings that it does not know.
    """
    name, *arguments = shlex.split(line) or [""]
    if name == "bench":
        sys.path.append(str(ROOT))  # the benchmark is not part of the package
        from benchmarks.run import BenchConfig

        parse(BenchConfig, [*arguments, *shared])
        return partial(_child, name, [*arguments, *shared])
    from alibi_lm.evaluate.cards import write_cards

    allowed = {"evaluate": evaluate_and_draw, "analyse": analyse_and_draw, "cards": write_cards}
    require(
        name in allowed,
        f"measurements: {line!r} begins with {name!r}. Allowed: evaluate, analyse, bench, cards and settings.",
    )
    kind = "evaluate" if name == "cards" else name
    settings = [f"experiment={experiment}", *arguments, *shared]
    config = compose(settings, f"evaluation/{kind}", EvaluateConfig)
    if name == "analyse" and at_once > 1:
        return partial(_child, name, [*settings, f"threads={config.threads or 1}"])
    return partial(allowed[name], config)


def print_status(experiment: str, overrides: list[str]) -> int:
    """Print a line for each run of an experiment.

    A run is finished, running (a living process holds its folder), failed (with its error), partial (stopped or
    killed: the training command resumes it) or missing (planned, and never begun).
    """
    planned = {folder: config.steps for folder, (_, config) in planned_runs(experiment, overrides).items()}
    found = {path.parent for path in (experiment_folder(experiment) / "runs").glob("*/config.yaml")}
    states = {folder: status(folder) for folder in [*planned, *sorted(found - set(planned))]}
    order = get_args(Status)
    for folder in sorted(states, key=lambda f: (order.index(states[f]), f)):
        message = " ".join((failed(folder) or "").split()) if states[folder] == "failed" else ""
        progress = _progress(folder, planned.get(folder))
        print(f"{states[folder]:8}  {folder!s:50}  {progress:>12}  {message}".rstrip())
    counts = {state: list(states.values()).count(state) for state in order}
    print(", ".join(f"{count} {state}" for state, count in counts.items() if count or state == "finished"))
    return 0


def _progress(folder: Path, planned: int | None) -> str:
    """`<last step with metrics>/<steps>`; empty before the first row."""
    try:
        rows = read_metrics(folder / METRICS_FILE)
    except (OSError, ValueError):
        return ""
    try:
        steps: int | None = load_config(folder).steps
    except ValueError:
        steps = planned
    return f"{rows[-1]['step']}/{steps or '?'}" if rows else ""


def _at_once(config: TrainConfig, runs: int) -> int:
    """How many runs go side by side."""
    if config.runs_at_once is not None:
        return min(runs, config.runs_at_once)
    if config.threads is None or (config.device != "cpu" and torch.cuda.is_available()):
        return 1
    return min(runs, max(1, allowed_cores() // config.threads))


def _is_finished(folder: Path, config: TrainConfig) -> bool:
    """Whether training this run again would say that it is finished; in doubt it is asked."""
    if config.overwrite or status(folder) != "finished":
        return False
    try:
        return not differing_settings(load_config(folder), config)
    except ValueError:
        return False


def _step(work: Work) -> int:
    """Do one of several things and return its exit status; an error ends only this one."""
    try:
        return work() or 0
    except Exception as error:
        print(describe_error(error), file=sys.stderr, flush=True)
        return 1


def _child(name: str, arguments: list[str], environment: dict[str, str] | None = None) -> int:
    """Run a script in a separate process; returns its exit status."""
    command = [sys.executable, str(ROOT / "scripts" / f"{name}.py"), *arguments]
    return subprocess.run(command, check=False, env={**os.environ, **(environment or {})}).returncode
