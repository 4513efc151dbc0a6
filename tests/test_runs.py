"""Run folders: names, whole-or-absent files, marks, and a lock that dies with its process."""

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import alibi_lm.runs
from alibi_lm.experiment import compose
from alibi_lm.files import read_json, write_json, write_text
from alibi_lm.runs import (
    RUN_FILES,
    clear_failed,
    delete_run,
    failed,
    finished,
    is_locked,
    mark_failed,
    mark_finished,
    require_place,
    run_lock,
    run_name,
    short_hash,
    status,
)
from alibi_lm.train import train

HOLDER = """
import pathlib, sys, time
from filelock import FileLock
with FileLock(pathlib.Path(sys.argv[1]) / ".lock"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def short_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alibi_lm.runs, "LOCK_WAIT_SECONDS", 0.1)


def test_names() -> None:
    config = compose(["experiment=smoke", "position=alibi", "train_length=64"])
    assert run_name(config) == "alibi_L64_s1" and run_name(config, "0f3a9c21") == "alibi_L64_s1_0f3a9c21"
    for position in ("../x", "a/b", "", ".hidden", "a b", "a\n", "\u00e9"):
        config.position.name = position
        if position:
            with pytest.raises(ValueError, match=r"is not a plain folder name"):
                run_name(config)


def test_hash_is_of_the_content() -> None:
    assert short_hash({"a": 1, "b": {"c": [1.5, None]}}) == short_hash({"b": {"c": [1.5, None]}, "a": 1})
    assert len({short_hash({"a": value}) for value in (1, 1.5, "1", True, None, [1])}) == 6
    assert short_hash({"model.dim": 64}) == "bcf11e67"  # must never change: folders are named by it


def test_atomic_write_replaces_or_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old \u00e9")
    assert path.read_text(encoding="utf-8") == "old \u00e9"
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            with pytest.raises(OSError, match="No space left"):
                write_text(path, "new")
        assert path.read_text(encoding="utf-8") == "old \u00e9"
        assert [entry.name for entry in tmp_path.iterdir()] == ["file.txt"]
    write_text(path, "new")
    assert path.read_text() == "new"


def test_json_objects(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"b": 1, "a": [None, 0.1]})
    assert read_json(path) == {"b": 1, "a": [None, 0.1]}
    assert path.read_text().endswith("\n")
    for content, message in (
        (b"[1]", "one JSON object, not a list"),
        (b"{", "not a JSON"),
        (b"\xff", "not a JSON"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message) as caught:
            read_json(path)
        assert str(path) in str(caught.value)


def test_marks_and_status(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert status(run) == "missing"
    assert finished(run) is None and failed(run) is None
    run.mkdir()
    assert status(run) == "missing"
    (run / "config.yaml").write_text("seed: 1\n")
    assert status(run) == "partial"
    with run_lock(run):
        assert status(run) == "running"
    assert status(run) == "partial"
    mark_failed(run, "loss is not finite")
    assert status(run) == "failed" and failed(run) == "loss is not finite"
    with run_lock(run):
        assert status(run) == "running"  # tried again
    clear_failed(run)
    clear_failed(run)
    assert status(run) == "partial"
    mark_failed(run, "again")
    mark_finished(run, {"steps": 100})
    assert status(run) == "finished" and failed(run) is None
    assert finished(run) == {"steps": 100}


def test_status_creates_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("")
    status(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_torn_mark_counts_as_none(tmp_path: Path, logged: list[logging.LogRecord]) -> None:
    (tmp_path / "finished.json").write_text('{"steps": 1')
    assert finished(tmp_path) is None
    (record,) = logged
    assert "finished.json is not a JSON file" in record.getMessage()
    assert status(tmp_path) == "partial"


def test_second_process_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        assert is_locked(tmp_path) and status(tmp_path) == "running"
        with pytest.raises(ValueError, match=r"output_dir = .* is in use by another process"), run_lock(tmp_path):
            pytest.fail("entered a folder that is in use")
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()  # type: ignore[union-attr]
    assert not is_locked(tmp_path)
    with run_lock(tmp_path):
        pass


def test_lock_waits_out_a_status_query(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alibi_lm.runs, "LOCK_WAIT_SECONDS", 20)
    code = HOLDER.replace("time.sleep(60)", "time.sleep(0.3)")
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with run_lock(tmp_path):
            pass


def test_one_process_cannot_enter_twice_and_leaves_on_an_exception(tmp_path: Path) -> None:
    with pytest.raises(KeyError), run_lock(tmp_path):
        with pytest.raises(ValueError, match="in use"), run_lock(tmp_path):
            pytest.fail("entered twice")
        assert is_locked(tmp_path)
        raise KeyError
    assert not is_locked(tmp_path)


def test_folders_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ValueError, match=r"output_dir = .* cannot be written"),
        run_lock(tmp_path / "file" / "run"),
    ):
        pytest.fail("entered")
    if os.geteuid() != 0:
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(ValueError, match="cannot be written"), run_lock(tmp_path / "locked"):
            pytest.fail("entered")


# --- what is the run's, and what is not ----------------------------------------------------------


def tiny(folder: Path, *overrides: str) -> None:
    settings = [
        "experiment=smoke", "task=sort", "train_length=16", "steps=1", "tokens_per_step=16", "model.model_dim=16",
        "model.ffn_dim=16", "tracking=jsonl", "device=cpu", "threads=1", *overrides,
    ]  # fmt: skip
    train(compose(settings), folder)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.name != ".lock"}


@pytest.mark.parametrize("overwrite", ["false", "true"])
def test_a_folder_with_files_but_no_run_is_refused_before_anything_is_written(
    tmp_path: Path, overwrite: str
) -> None:
    inner = tmp_path / "other_run"
    inner.mkdir()
    (inner / "finished.json").write_text("{}")
    (tmp_path / "checkpoints").mkdir()
    before = {path for path in tmp_path.rglob("*")}
    with pytest.raises(ValueError, match=r"holds files but no run: checkpoints, other_run.* new or empty folder"):
        tiny(tmp_path, f"overwrite={overwrite}")
    assert {path for path in tmp_path.rglob("*")} == before


def test_overwrite_deletes_what_a_run_writes_and_refuses_what_else_lies_there(tmp_path: Path) -> None:
    run = tmp_path / "run"
    tiny(run)
    written = files(run)
    assert {path.name for path in run.iterdir()} - {".lock"} <= set(RUN_FILES)
    (run / "other_run").mkdir()
    (run / "other_run" / "finished.json").write_text("{}")
    (run / "thesis.tex").write_text("precious")
    before = files(run)
    with pytest.raises(ValueError, match=r"more than a run: other_run, thesis.tex. Nothing was deleted"):
        tiny(run, "overwrite=true", "seed=2")
    assert files(run) == before and (run / "thesis.tex").read_text() == "precious"

    (run / "other_run" / "finished.json").unlink()
    (run / "other_run").rmdir()
    (run / "thesis.tex").unlink()
    kept = {".hydra/config.yaml", "slurm-1.out", "train.log", "multirun.yaml"}
    (run / ".hydra").mkdir()
    for name in kept:
        (run / name).write_text("")
    tiny(run, "overwrite=true", "seed=2")
    assert files(run) == written | kept | {".hydra"} and "seed: 2\n" in (run / "config.yaml").read_text()


def test_a_start_that_was_killed_before_its_config_was_written_can_be_repeated(tmp_path: Path) -> None:
    for overwrite in ("false", "true"):
        run = tmp_path / overwrite
        run.mkdir()
        for name in (".lock", "failed.json.12.tmp", "config.yaml.12.tmp", "train.log"):
            (run / name).write_text("")
        mark_failed(run, "no such text")
        tiny(run, f"overwrite={overwrite}")
        assert status(run) == "finished" and (run / "train.log").exists()


def test_texts_that_are_prepared_in_the_run_folder_are_no_obstacle_and_stay(tmp_path: Path) -> None:
    (tmp_path / "texts" / "data").mkdir(parents=True)
    require_place(tmp_path, tmp_path / "texts" / "data")
    with pytest.raises(ValueError, match="holds files but no run: texts"):
        require_place(tmp_path, tmp_path / "text")
    (tmp_path / "config.yaml").write_text("")
    delete_run(tmp_path, tmp_path / "texts" / "data")
    assert files(tmp_path) == {"texts", "texts/data"}


def test_a_deletion_that_is_killed_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    tiny(run)
    with monkeypatch.context() as patch:
        patch.setattr(alibi_lm.runs.shutil, "rmtree", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            delete_run(run)
    assert status(run) == "partial" and (run / "config.yaml").is_file()
    tiny(run, "overwrite=true")
    assert status(run) == "finished"
