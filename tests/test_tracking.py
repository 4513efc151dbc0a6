"""Tracking: rows that are neither lost nor doubled, and what wandb's own reader finds in an offline run."""

import builtins
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alibi_lm.tracking import (
    JsonlConfig,
    Tracker,
    WandbConfig,
    open_tracker,
    read_metrics,
)


def open_jsonl(folder: Path, kept_rows: int = 0) -> Tracker:
    return open_tracker(JsonlConfig(), folder, "run", "experiment", {}, kept_rows)


def open_wandb(folder: Path, kept_rows: int = 0, **settings: Any) -> Tracker:
    config = WandbConfig(**{"tags": ["quick", "cpu"], **settings})
    return open_tracker(config, folder, folder.name, "quick", {"model": {"dim": 64}, "seed": 3}, kept_rows)


# --- metrics.jsonl -------------------------------------------------------------------------------


def test_rows(tmp_path: Path) -> None:
    with open_jsonl(tmp_path) as tracker:
        tracker.log(10, {"tokens_seen": 640, "train/loss": 1 / 3})
        # On disk at once: a kill right now loses nothing.
        assert (tmp_path / "metrics.jsonl").read_text() == (
            '{"step": 10, "tokens_seen": 640, "train/loss": 0.3333333333333333}\n'
        )
        tracker.log(10, {"validation/loss": 2.5, "train/grad_norm": float("inf")})
        tracker.table("extrapolation", ["x"], [[1]], ("x", "x", "x"))
        tracker.summary({"x": 1})
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 10, "tokens_seen": 640, "train/loss": 1 / 3},
        {"step": 10, "validation/loss": 2.5, "train/grad_norm": None},
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_rows_survive_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_jsonl(tmp_path) as tracker:
        synced: list[int] = []
        monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
        tracker.log(10, {"a": 1})
    assert synced == [len('{"step": 10, "a": 1}\n')]


@pytest.mark.parametrize("torn", ["", '{"step": 31, "train/lo', '{"step"', "{", "\x00\x00\x00"])
def test_resume_drops_exactly_what_comes_again(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    with open_jsonl(tmp_path) as tracker:
        for step in (5, 10, 15, 20, 25, 30):
            tracker.log(step, {"train/loss": step / 7})
    whole = path.read_text()
    path.write_text(whole + torn)
    with open_jsonl(tmp_path, 4) as tracker:
        assert [row["step"] for row in read_metrics(path)] == [5, 10, 15, 20]
        tracker.log(25, {"train/loss": 25 / 7})
        tracker.log(30, {"train/loss": 30 / 7})
    assert sorted(path.read_text().splitlines()) == sorted(whole.splitlines())


@pytest.mark.parametrize(
    ("content", "kept_rows", "kept"),
    [
        ('{"step": 1, "a": 1}\n{"step": 2, "a": 2}', 2, [1, 2]),  # no line end at the end
        ('{"step": 0, "a": 1}\nrubbish of a run without a checkpoint\n', 0, []),
        (None, 5, []),
    ],
)
def test_a_run_starts_with_the_rows_of_its_checkpoint(
    tmp_path: Path, content: str | None, kept_rows: int, kept: list[int]
) -> None:
    path = tmp_path / "metrics.jsonl"
    if content is not None:
        path.write_text(content)
    with open_jsonl(tmp_path, kept_rows) as tracker:
        assert [row["step"] for row in read_metrics(path)] == kept and tracker.rows == len(kept)
        tracker.log(6, {"a": 1})
    assert [row["step"] for row in read_metrics(path)] == [*kept, 6]


def test_resume_in_the_middle_of_a_step(tmp_path: Path) -> None:
    """The checkpoint was written between two rows of its step."""
    with open_jsonl(tmp_path) as tracker:
        tracker.log(5, {"train/loss": 1.0})
        tracker.log(5, {"validation/loss": 2.0})
    with open_jsonl(tmp_path, 1) as tracker:
        tracker.log(5, {"validation/loss": 2.0})
        assert tracker.rows == 2
    assert [list(row) for row in read_metrics(tmp_path / "metrics.jsonl")] == [
        ["step", "train/loss"], ["step", "validation/loss"]
    ]  # fmt: skip


def test_a_full_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_jsonl(tmp_path) as tracker:
        monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(OSError, match=r"No space left: .*metrics\.jsonl"):
            tracker.log(1, {"a": 1})


@pytest.mark.parametrize(
    "line", ["not json", "[1]", '{"a": 1}', '{"step": "5"}', '{"step": true}', "", "[" * 100_000]
)
def test_damage_in_the_middle_is_an_error_and_changes_nothing(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    content = '{"step": 1}\n' + line + '\n{"step": 3}\n'
    path.write_text(content)
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2 is not a row .*overwrite=true"):
        open_jsonl(tmp_path, 3)
    assert path.read_text() == content


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.tuples(st.integers(1, 99), st.none() | st.text(max_size=5) | st.integers()), max_size=5),
    cut=st.integers(0, 40),
    kept_rows=st.integers(1, 6),
)
def test_any_cut_keeps_every_whole_row(
    tmp_path: Path, rows: list[tuple[int, Any]], cut: int, kept_rows: int
) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "a": value}) + "\n" for step, value in rows]
    content = "".join(lines)
    kept = content[: len(content) - cut]
    whole = [json.loads(line) for line in kept.split("\n")[:-1]]
    tail = kept.split("\n")[-1]
    if tail + "\n" in lines:
        whole.append(json.loads(tail))
    path.write_text(kept)
    with open_jsonl(tmp_path, kept_rows):
        pass
    assert read_metrics(path) == whole[:kept_rows]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content)
    try:
        assert all(type(row["step"]) is int for row in read_metrics(path))
    except ValueError as error:
        assert "metrics.jsonl, line" in str(error)


