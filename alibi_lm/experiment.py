"""Experiments by name: where their runs lie, and how to run all of them."""

from __future__ import annotations

import os
import queue
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from alibi_lm.config import TrainConfig, register, to_config
from alibi_lm.runs import differing_settings, run_name, short_hash
from alibi_lm.settings import require

ROOT = Path(__file__).resolve().parent.parent


def compose(overrides: list[str]) -> TrainConfig:
    """The training config that these Hydra overrides describe.

    Works inside and outside a Hydra job, without touching Hydra's global state.

    Raises:
        ValueError: settings that do not fit together.
        hydra.errors.HydraException: an override that does not fit the schema.
    """
    from hydra import version
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra._internal.utils import create_config_search_path
    from hydra.types import RunMode
    from omegaconf import OmegaConf, open_dict

    version.setbase("1.3")

    register()
    loader = ConfigLoaderImpl(create_config_search_path(str(ROOT / "configs")))
    cfg = loader.load_configuration("train", overrides=overrides, run_mode=RunMode.RUN)
    with open_dict(cfg):
        del cfg["hydra"]
    OmegaConf.resolve(cfg)
    return to_config(cfg)


def run_folder(config: TrainConfig) -> Path:
    """The run's folder: `output_dir`, or its name below outputs/<experiment>/runs.

    The name carries a short hash of the settings that differ from the experiment's own, if any do.
    """
    if config.output_dir is not None:
        return Path(config.output_dir)
    baseline = compose(
        [
            f"experiment={config.experiment}",
            f"position={config.position.name}",
            f"train_length={config.train_length}",
            f"seed={config.seed}",
        ]
    )
    differences = differing_settings(config, baseline)
    name = run_name(
        config.position.name,
        config.train_length,
        config.seed,
        short_hash(differences) if differences else None,
    )
    return Path("outputs") / config.experiment / "runs" / name


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
        if override.startswith("output_dir="):
            raise ValueError(
                f"{override}: the runs of an experiment have a folder each, outputs/{experiment}/runs/<name>. "
                "Leave it out here; make train takes it, for one run."
            )
    chosen = [o for o in overrides if o.startswith("study=")]
    study = compose([f"experiment={experiment}", *chosen]).study
    if not study:
        raise ValueError(f"experiment={experiment} has no `study`: it names no runs. Use make train instead.")
    parser = OverridesParser.create()
    runs = {}
    for sweep in study:
        (jobs,) = BasicSweeper.split_arguments(parser.parse_overrides([*sweep.split(), *overrides]), None)
        for job in jobs:
            config = compose([f"experiment={experiment}", *job])
            runs[run_folder(config)] = ([f"experiment={experiment}", *job], config)
    return runs


def reproduce(experiment: str, overrides: list[str]) -> int:
    """Train and evaluate every run of an experiment, then draw; what is finished is skipped.

    On a CPU as many runs go side by side as there are cores for their `threads`: two processes of one thread
    each do more than one process of two, and do not wait for each other when the machine is busy.

    Returns:
        Exit status: 0 if all went well. A run that fails stops no other.
    """
    runs = planned_runs(experiment, overrides)
    config = next(iter(runs.values()))[1]
    at_once = 1
    if config.threads is not None and (config.device == "cpu" or not torch.cuda.is_available()):
        at_once = min(len(runs), max(1, (os.cpu_count() or 1) // config.threads))
    print(f"experiment={experiment}: {len(runs)} runs, {at_once} at a time", flush=True)
    shared = [o for o in overrides if o.startswith(("device=", "threads="))]
    side_by_side = [f"threads={config.threads}"] if at_once > 1 else []
    # The corpus first and alone, with its bars: the runs would only wait for each other.
    if status := _script("prepare_data.py", [f"experiment={experiment}", *overrides]):
        return status
    slots: queue.SimpleQueue[int] = queue.SimpleQueue()
    for slot in range(at_once):
        slots.put(slot)

    def run(folder: Path) -> int:
        slot = slots.get()
        try:
            # A line of the terminal for each bar.
            bar = {"TQDM_POSITION": str(slot)}
            return _script("train.py", runs[folder][0], bar) or _script(
                "evaluate.py",
                [f"experiment={experiment}", f"runs={folder}", "draw=false", *side_by_side, *shared],
                bar,
            )
        finally:
            slots.put(slot)

    with ThreadPoolExecutor(at_once) as pool:
        failed = [folder.name for folder, status in zip(runs, pool.map(run, runs), strict=True) if status]
    if failed:
        print(f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}", file=sys.stderr)
    # Each target is scored by now, so this only gathers and draws; also where a run failed.
    tracking = [o for o in overrides if o.startswith("tracking")]
    return _script("evaluate.py", [f"experiment={experiment}", *shared, *tracking]) or int(bool(failed))


def study(experiment: str, overrides: list[str]) -> int:
    """All of an experiment: runs, curves, its `measurements`, claims, the paper beside it, report, publication.

    What is done is skipped, so that the command can be given again until all of it is. A step that fails stops
    no other.

    Args:
        experiment: its name.
        overrides: of training; `device=` and `threads=` hold for the measurements too.

    Returns:
        Exit status: 0 if every step went well.

    Raises:
        ValueError: a measurement that is no script.
    """
    chosen = [o for o in overrides if o.startswith("measurements=")]
    shared = [o for o in overrides if o.startswith(("device=", "threads="))]
    steps = [["reproduce", *overrides]]
    for line in compose([f"experiment={experiment}", *chosen]).measurements:
        name, *arguments = shlex.split(line) or [""]
        require(
            name in ("evaluate", "analyse", "bench"),
            f"measurements: {line!r} begins with {name!r}. Allowed: evaluate, analyse, bench, and their settings.",
        )
        steps.append([name, *arguments, *shared])
    benchmark = ["bench=outputs/bench/results.jsonl"] if any(name == "bench" for name, *_ in steps) else []
    steps += [["claims"], ["compare_paper"], ["report"], ["publish", *benchmark]]
    failed = []
    for name, *arguments in steps:
        own = [] if name == "bench" else [f"experiment={experiment}"]
        print(f"\n== {name} {' '.join(arguments)}".rstrip(), flush=True)
        if _script(f"{name}.py", [*own, *arguments]):
            failed.append(shlex.join([name, *arguments]))
    if failed:
        print(f"{len(failed)} of {len(steps)} steps failed: {'; '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def _script(name: str, arguments: list[str], environment: dict[str, str] | None = None) -> int:
    command = [sys.executable, str(ROOT / "scripts" / name), *arguments]
    return subprocess.run(command, check=False, env={**os.environ, **(environment or {})}).returncode
