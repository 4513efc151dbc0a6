"""Metrics of a run: always rows of metrics.jsonl, and optionally the same metrics in Weights & Biases.

The file is the record and wandb a view of it. A row is on disk before `log` returns, and so before any
later checkpoint; on resume the rows after the checkpoint are dropped and written again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from alibi_lm.files import write_text
from alibi_lm.settings import require, require_one_of

METRICS_FILE = "metrics.jsonl"
WANDB_ID_FILE = "wandb_run_id"
WANDB_DATA = "WANDB_DATA_DIR"
"""Environment variable: where wandb keeps copies of tables, by default in the user's home folder."""
WANDB_MODES = ("offline", "online", "disabled")

log = logging.getLogger("alibi_lm")


@dataclass
class JsonlConfig:
    """Local files only."""

    name: str = "jsonl"
    """Registry name."""


@dataclass
class WandbConfig:
    """Local files and Weights & Biases."""

    name: str = "wandb"
    """Registry name."""
    mode: str = "offline"
    """offline (files in <run folder>/wandb, uploaded later with `wandb sync`), online, or disabled (not used)."""
    project: str = "alibi_lm"
    """Project that the run belongs to."""
    entity: str | None = None
    """User or team; null: the account's default."""
    group: str | None = None
    """Group in the project; null: the experiment, so that its runs are grouped."""
    tags: list[str] = field(default_factory=list)
    """Tags of the run, each 1 to 64 characters."""

    def __post_init__(self) -> None:
        require_one_of("tracking.mode", self.mode, WANDB_MODES)
        require(
            1 <= len(self.project) <= 128 and not re.search(r"[/\\#?%:]", self.project),
            f"tracking.project = {self.project!r}. Use 1 to 128 characters, none of them / \\ # ? % or :",
        )
        for tag in self.tags:
            require(1 <= len(tag) <= 64, f"tracking.tags has {tag!r}. A tag has 1 to 64 characters.")


TRACKING: dict[str, type] = {"jsonl": JsonlConfig, "wandb": WandbConfig}


class Tracker:
    """Ignores all metrics: used in processes other than the main one, and the interface of all trackers."""

    rows = 0
    """How many rows metrics.jsonl holds."""

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Record metrics of a step.

        Args:
            step: optimizer steps done; never less than in an earlier call.
            metrics: numbers by name, such as `train/loss`; None, NaN and infinity stand for no value.
        """

    def table(
        self,
        name: str,
        columns: Sequence[str],
        rows: Sequence[Sequence[Any]],
        line_plot: tuple[str, str, str],
    ) -> None:
        """Show a table and, as `<name>_plot`, a line plot of it, where the tracker can.

        Args:
            name: of the table.
            columns: names of the columns.
            rows: values, in the order of the columns.
            line_plot: columns of x, of y and of the line that a row belongs to.
        """

    def summary(self, values: Mapping[str, Any]) -> None:
        """Record final values of the run, where the tracker can."""

    def close(self, failed: bool) -> None:
        """End the tracking of the run; `failed` says whether an exception ended it."""

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(failed=kind is not None)


def open_tracker(
    config: JsonlConfig | WandbConfig,
    run_folder: Path,
    run_name: str,
    group: str,
    settings: Mapping[str, Any],
    kept_rows: int = 0,
) -> Tracker:
    """The tracker of a run, to be used with `with`.

    Args:
        config: one of the `TRACKING` dataclasses.
        run_folder: existing folder of the run.
        run_name: displayed name.
        group: group of the run if the config names none; the experiment.
        settings: the run's, shown beside it.
        kept_rows: how many rows of metrics.jsonl to keep: those that it had at the checkpoint that training
            continues from. The rest is dropped, for a new run all of them.

    Raises:
        ValueError: metrics.jsonl is damaged before its last line, or wandb is not installed or cannot start.
    """
    if isinstance(config, JsonlConfig) or config.mode == "disabled":
        return _JsonlTracker(run_folder, kept_rows)
    shown = {"name": run_name, "group": config.group or group, "config": dict(settings)}
    return _WandbTracker(config, shown, run_folder, kept_rows)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl; a last line that was cut short by a kill is left out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line before the last is not a row; the message names file and line.
    """
    lines = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line.decode("utf-8"))
            if not isinstance(row, dict) or type(row.get("step")) is not int:
                raise ValueError("not an object with a whole number as step")
        except (ValueError, RecursionError) as error:
            if number == len(lines):  # what follows the last line end: nothing, or a torn row
                break
            raise ValueError(
                f"{path}, line {number} is not a row of metrics ({error}). Put the file back as it was, or use "
                "overwrite=true to train again."
            ) from error
        rows.append(row)
    return rows