# --- wandb ---------------------------------------------------------------------------------------


class Record:
    """What wandb's own reader finds in one offline run file."""

    def __init__(self, file: Path) -> None:
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
        quiet = os.environ | {"WANDB_ERROR_REPORTING": "false"}  # else the reader reports its use
        output = subprocess.run(command, capture_output=True, text=True, check=True, env=quiet).stdout
        self.run: dict[str, Any] = {}
        self.history: dict[int, dict[str, Any]] = {}
        self.summary: dict[str, Any] = {}
        self.config: dict[str, Any] = {}
        self.exit_code: int | None = None
        self.artifact_files: list[Path] = []
        for line in output.splitlines():
            record = json.loads(line)
            match record["type"], record[record["type"]]:
                case "run", run:
                    self.run = run
                    self.config |= run["config"]["update"]
                case "config", config:
                    self.config |= config["update"]
                case "history", row:
                    self.history.setdefault(row["step"].get("num", 0), {}).update(row["item"])
                case "summary", summary:
                    self.summary |= summary["update"]
                case "exit", end:
                    self.exit_code = end.get("exit_code", 0)
                case "artifact", artifact:
                    self.artifact_files += [Path(item["local_path"]) for item in artifact["manifest"]["contents"]]


def records(folder: Path) -> list[Record]:
    return [Record(path) for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))]


