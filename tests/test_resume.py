"""A run that is killed with kill -9, at any moment and as often as you like, ends as if nothing had happened.

The process (killed_driver.py) sends itself SIGKILL before the n-th call at which the state of a run changes:
nothing is cleaned up, and the moment does not depend on the speed of the machine. Other tests kill by the clock
or ask to stop.
"""

import copy
import functools
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alibi_lm.checkpoint import CheckpointStore
from alibi_lm.config import TrainConfig
from alibi_lm.data.prepare import prepare
from alibi_lm.evaluate.score import Scored
from alibi_lm.experiment import compose
from alibi_lm.positions import POSITIONS
from alibi_lm.runs import finished, status
from alibi_lm.tracking import METRICS_FILE, read_metrics

# Rows of metrics at other steps than checkpoints, three micro-batches a step, dropout of every kind.
SETTINGS = [
    "experiment=smoke", "tokenizer.vocab_size=300", "tracking=jsonl", "device=cpu", "threads=1",
    "train_length=8", "steps=11", "tokens_per_step=48", "micro_batch_tokens=16", "log_every=2", "validate_every=4",
    "checkpoint_every=3",
    "model.num_layers=1", "model.model_dim=16", "model.num_heads=2", "model.ffn_dim=16", "model.dropout=0.1",
    "model.attention_dropout=0.1", "model.activation_dropout=0.1", "optimizer.lr=0.03", "schedule.warmup_steps=3",
]  # fmt: skip
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that name a small text of 30 words, and the folder of its token streams."""
    folder = tmp_path_factory.mktemp("text")
    chance = random.Random(0)
    words = [f"w{number}" for number in range(30)]
    for name, lines in (("train", 60), ("valid", 6), ("test", 1)):
        text = [" = Title = "] + [" " + " ".join(chance.choices(words, k=9)) + " " for _ in range(lines)]
        (folder / f"wiki.{name}.tokens").write_text("\n".join(text) + "\n")
    overrides = ["data=wikitext2", f"data.path={folder}", f"data.cache_dir={folder / 'cache'}"]
    config = composed(*SETTINGS, *overrides)
    prepare(config.data, config.tokenizer)
    return overrides


# --- other processes -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drive(tmp_path_factory: pytest.TempPathFactory, command: Run) -> Run:
    """Do a job of killed_driver.py, given as the arguments of its `main`."""
    job = tmp_path_factory.mktemp("jobs") / "job"

    def do(**arguments: Any) -> subprocess.CompletedProcess[str]:
        job.write_bytes(pickle.dumps(arguments))
        return command(job.parent, "../tests/killed_driver.py", str(job))

    return do


@pytest.fixture(scope="module")
def run(drive: Run) -> Callable[..., int]:
    """Train in another process: run(overrides, folder, kill_at=..., after=...) -> exit code, -9 after a kill."""
    return lambda overrides, folder, **end: drive(config=composed(*overrides), folder=folder, **end).returncode


@functools.cache
def composed(*overrides: str) -> TrainConfig:
    return compose(list(overrides))


def calls_of(folder: Path) -> list[str]:
    return json.loads(folder.with_suffix(".calls").read_text())


# --- comparison ----------------------------------------------------------------------------------


def rows(folder: Path) -> list[dict[str, Any]]:
    found = read_metrics(folder / METRICS_FILE)
    return [{name: value for name, value in row.items() if not name.endswith("_per_second")} for row in found]


def assert_same_run(folder: Path, reference: Path) -> None:
    """Weights, optimizer state, the trainer's state and every row of metrics, bit for bit."""
    assert rows(folder) == rows(reference)
    # A kill after the last rename may leave an older checkpoint beside these.
    files = [path.relative_to(reference) for path in reference.glob("checkpoints/**/*") if path.is_file()]
    assert len(files) in (4, 7)  # one or two checkpoints and best.json
    for file in files:
        assert (folder / file).read_bytes() == (reference / file).read_bytes(), file
    assert finished(folder) == finished(reference) is not None


@pytest.fixture(scope="module")
def reference(
    tmp_path_factory: pytest.TempPathFactory, corpus: list[str], run: Callable[..., int]
) -> Callable[[str], Path]:
    """The uninterrupted run of a scheme, trained once."""
    made: dict[str, Path] = {}

    def get(position: str) -> Path:
        if position not in made:
            folder = tmp_path_factory.mktemp(position) / "uninterrupted"
            assert run([*SETTINGS, *corpus, f"position={position}"], folder) == 0
            made[position] = folder
        return made[position]

    return get


# --- kills ---------------------------------------------------------------------------------------


