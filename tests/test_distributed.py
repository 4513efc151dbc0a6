"""Training and evaluation on two processes (gloo, CPU) give what one process gives, and one of them writes."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from alibi_lm.distributed import World
from alibi_lm.evaluate.config import EvaluateConfig
from alibi_lm.evaluate.sweep import evaluate
from alibi_lm.experiment import compose
from alibi_lm.positions import POSITIONS
from alibi_lm.tracking import JsonlConfig
from alibi_lm.train import train

ROOT = Path(__file__).resolve().parent.parent
train_until_stopped = runpy.run_path(str(ROOT / "tests" / "two_process_driver.py"))["train_until_stopped"]
STEPS = 20
FEW = ("alibi", "t5")
"""Schemes of the quick tests: one without and one with trained parameters."""
# 7 sequences a step in micro-batches of 2: the processes have unequal shares, and unequal last micro-batches.
TINY = [
    "experiment=smoke", "data=wikitext2", "tokenizer=word", "tracking=jsonl", "device=cpu", "threads=1",
    "train_length=8", f"steps={STEPS}", "tokens_per_step=56", "micro_batch_tokens=16", "log_every=1",
    "validate_every=10", "checkpoint_every=10", "keep_last=9", "schedule=constant", "schedule.warmup_steps=5",
    "model.model_dim=16", "model.ffn_dim=16", "model.dropout=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, write_text: Callable[[Path], Path]) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_text(folder / "text")
    return folder


def overrides(place: Path, *more: str) -> list[str]:
    return [*TINY, f"data.path={place / 'text'}", f"data.cache_dir={place / 'cache'}", *more]


def torchrun(*arguments: str, cwd: Path, ok: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments],
        cwd=cwd,
        env=dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done


def on_two(place: Path, command: Callable[..., Any], jobs: list[dict[str, Any]]) -> list[str]:
    """Do jobs on two processes; returns what the second one wrote."""
    path = place / "jobs.json"
    path.write_text(json.dumps({"place": str(place), "jobs": jobs}))
    done = command(place, "../tests/two_process_driver.py", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((place / "written.json").read_text())


def on_one(place: Path, folder: str, *more: str) -> None:
    train(compose(overrides(place, *more)), place / folder)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def curve(folder: Path) -> list[tuple[int, float]]:
    """(step, loss) of every training and validation row."""
    found = [(r["step"], r.get("train/loss", r.get("validation/loss"))) for r in rows(folder)]
    assert len(found) == STEPS + 2
    return found


def assert_same_curve(place: Path, scheme: str) -> None:
    one, two = curve(place / "one" / scheme), curve(place / "two" / scheme)
    assert [step for step, _ in one] == [step for step, _ in two]
    assert [loss for _, loss in two] == pytest.approx([loss for _, loss in one], rel=1e-5)
    # It did learn: equal losses of an idle optimizer would prove nothing.
    assert two[-1][1] < two[0][1] - 0.1


@pytest.fixture(scope="module")
def trained(place: Path, command: Callable[..., Any]) -> list[str]:
    """Two schemes in `one/` and `two/`, handed over, evaluated; returns what process 1 wrote."""
    jobs = train_on_one(place, FEW)
    for output, more in evaluations(place).items():
        jobs.append({"evaluate": {**more, "output_dir": str(place / "results_two" / output)}})
    # A run of two processes, to be finished by one, and the other way round; and one that is finished already.
    whole = overrides(place, "position=t5")
    jobs.append({"train": whole, "folder": str(place / "half_on_two"), "stopped": True})
    train_until_stopped(compose(whole), place / "half_on_one", asked=True)
    jobs.append({"train": whole, "folder": str(place / "half_on_one")})
    jobs.append(jobs[0])
    return on_two(place, command, jobs)


@pytest.fixture(scope="module")
def trained_rest(place: Path, command: Callable[..., Any]) -> None:
    """The other schemes in `one/` and `two/`."""
    on_two(place, command, train_on_one(place, [scheme for scheme in POSITIONS if scheme not in FEW]))


def train_on_one(place: Path, schemes: Iterable[str]) -> list[dict[str, Any]]:
    """Train in `one/<scheme>`; returns the jobs for `two/<scheme>`."""
    for scheme in schemes:
        on_one(place, f"one/{scheme}", f"position={scheme}")
    return [
        {"train": overrides(place, f"position={scheme}"), "folder": str(place / "two" / scheme)}
        for scheme in schemes
    ]


def evaluations(place: Path) -> dict[str, dict[str, Any]]:
    common = {"runs": str(place / "one" / "alibi"), "device": "cpu", "threads": 1}
    return {
        "blocks": {**common, "lengths": [7, 8, 64, 100000], "tokens_per_forward": 64},
        "sliding": {**common, "lengths": [16], "mode": "sliding", "stride": 3, "split": "test"},
    }


@pytest.mark.parametrize("scheme", FEW)
def test_two_processes_give_the_loss_curve_of_one(place: Path, trained: list[str], scheme: str) -> None:
    assert_same_curve(place, scheme)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [scheme for scheme in POSITIONS if scheme not in FEW])
def test_two_processes_give_the_loss_curve_of_one_for_all_schemes(
    place: Path, trained_rest: None, scheme: str
) -> None:
    assert_same_curve(place, scheme)


@pytest.mark.parametrize("name", ["blocks", "sliding"])
def test_two_processes_give_the_result_rows_of_one(place: Path, trained: list[str], name: str) -> None:
    config = EvaluateConfig(
        **evaluations(place)[name], output_dir=str(place / "results_one" / name), tracking=JsonlConfig()
    )
    expected = [row.to_dict() for row in evaluate(config, World())]
    path = place / "results_two" / name / "results.jsonl"
    found = {r["inference_length"]: r for r in map(json.loads, path.read_text().splitlines())}
    assert len(found) == len(expected) == len(config.lengths) + 1  # and the unigram baseline
    for row in expected:
        other = found[row["inference_length"]]
        exact = ("run", "position", "mode", "stride", "split", "corpus", "tokens", "words", "bytes", "reason")
        assert {k: other[k] for k in exact} == {k: row[k] for k in exact}
        assert (other["nats"] is None) == (row["nats"] is None)
        assert (other["nats"] or 0) == pytest.approx(row["nats"] or 0, rel=1e-6)
    # Each target once: the nats of all targets, in order, are those of one process.
    import numpy as np

    for one in (place / "results_one" / name / "tokens").rglob("*.nats"):
        two = place / "results_two" / name / one.relative_to(place / "results_one" / name)
        a, b = np.fromfile(one, dtype=np.float32), np.fromfile(two, dtype=np.float32)
        assert a.shape == b.shape == (expected[0]["tokens"],)
        np.testing.assert_allclose(b, a, rtol=1e-5)


def test_only_the_first_process_writes(trained: list[str]) -> None:
    assert trained == []


def test_a_run_of_two_processes_goes_on_on_one(place: Path, trained: list[str]) -> None:
    """One of the two was asked to stop during a validation: both stopped, and it was done after the resume."""
    assert [row["step"] for row in rows(place / "half_on_two")] == list(range(1, STEPS // 2 + 1))
    on_one(place, "half_on_two", "position=t5")
    check_second_half(place, curve(place / "half_on_two"))


def test_a_run_of_one_process_goes_on_on_two(place: Path, trained: list[str]) -> None:
    check_second_half(place, curve(place / "half_on_one"))


def check_second_half(place: Path, found: list[tuple[int, float]]) -> None:
    """Against the run that went through at once."""
    expected = curve(place / "one" / "t5")
    assert [s for s, _ in found] == [s for s, _ in expected]
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in expected], rel=1e-5)


@pytest.mark.slow
def test_the_command_of_the_documentation(place: Path) -> None:
    """The script itself on two processes: trains, says once that it is finished, and ends mistakes at once."""
    command = [str(ROOT / "scripts" / "train.py"), *overrides(place, "steps=4", "output_dir=by_script")]
    done = torchrun(*command, cwd=place)
    assert done.stdout.count("starts, 4 steps;") == 1
    assert json.loads((place / "by_script" / "finished.json").read_text())["steps"] == 4
    done = torchrun(*command, cwd=place)
    assert done.stdout.count("already finished at step 4") == 1
    done = torchrun(*command, "seed=2", cwd=place, ok=False)
    assert "holds a run with other settings" in done.stderr


@pytest.mark.slow
def test_sigterm_to_torchrun_stops_all_processes_at_one_step_and_saves(place: Path) -> None:
    command = [str(ROOT / "scripts" / "train.py"), *overrides(place, "steps=5000", "output_dir=stopped")]
    command += ["checkpoint_every=100000", "validate_every=100000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command],
        cwd=place,
        env=dict(os.environ, OMP_NUM_THREADS="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    metrics, deadline = place / "stopped" / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.is_file() and metrics.read_text().count("\n") >= 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.terminate()
    printed = process.communicate(timeout=120)[0]
    assert process.returncode != 0
    (saved,) = (place / "stopped" / "checkpoints").glob("step-*")
    step = int(saved.name.removeprefix("step-"))
    assert f"after step {step}" in printed, printed
    assert [row["step"] for row in rows(place / "stopped")] == list(range(1, step + 1))
