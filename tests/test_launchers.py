"""Multiruns through Hydra's launcher plugins: jobs in other processes, the same run folders, failures told."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from alibi_lm import cli

ROOT = Path(__file__).resolve().parent.parent
SWEEP = [
    "-m", "experiment=smoke", "data=wikitext2", "data.path=text", "tokenizer=word", "threads=1", "train_length=8",
    "tokens_per_step=32", "model.model_dim=16", "model.ffn_dim=16",
]  # fmt: skip
SUBMITIT = ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5", "hydra.launcher.cpus_per_task=1"]
JOBLIB = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]


@pytest.fixture
def place(tmp_path: Path, write_text: Callable[[Path], Path]) -> Path:
    write_text(tmp_path / "text")
    return tmp_path


def start(place: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / "train.py"), *SWEEP, *arguments],
        cwd=place,
        env=dict(os.environ, OMP_NUM_THREADS="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit status, and all that was printed."""
    out, err = process.communicate(timeout=300)
    return process.returncode, out + err


def runs(place: Path) -> dict[str, Path]:
    """Run folders by position."""
    return {p.name.split("_")[0]: p for p in (place / "outputs" / "smoke" / "runs").iterdir()}


def logs(place: Path) -> str:
    """What all jobs of submitit printed."""
    return "".join(p.read_text() for p in (place / "outputs/smoke/multirun/.submitit").glob("*/*_log.out"))


def test_failures_are_known_where_the_results_arrive(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A result that comes back from another process, however often, counts once, by what was swept."""
    monkeypatch.setattr(cli, "_failures", [])
    arguments = ["-m", "steps=2", "seed=1,2", "+position.scaling=choice(yarn,ntk)"]
    sent = pickle.dumps(cli._Failure(3, ("steps=2", "seed=1", "+position.scaling=ntk"), "error: no such thing"))
    monkeypatch.setattr(cli, "_failures", [])
    assert cli._tell_failures(arguments) == 0
    for _ in range(2):
        pickle.loads(sent)
    assert cli._tell_failures(arguments) == 1
    printed = capsys.readouterr().err
    assert printed.split("\n", 1)[1] == (
        "1 of the jobs failed:\n  job 3 (seed=1, +position.scaling=ntk): error: no such thing\n"
    )


@pytest.mark.slow
def test_submitit_resumes_what_was_killed_and_skips_what_is_finished(place: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    command = [*SUBMITIT, "steps=600", "checkpoint_every=25", "position=alibi,none"]
    process = start(place, *command)
    deadline = time.monotonic() + 200
    folder = place / "outputs" / "smoke" / "runs"
    while not (len(started := list(folder.glob("*/checkpoints/step-*/state.json"))) >= 1):
        assert process.poll() is None and time.monotonic() < deadline, finish(process)
        time.sleep(0.02)
    assert started
    for one in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        try:
            one.kill()
        except psutil.NoSuchProcess:
            pass
    finish(process)
    assert not all((p / "finished.json").exists() for p in runs(place).values()), "killed too late to tell"

    # Requeued: the same command.
    status, printed = finish(start(place, *command))
    assert status == 0, printed
    assert "resumes at step" in logs(place)
    assert sorted(runs(place)) == ["alibi", "none"]
    for run in runs(place).values():
        assert json.loads((run / "finished.json").read_text())["steps"] == 600
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        steps = [row["step"] for row in rows if "train/loss" in row]
        assert steps == list(range(5, 601, 5))

    status, printed = finish(start(place, *command))
    assert status == 0, printed
    assert logs(place).count("already finished at step 600") == 2


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [SUBMITIT, JOBLIB], ids=["submitit", "joblib"])
def test_a_failing_job_hides_no_other_and_is_told_at_the_end(place: Path, launcher: list[str]) -> None:
    pytest.importorskip(f"hydra_plugins.hydra_{launcher[0].split('=')[1].split('_')[0]}_launcher")
    status, printed = finish(start(place, *launcher, "steps=2", "position=t5", "model.num_heads=3,2"))
    assert status == 1, printed
    assert "1 of the jobs failed" in printed and "Traceback" not in printed
    assert printed.split("of the jobs failed")[1].count("model.num_heads = 3 does not divide") == 1
    # Named as without a launcher: the hash of what differs from the experiment.
    (run,) = runs(place).values()
    assert (run / "finished.json").exists() and not (place / "finished.json").exists()
    assert {p.name for p in place.iterdir()} == {"text", "data", "outputs"}
    process = start(place, "steps=2", "position=t5", "model.num_heads=2")
    assert "already finished at step 2" in finish(process)[1]