def kill_and_finish(run: Callable[..., int], overrides: list[str], folder: Path, moments: list[int]) -> None:
    """One kill at each moment (a count of calls since the start of the process), then to the end."""
    for moment in moments:
        if run(overrides, folder, kill_at=moment) == 0:
            break  # what was left had fewer calls
    if finished(folder) is None:
        assert run(overrides, folder) == 0
    assert status(folder) == "finished"


def test_the_reference_covers_what_it_should(reference: Callable[[str], Path]) -> None:
    folder = reference("alibi")
    calls = calls_of(folder)
    assert calls.count("step") == 11 and calls.count("backward") == 33
    assert calls.count("validate") == 3 and calls.count("rename") > 8
    steps = [row["step"] for row in rows(folder)]
    assert steps == [2, 4, 4, 6, 8, 8, 10, 11, 11]
    store = CheckpointStore(folder / "checkpoints")
    losses = {row["step"]: row["validation/loss"] for row in rows(folder) if "validation/loss" in row}
    assert store.get("best").step == min(losses, key=losses.__getitem__) and store.get("last").step == 11


FAST = {("alibi", 3), ("t5", 3)}
KILLS = [
    pytest.param(position, kills, marks=[] if (position, kills) in FAST else [pytest.mark.slow])
    for position in sorted(POSITIONS)
    for kills in range(1, 6)
]


@pytest.mark.parametrize(("position", "kills"), KILLS)
def test_random_kills_in_a_row(
    tmp_path: Path,
    run: Callable[..., int],
    corpus: list[str],
    reference: Callable[[str], Path],
    position: str,
    kills: int,
) -> None:
    overrides = [*SETTINGS, *corpus, f"position={position}"]
    total = len(calls_of(reference(position)))
    chance = random.Random(f"{position} {kills}")
    kill_and_finish(run, overrides, tmp_path / "run", [chance.randrange(total) for _ in range(kills)])
    assert_same_run(tmp_path / "run", reference(position))


@pytest.mark.slow
def test_a_kill_before_every_single_call_from_the_last_steps_on(
    tmp_path: Path, run: Callable[..., int], corpus: list[str], reference: Callable[[str], Path]
) -> None:
    """The last checkpoints, the last validation, the self-check and the mark of the end, call by call."""
    overrides = [*SETTINGS, *corpus, "position=alibi"]
    calls = calls_of(reference("alibi"))
    start = [number for number, name in enumerate(calls) if name == "step"][-3]
    for moment in range(start, len(calls)):
        folder = tmp_path / f"run{moment}"
        kill_and_finish(run, overrides, folder, [moment])
        assert_same_run(folder, reference("alibi"))
        shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_kills_by_the_clock(
    tmp_path: Path, run: Callable[..., int], corpus: list[str], reference: Callable[[str], Path], seed: int
) -> None:
    overrides = [*SETTINGS, *corpus, "position=rotary"]
    began = time.monotonic()
    assert run(overrides, tmp_path / "timing") == 0
    whole = time.monotonic() - began
    chance = random.Random(seed)
    for _ in range(3):
        run(overrides, tmp_path / "run", after=chance.uniform(0, whole))
    kill_and_finish(run, overrides, tmp_path / "run", [])
    assert_same_run(tmp_path / "run", reference("rotary"))


def test_a_damaged_newest_checkpoint_costs_steps_but_changes_nothing(
    tmp_path: Path,
    run: Callable[..., int],
    corpus: list[str],
    reference: Callable[[str], Path],
) -> None:
    overrides = [*SETTINGS, *corpus, "position=alibi"]
    folder = tmp_path / "run"
    # Before the tenth step: 3, 4, 6, 8 (if it is the best) and 9 were saved.
    assert run([*overrides, "keep_last=2"], folder, kill_at=("step", 9)) == -signal.SIGKILL
    store = CheckpointStore(folder / "checkpoints")
    newest = store.steps()[-1]
    file = folder / "checkpoints" / f"step-{newest:08d}" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    older = store.find("last")
    assert older is not None and older.step < newest == 9
    assert run(overrides, folder) == 0
    assert_same_run(folder, reference("alibi"))


def test_killed_after_the_last_step_of_a_run_that_was_better_before(
    tmp_path: Path, run: Callable[..., int], corpus: list[str]
) -> None:
    overrides = [*SETTINGS, *corpus, "position=alibi", "optimizer.lr=1.0", "steps=8"]
    straight = tmp_path / "straight"
    assert run(overrides, straight) == 0
    done = finished(straight)
    assert done is not None and done["best_validation_loss"] < done["validation_loss"]
    for moment in ("_self_check", "mark_finished"):
        assert run(overrides, tmp_path / moment, kill_at=(moment, 0)) == -signal.SIGKILL
        assert run(overrides, tmp_path / moment) == 0
        assert_same_run(tmp_path / moment, straight)