class _JsonlTracker(Tracker):
    def __init__(self, run_folder: Path, kept_rows: int):
        self.path = run_folder / METRICS_FILE
        kept = read_metrics(self.path)[:kept_rows] if kept_rows and self.path.exists() else []
        write_text(self.path, "".join(map(_line, kept)))
        self.rows, self.step = len(kept), kept[-1]["step"] if kept else 0
        self._file = open(self.path, "ab")

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        try:
            self._file.write(_line({"step": step, **metrics}).encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:  # the system names no file where a write failed
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        self.rows, self.step = self.rows + 1, step

    def close(self, failed: bool) -> None:
        with contextlib.suppress(OSError):  # rows that could be written are on the disk already
            self._file.close()


class _WandbTracker(_JsonlTracker):
    """metrics.jsonl and a wandb run with the same names.

    The run's id is kept in the run folder. Online, a resumed run continues the same wandb run, which
    ignores steps that it already has. Offline, every process adds a file with the same id under
    <run folder>/wandb; `wandb sync` of all of them, in order of start, joins them.
    """

    def __init__(
        self,
        config: WandbConfig,
        shown: Mapping[str, Any],
        run_folder: Path,
        kept_rows: int,
    ):
        try:
            import wandb
        except ImportError as error:
            raise ValueError(
                f"tracking = wandb needs the package wandb ({error}). Install it, or use tracking=jsonl."
            ) from error
        super().__init__(run_folder, kept_rows)
        self._wandb = wandb
        folder = run_folder.resolve()
        self._data_before = _exchange(WANDB_DATA, str(folder / "wandb" / "data"))
        try:
            self._run = wandb.init(
                dir=folder,
                id=_wandb_id(folder),
                project=config.project,
                entity=config.entity,
                tags=list(config.tags),
                **shown,
                mode=config.mode,  # type: ignore[arg-type]
                # Offline runs cannot ask the server what it has; wandb warns when told to resume.
                resume="allow" if config.mode == "online" else None,
                reinit="create_new",
                settings=wandb.Settings(
                    silent=True, console="off", disable_git=True, disable_code=True, x_disable_stats=True
                ),
            )
        except Exception as error:
            super().close(failed=True)
            _exchange(WANDB_DATA, self._data_before)
            other = "tracking.mode=offline, or " if config.mode == "online" else ""
            raise ValueError(
                f"tracking = wandb with mode = {config.mode} could not start: {error}. Use {other}tracking=jsonl."
            ) from error

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        super().log(step, metrics)
        self._run.log({name: value for name, value in metrics.items() if value is not None}, step=step)

    def table(
        self,
        name: str,
        columns: Sequence[str],
        rows: Sequence[Sequence[Any]],
        line_plot: tuple[str, str, str],
    ) -> None:
        table = self._wandb.Table(columns=list(columns), data=[list(row) for row in rows])
        x, y, series = line_plot
        plot = self._wandb.plot.line(table, x=x, y=y, stroke=series, title=name)
        self._run.log({name: table, f"{name}_plot": plot}, step=self.step)

    def summary(self, values: Mapping[str, Any]) -> None:
        self._run.summary.update(dict(values))

    def close(self, failed: bool) -> None:
        super().close(failed)
        try:
            self._run.finish(exit_code=int(failed))
        except Exception as error:  # the numbers are in metrics.jsonl, so wandb must not make a run fail
            log.warning("wandb could not be closed: %s", error)
        finally:
            _exchange(WANDB_DATA, self._data_before)


def _line(row: Mapping[str, Any]) -> str:
    """One row as strict JSON; a number that is not finite becomes null."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def _wandb_id(run_folder: Path) -> str:
    """The run's id, generated once per run folder; it becomes part of file names, so it is checked."""
    path = run_folder / WANDB_ID_FILE
    if not path.exists():
        write_text(path, secrets.token_hex(8) + "\n")
    run_id = path.read_text(encoding="utf-8", errors="replace").strip()
    require(
        re.fullmatch(r"[A-Za-z0-9_-]{1,64}", run_id) is not None,
        f"{path} holds {run_id[:80]!r}, which is not a run id. Delete that file",
    )
    return run_id


def _exchange(name: str, value: str | None) -> str | None:
    """Set an environment variable, or remove it with None; returns its previous value."""
    before = os.environ.pop(name, None)
    if value is not None:
        os.environ[name] = value
    return before
