"""A study on a machine without a network, like the compute nodes of many clusters, within a given time.

    pack      where there is a network: code, wheels, prepared token streams and the list of runs, in one folder
    work      there: a check, the benchmark, then the runs, some at a time, and an evaluator that follows them
    collect   there: results, records and logs in one archive, without weights

`start.sh` in the folder does the last two. Nothing is installed into the machine's Python, which must have torch.
A run that is interrupted at the end of the time saves its state, and continues when `start.sh` is run again.

Everything is compressed, because the size of uploads to a node is often limited.
"""

from __future__ import annotations

import importlib.util
import lzma
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alibi_lm.files import read_json, write_json, write_text
from alibi_lm.runs import status
from alibi_lm.settings import require, require_at_least, require_one_of

ROOT = Path(__file__).resolve().parents[1]
START = """#!/bin/sh
# sh start.sh seconds=840 trainers=2 'bench=lengths=[512] seconds=60'
cd "$(dirname "$0")" || exit 1
export PYTHONPATH="$PWD/code:$PWD/site"
[ -d code ] || python3 -m tarfile -e code.tar.xz code || exit 1
python3 -m tarfile -e texts.tar.xz . || exit 1
if [ -d wheels ] && [ ! -d site ]; then
    python3 -m pip install --quiet --no-index --find-links wheels --target site WHEELS || exit 1
fi
python3 code/scripts/offline.py do=work folder=. "$@"
status=$?
python3 code/scripts/offline.py do=collect folder=. || exit 1
exit $status
"""


@dataclass
class OfflineConfig:
    """Settings of `scripts/offline.py`."""

    do: str
    """pack, work or collect."""
    folder: str = "outputs/offline"
    """Folder of the kit; `work` and `collect` write their files there too."""
    experiment: str = "quick"
    """pack: the experiment whose runs are packed."""
    overrides: list[str] = field(default_factory=list)
    """pack: settings of all runs, such as '[device=cuda,data.path=/data/wikitext]'."""
    wheels: list[str] = field(default_factory=list)
    """pack: packages that the machine lacks, downloaded with their dependencies, such as '[hydra-core]'."""
    seconds: float = 840.0
    """work: time limit in seconds, by which everything has ended."""
    trainers: int = 2
    """work: number of runs that train in parallel; a single small model leaves a GPU partly idle."""
    bench: str | None = None
    """work: settings of the benchmark, such as 'lengths=[512] seconds=60'; null: no benchmark."""

    def __post_init__(self) -> None:
        require_one_of("do", self.do, ("pack", "work", "collect"))
        require(self.seconds > 0, f"seconds = {self.seconds}. Use a number > 0.")
        require_at_least("trainers", self.trainers, 1)


def pack(config: OfflineConfig, planned_runs: Callable[..., Any], prepare_corpus: Callable[..., None]) -> None:
    """Fill the folder; the functions are those of `alibi_lm.experiment`.

    Raises:
        ValueError: settings that do not fit together, or a folder that holds other things.
        subprocess.CalledProcessError: git or pip failed.
    """
    folder = Path(config.folder).absolute()
    known = not folder.exists() or not any(folder.iterdir()) or (folder / "kit.json").is_file()
    require(known, f"folder = {folder} holds other things. Name another folder.")
    for name in ("code", "site", "wheels", "data"):
        shutil.rmtree(folder / name, ignore_errors=True)
    cache = f"data.cache_dir={folder / 'data'}"
    local = [] if any(o.startswith("tracking") for o in config.overrides) else ["tracking=jsonl"]
    runs = planned_runs(config.experiment, [*config.overrides, *local])
    prepare_corpus(next(iter(planned_runs(config.experiment, [*config.overrides, cache]).values()))[1])

    def git(*arguments: str) -> bytes:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], check=True, capture_output=True).stdout

    with tarfile.open(folder / "texts.tar.xz", "w:xz", preset=9) as archive:
        archive.add(folder / "data", "data")
    shutil.rmtree(folder / "data")
    (folder / "code.tar.xz").write_bytes(lzma.compress(git("archive", "HEAD")))
    if config.wheels:
        wheels = ["-d", str(folder / "wheels"), *config.wheels]
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", *wheels], check=True)
    unfinished = {path.name: overrides for path, (overrides, _) in runs.items() if status(path) != "finished"}
    shared = [o for o in config.overrides if o.startswith(("device=", "threads="))]
    kit = {"experiment": config.experiment, "commit": git("rev-parse", "HEAD").decode().strip()}
    write_json(folder / "kit.json", kit | {"shared": shared, "runs": unfinished})
    write_text(folder / "start.sh", START.replace("WHEELS", shlex.join(config.wheels)))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {len(unfinished)} runs, {size / 2**20:.0f} MiB. There: sh start.sh")