@pytest.fixture
def loopback(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bytes]]:
    """A server that stands where wandb's service, and every proxy, would be; lists what called it."""
    calls: list[bytes] = []
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(5)
                calls.append(connection.recv(200))

    thread = threading.Thread(target=serve)
    thread.start()
    address = f"http://127.0.0.1:{server.getsockname()[1]}"
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, address)
    for name in ("NO_PROXY", "no_proxy", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", address)
    yield calls
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    thread.join()


def test_offline_run_read_back(tmp_path: Path, loopback: list[bytes], capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "alibi_L64_s1"
    folder.mkdir()
    columns = ["inference_length", "perplexity", "position"]
    rows = [[64, 20.5, "alibi"], [128, 20.0, "alibi"], [64, 21.0, "none"]]
    home = {path: os.listdir(path) for path in (Path.home(), Path.home() / ".local/share") if path.is_dir()}
    with open_wandb(folder) as tracker:
        tracker.log(10, {"train/loss": 2.5, "train/lr": 1e-3})
        tracker.log(20, {"train/loss": 2.25})
        tracker.log(20, {"validation/loss": 2.0, "validation/perplexity": 7.4})
        tracker.table("extrapolation", columns, rows, ("inference_length", "perplexity", "position"))
        tracker.summary({"validation/best": 2.0})

    (record,) = records(folder)
    assert record.run["display_name"] == "alibi_L64_s1"
    assert (record.run["run_group"], record.run["tags"]) == ("quick", ["quick", "cpu"])
    assert record.run["project"] == "alibi_lm"
    assert record.config["model"] == {"dim": 64} and record.config["seed"] == 3
    assert record.history[10].items() >= {"train/loss": 2.5, "train/lr": 1e-3}.items()
    expected = {"train/loss": 2.25, "validation/loss": 2.0, "validation/perplexity": 7.4}
    assert record.history[20].items() >= expected.items()
    assert record.summary["validation/best"] == 2.0
    assert record.exit_code == 0

    # The same names and values as in the file.
    named = {
        (row["step"], name, value) for row in read_metrics(folder / "metrics.jsonl") for name, value in row.items()
    }
    in_wandb = {
        (step, name, value)
        for step, row in record.history.items()
        for name, value in row.items()
        if name.startswith(("train/", "validation/"))
    }
    assert in_wandb == {entry for entry in named if entry[1] != "step"}

    tables = [json.loads(path.read_text()) for path in folder.glob("wandb/offline-run-*/files/media/table/*.json")]
    assert {"columns": columns, "data": rows} in tables
    plot = record.config["_wandb.visualize.extrapolation_plot"]["panel_config"]
    assert plot["fieldSettings"] == {"x": "inference_length", "y": "perplexity", "stroke": "position"}

    assert loopback == []
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""
    assert all(folder in path.parents for path in record.artifact_files) and record.artifact_files
    assert {path: os.listdir(path) for path in home} == home


def test_resumed_offline_run_keeps_its_id(tmp_path: Path) -> None:
    with open_wandb(tmp_path) as tracker:
        tracker.log(10, {"train/loss": 3.0})
        tracker.log(20, {"train/loss": 2.0})
    first_id = (tmp_path / "wandb_run_id").read_text().strip()
    with open_wandb(tmp_path, kept_rows=1, group="other") as tracker:
        tracker.log(20, {"train/loss": 2.0})
    # Two runs in the same second would share wandb's folder name, so both counts are right.
    found = records(tmp_path)
    assert {record.run["run_id"] for record in found} == {first_id}
    assert found[-1].run["run_group"] == "other"
    assert found[-1].history[20]["train/loss"] == 2.0
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [10, 20]


def test_two_runs_in_one_process_stay_apart(tmp_path: Path) -> None:
    """Beside a run of somebody else, which is open all the time and goes on."""
    import wandb

    theirs = wandb.init(project="theirs", mode="offline", dir=tmp_path, settings=wandb.Settings(silent=True))
    folders = [tmp_path / "a", tmp_path / "b"]
    data_dir = os.environ.get("WANDB_DATA_DIR")
    for number, folder in enumerate(folders):
        folder.mkdir()
        with open_wandb(folder) as tracker:
            tracker.log(1, {"train/loss": float(number)})
        assert wandb.run is theirs and os.environ.get("WANDB_DATA_DIR") == data_dir
    theirs.log({"b": 1.0})
    theirs.finish()
    (first,), (second,) = map(records, folders)
    assert first.run["run_id"] != second.run["run_id"]
    for number, record in enumerate((first, second)):
        assert record.run["project"] == "alibi_lm" and list(record.history) == [1]
        assert record.history[1]["train/loss"] == number


def test_run_is_closed_when_training_fails(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), open_wandb(tmp_path) as tracker:
        tracker.log(7, {"train/loss": 1.0})
        raise KeyboardInterrupt
    (record,) = records(tmp_path)
    assert record.exit_code == 1
    assert record.history[7]["train/loss"] == 1.0
    with open_jsonl(tmp_path, 1):  # the file was closed, too
        assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


def test_disabled_needs_no_wandb(tmp_path: Path, without_wandb: None) -> None:
    with open_wandb(tmp_path, mode="disabled") as tracker:
        tracker.log(1, {"a": 1})
        tracker.table("t", ["x"], [[1]], ("x", "x", "x"))
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.fixture
def without_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[..., Any] = builtins.__import__

    def importing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "wandb":
            raise ModuleNotFoundError("No module named 'wandb'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", importing)


def test_missing_wandb_names_the_way_out(tmp_path: Path, without_wandb: None) -> None:
    with pytest.raises(ValueError, match=r"tracking = wandb needs the package wandb .*use tracking=jsonl"):
        open_wandb(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_online_without_an_account_names_the_way_out(
    tmp_path: Path, loopback: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"mode = online could not start.*Use tracking\.mode=offline"):
        open_wandb(tmp_path, mode="online")


def test_damaged_run_id(tmp_path: Path) -> None:
    (tmp_path / "wandb_run_id").write_text("../../elsewhere")
    with pytest.raises(ValueError, match=r"wandb_run_id holds .*which is not a run id"):
        open_wandb(tmp_path)
    assert not (tmp_path / "wandb").exists()


def test_bad_settings() -> None:
    for wrong, message in (
        ({"project": ""}, "tracking.project = ''"),
        ({"project": "x" * 129}, "1 to 128 characters"),
        ({"tags": [""]}, "tracking.tags has ''"),
        ({"tags": ["x" * 65]}, "1 to 64 characters"),
    ):
        with pytest.raises(ValueError, match=message):
            WandbConfig(**wrong)  # type: ignore[arg-type]