@pytest.mark.slow
def test_kills_with_wandb(
    tmp_path: Path, run: Callable[..., int], corpus: list[str], reference: Callable[[str], Path]
) -> None:
    overrides = [*SETTINGS, *corpus, "position=alibi", "tracking=wandb"]
    total = len(calls_of(reference("alibi")))
    chance = random.Random(5)
    kill_and_finish(run, overrides, tmp_path / "run", [chance.randrange(total) for _ in range(3)])
    assert_same_run(tmp_path / "run", reference("alibi"))


# --- being asked to stop -------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
def test_asked_to_stop(
    tmp_path: Path, corpus: list[str], drive: Run, reference: Callable[[str], Path], stop: signal.Signals
) -> None:
    """SIGTERM (a cluster that takes the machine back) and Ctrl-C: saved, said so, resumed, the same in the end."""
    overrides, folder = [*SETTINGS, *corpus, "position=alibi"], tmp_path / "run"
    done = drive(script=[*overrides, f"output_dir={folder}"], kill_at=("step", 4), number=stop)
    assert done.returncode == 128 + stop, done.stderr
    assert "stopped by signal" in done.stderr and "after step 5; give the command again to resume" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert status(folder) == "partial" and CheckpointStore(folder / "checkpoints").get("last").step == 5
    # A checkpoint off the usual steps changes nothing in what follows.
    done = drive(script=[*overrides, f"output_dir={folder}"])
    assert done.returncode == 0 and "resumes at step 5 of 11" in done.stdout
    assert_same_run(folder, reference("alibi"))


@pytest.mark.parametrize("number", [1, 3, 4], ids=["a validation", "the last validation", "the self-check"])
def test_asked_to_stop_while_scoring(
    tmp_path: Path,
    corpus: list[str],
    reference: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    number: int,
) -> None:
    """The state is saved at once, and what was being scored is scored after the resume."""
    import alibi_lm.train

    scorings = 0
    score = alibi_lm.train.score

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        nonlocal scorings
        scorings += 1
        if scorings == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return score(*args, **kwargs)

    monkeypatch.setattr(alibi_lm.train, "score", interrupted)
    config, folder = composed(*SETTINGS, *corpus, "position=alibi"), tmp_path / "run"
    step = {1: 4, 3: 11, 4: 11}[number]
    with pytest.raises(alibi_lm.train.Interrupted, match=f"stopped by signal 15 after step {step}") as caught:
        alibi_lm.train.train(config, folder)
    assert caught.value.status == 143 and status(folder) == "partial"
    assert CheckpointStore(folder / "checkpoints").get("last").step == step
    validated = [row["step"] for row in rows(folder) if "validation/loss" in row]
    assert validated == {1: [], 3: [4, 8], 4: [4, 8, 11]}[number]
    alibi_lm.train.train(config, folder)
    assert_same_run(folder, reference("alibi"))