def work(config: OfflineConfig) -> int:
    """Check, measure, train and evaluate until the time is up; returns 1 if something failed."""
    end = time.monotonic() + config.seconds
    folder = Path(config.folder).absolute()
    kit = read_json(folder / "kit.json")
    place = folder / "work"
    place.mkdir(exist_ok=True)
    crew = Crew(place, {"ALIBI_LM_COMMIT": kit["commit"]}, end)

    def script(name: str, *arguments: str) -> list[str]:
        return [sys.executable, str(folder / "code" / "scripts" / f"{name}.py"), *arguments]

    cache = f"data.cache_dir={folder / 'data'}"
    smoke = ["experiment=smoke", "tracking=jsonl", "overwrite=true", "output_dir=check", cache]
    crew.run("check", script("train", *smoke, *kit["shared"]))
    if importlib.util.find_spec("pytest") is not None:
        tests = ["-q", "-m", "gpu", "-W", "default", str(folder / "code" / "tests")]
        crew.run("gpu tests", [sys.executable, "-m", "pytest", *tests])
    if config.bench:
        crew.run("bench", script("bench", *config.bench.split()))
    runs = []
    for name, overrides in kit["runs"].items():
        path = f"outputs/{kit['experiment']}/runs/{name}"
        train = script("train", *overrides, cache, f"output_dir={path}")
        own = [f"experiment={kit['experiment']}", f"runs={path}", "draw=false", *kit["shared"]]
        runs.append((name, train, script("evaluate", *own)))
    crew.study(runs, config.trainers)
    return int(bool(crew.failed))


class Crew:
    """Runs commands, several at a time, until the time is up.

    Args:
        place: the folder in which commands run; their output goes to its logs/.
        environment: variables set for them.
        end: the time, by `time.monotonic`, by which all have ended.
        grace: seconds that an interrupted command has to save its work.

    Attributes:
        failed: names of the commands that ended with a status other than 0, except interrupted ones.
    """

    def __init__(self, place: Path, environment: dict[str, str], end: float, grace: float = 20.0) -> None:
        self.place, self.environment, self.end, self.grace = place, environment, end, grace
        self.failed: list[str] = []
        (place / "logs").mkdir(exist_ok=True)

    def run(self, name: str, command: Sequence[str]) -> bool:
        """Run one command, and interrupt it when the time is up; returns whether it finished its work."""
        began, interrupted = time.monotonic(), False
        if self.end - self.grace <= began:
            self._note(f"{name}: not begun, 0 s")
            return False
        with (self.place / "logs" / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command, cwd=self.place, env=os.environ | self.environment, stdout=log, stderr=subprocess.STDOUT
            )
        try:
            process.wait(self.end - self.grace - began)
        except subprocess.TimeoutExpired:
            interrupted = True
            process.terminate()
            try:
                process.wait(max(0.1, self.end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        verdict = "interrupted" if interrupted else "done"
        if process.returncode and not interrupted:
            verdict = f"failed ({process.returncode})"
            self.failed.append(name)
        self._note(f"{name}: {verdict}, {time.monotonic() - began:.0f} s")
        return verdict == "done"

    def study(self, runs: Sequence[tuple[str, Sequence[str], Sequence[str]]], trainers: int) -> None:
        """Train runs in order, `trainers` at a time, and evaluate each finished one, one after the other.

        A run is given by its name, its training command and its evaluation command.
        """
        with ThreadPoolExecutor(1) as evaluator, ThreadPoolExecutor(trainers) as pool:

            def train(name: str, training: Sequence[str], evaluation: Sequence[str]) -> None:
                if self.run(f"train {name}", training):
                    evaluator.submit(self.run, f"evaluate {name}", evaluation)

            for future in [pool.submit(train, *run) for run in runs]:
                future.result()

    def _note(self, line: str) -> None:
        print(line, flush=True)
        with (self.place / "verdicts.txt").open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def collect(config: OfflineConfig) -> Path:
    """Put the results into <folder>/collected.tgz: everything except weights and per-target results.

    Unpacked in a checkout (`tar -xzf collected.tgz`), its outputs/ are where figures, claims and reports look.
    """
    place = Path(config.folder).absolute() / "work"
    require(place.is_dir(), f"folder = {config.folder} has no work/. Use do=work first.")
    path = place.parent / "collected.tgz"
    with tarfile.open(path, "w:gz") as archive:
        for file in sorted(p for p in place.rglob("*") if p.is_file()):
            if not {"checkpoints", "tokens"} & set(file.parts) and not file.name.endswith(".lock"):
                archive.add(file, file.relative_to(place))
    print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")
    return path