def test_a_signal_between_steps_does_not_wait_for_a_validation(
    tmp_path: Path, corpus: list[str], reference: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import alibi_lm.train

    step = alibi_lm.train.step

    def interrupted(run: Any, number: int) -> Any:
        if number == 7:  # the eighth, after which a validation is due
            os.kill(os.getpid(), signal.SIGTERM)
        return step(run, number)

    config, folder = composed(*SETTINGS, *corpus, "position=alibi"), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(alibi_lm.train, "step", interrupted)
        with pytest.raises(alibi_lm.train.Interrupted, match="after step 8"):
            alibi_lm.train.train(config, folder)
    assert [row["step"] for row in rows(folder) if "validation/loss" in row] == [4]
    alibi_lm.train.train(config, folder)
    assert_same_run(folder, reference("alibi"))


# --- what a run says -----------------------------------------------------------------------------


def test_a_run_without_a_terminal_tells_how_it_goes(
    tmp_path: Path, corpus: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    from alibi_lm.train import train

    folder = tmp_path / "run"
    train(composed(*SETTINGS, *corpus, "position=alibi", "steps=40", "log_every=100"), folder)
    lines = capfd.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines[1:11]] == [f"run: step {4 * k} of 40" for k in range(1, 11)]
    last = finished(folder)
    assert last is not None
    assert lines[11].startswith("run: finished 40 steps in ")
    assert f"validation loss {last['validation_loss']:.4f}" in lines[11] and lines[11].endswith(str(folder))
    assert lines[12] == f"To evaluate it: python scripts/evaluate.py experiment=smoke runs={folder}"


def test_a_perplexity_that_is_no_number_is_null(
    tmp_path: Path, corpus: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A diverged run of 5,306 nats a token ends; what was not measured is not logged as if it were."""
    import alibi_lm.train

    monkeypatch.setattr(alibi_lm.train, "score", lambda *args, **kwargs: Scored(np.full(5, 5306.0), None))
    folder = tmp_path / "run"
    assert alibi_lm.train.train(composed(*SETTINGS, *corpus, "steps=2"), folder)["validation_loss"] == 5306
    assert rows(folder)[-1] == {"step": 2, "validation/loss": 5306.0, "validation/perplexity": None}


def test_settings_that_could_not_be_read_back_are_refused_before_the_first_step(
    tmp_path: Path, corpus: list[str]
) -> None:
    from alibi_lm.train import train

    folder = tmp_path / "run"
    for group, name, message in (
        ("position", "rotary", r"config\.yaml.*learned_slopes.*Choose an entry of a group by its name alone"),
        ("optimizer", "nag", r"could not be read back .*Choose an entry"),
        ("tracking", "${oc.env:HOME}", "holds an interpolation"),
    ):
        config = copy.deepcopy(composed(*SETTINGS, *corpus, "position=alibi"))
        getattr(config, group).name = name
        with pytest.raises(ValueError, match=message):
            train(config, folder)
        assert not folder.exists()


@pytest.mark.parametrize(
    ("reason", "advice"),
    [
        ("[Errno 11] Resource temporarily unavailable", "ulimit -u"),
        ("g++ not found", r"C\+\+ compiler .*Install one"),
    ],
)
def test_what_stops_the_compiler_is_named(
    tmp_path: Path, corpus: list[str], monkeypatch: pytest.MonkeyPatch, reason: str, advice: str
) -> None:
    import torch

    from alibi_lm.train import train

    failure = type("BackendCompilerFailed", (RuntimeError,), {"__module__": "torch._dynamo.exc"})

    def compile(function: Any, **settings: Any) -> Any:
        def failing(*args: Any, **options: Any) -> Any:
            raise failure(reason)

        return failing

    monkeypatch.setattr(torch, "compile", compile)
    with pytest.raises(ValueError, match=f"compile = true, .*\n.*{advice}.*compile=false") as caught:
        train(composed(*SETTINGS, *corpus, "compile=true"), tmp_path / "run")
    assert ("Install" in str(caught.value)) == ("g++" in reason)


def test_a_full_disk_at_the_start_names_the_folder(
    tmp_path: Path, corpus: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from alibi_lm.train import train

    folder = tmp_path / "run"

    def full(descriptor: int) -> None:
        if "/run/" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        train(composed(*SETTINGS, *corpus, "position=alibi"), folder)
    assert str(folder / "config.yaml") in str(caught.value)


def test_a_run_is_not_continued_on_another_text(
    tmp_path: Path, run: Callable[..., int], corpus: list[str]
) -> None:
    """The text changed between a kill and the next start, and its token streams with it."""
    from alibi_lm.train import train

    text = Path(corpus[1].partition("=")[2])
    settings = [o for o in SETTINGS if not o.startswith("tokenizer.")]
    overrides = [*settings, "data=wikitext2", "tokenizer=word", "position=alibi", "steps=4"]
    folder, own = tmp_path / "run", [f"data.path={text}", f"data.cache_dir={tmp_path / 'cache'}"]
    assert run([*overrides, *own], folder, kill_at=("_self_check", 0)) == -signal.SIGKILL
    before = {name: (folder / name).read_bytes() for name in ("corpus.json", "tokenizer.json")}
    for split, word, what in (
        ("train", "", "training text"), ("valid", "", "validation text"), ("train", " w1 ", "tokenizer")
    ):  # fmt: skip
        changed = shutil.copytree(text, tmp_path / what, ignore=shutil.ignore_patterns("cache"))
        file = changed / f"wiki.{split}.tokens"
        lines = file.read_text().splitlines()[::-1]  # the same words, as often
        file.write_text("\n".join(line.replace(word, " v1 ") if word else line for line in lines) + "\n")
        other = [f"data.path='{changed}'", f"data.cache_dir='{changed / 'cache'}'"]
        with pytest.raises(ValueError, match=f"holds a run with another {what} .*overwrite=true"):
            train(composed(*overrides, *other), folder)
        assert {name: (folder / name).read_bytes() for name in before} == before
