"""The run folder: its name, identity, lock and marks, and the model that was trained in it.

    outputs/<experiment>/runs/<position>_L<train_length>_s<seed>[_<hash of the settings that differ>]/

A folder is named by what was asked for, so that the same command given again finds it. Its state is read from
three things only: the operating system's lock on `.lock` (gone with the process, however it ended),
`finished.json` and `failed.json`. Checkpoints, `best.json` and `finished.json` carry the identity of their run,
which is checked when they are read: a file that was copied from another run's folder is refused.
"""

from __future__ import annotations

import dataclasses
import glob
import operator
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from alibi_lm import runtime
from alibi_lm.attention import ATTENTION, chosen_backend
from alibi_lm.checkpoint import CheckpointStore
from alibi_lm.config import TrainConfig, load_config, to_dict
from alibi_lm.data.corpus import Corpus
from alibi_lm.files import read_json_if_whole, write_json, write_text
from alibi_lm.identity import (
    CHECKPOINTS,
    CONFIG_FILE,
    CORPUS_FILE,
    FINISHED_FILE,
    differing_settings,
    folder_identity,
    require_own_files,
    run_identity,
    short_hash,
)
from alibi_lm.model.transformer import TransformerLM
from alibi_lm.settings import require

__all__ = [
    "CHECKPOINTS", "CONFIG_FILE", "RunLock", "build_model", "clear_failed", "differing_settings",
    "experiment_folder", "failed", "finished", "folder_identity", "is_locked", "load_run", "mark_failed",
    "mark_finished", "run_folders", "run_identity", "run_name", "short_hash", "status",
]  # fmt: skip

Status = Literal["finished", "running", "failed", "partial", "missing"]

FAILED_FILE, LOCK_FILE = "failed.json", ".lock"
LOCK_WAIT_SECONDS = 1.0
"""A status query holds the lock for an instant; a run that starts in that instant waits it out."""


# --- names ---------------------------------------------------------------------------------------


def experiment_folder(experiment: str) -> Path:
    """Where all files of an experiment lie, relative to the current folder."""
    return Path("outputs") / experiment


def run_folders(runs: str | Path) -> list[Path]:
    """The folders that `runs` names: one folder, or those that match a glob, in order of their names.

    Args:
        runs: a run folder or a glob, such as `outputs/quick/runs/*`.
    """
    pattern = glob.escape(str(runs)) if Path(runs).is_dir() else str(runs)
    return [path for path in map(Path, sorted(glob.glob(pattern))) if path.is_dir()]


def run_name(position: str, train_length: int, seed: int, overrides_hash: str | None = None) -> str:
    """Name of a run folder, for example `alibi_L64_s1` or `alibi_L64_s1_0f3a9c21`.

    Args:
        position: name of the position scheme.
        train_length: tokens of a training sequence.
        seed: seed of the run.
        overrides_hash: `short_hash` of the settings that differ from the experiment's own, or None.

    Raises:
        ValueError: a part that would not be a plain file name.
    """
    name = f"{position}_L{train_length}_s{seed}" + (f"_{overrides_hash}" if overrides_hash else "")
    require(
        re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name) is not None,
        f"run name = {name!r} is not a plain folder name. "
        "Use letters, digits, '_', '.' and '-' in position and seed, or give output_dir.",
    )
    return name


# --- the records of a run -------------------------------------------------------------------------


def require_readable(config: TrainConfig) -> None:
    """Refuse settings that could not be read back from config.yaml, before a run is trained with them."""
    with tempfile.TemporaryDirectory() as place:
        _write_config(config, Path(place))
        try:
            again = load_config(Path(place))
        except ValueError as error:
            reason = " ".join(str(error).replace(f"{Path(place) / CONFIG_FILE} ", "").split())
            raise ValueError(
                f"These settings could not be read back from a run's {CONFIG_FILE}: {reason}. "
                "Choose an entry of a group by its name alone (position=<name>, not position.name=<name>)."
            ) from error
    changed = [
        f"{name} = {getattr(config, name)!r} becomes {getattr(again, name)!r}"
        for name in (f.name for f in dataclasses.fields(config))
        if getattr(config, name) != getattr(again, name)
    ]
    require(not changed, f"{CONFIG_FILE} would not hold these settings: {'; '.join(changed)}. Use plain values.")


def _write_config(config: TrainConfig, folder: Path) -> None:
    write_text(folder / CONFIG_FILE, OmegaConf.to_yaml(OmegaConf.create(to_dict(config))))


def write_records(config: TrainConfig, folder: Path, corpus: Corpus, device: torch.device) -> None:
    """config.yaml, environment.json, corpus.json and the tokenizer: all that explains the run, first of all."""
    if not (folder / CONFIG_FILE).exists():
        _write_config(config, folder)
    attention = {"attention": chosen_backend(config.attention.name)}
    write_json(folder / "environment.json", runtime.environment(device) | attention)
    write_json(folder / CORPUS_FILE, corpus.manifest)
    corpus.tokenizer.save(folder / "tokenizer.json")


def delete_run(folder: Path) -> None:
    """Delete a run folder, but nothing that is not one."""
    if not folder.exists():
        return
    require(
        (folder / CONFIG_FILE).is_file() or not any(p for p in folder.iterdir() if p.name != LOCK_FILE),
        f"overwrite = true, but {folder} is no run folder (it has no {CONFIG_FILE}). Nothing was deleted.",
    )
    with RunLock(folder):
        for entry in folder.iterdir():
            if entry.name == LOCK_FILE:
                continue
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


# --- marks ---------------------------------------------------------------------------------------


def mark_finished(run_folder: Path, payload: Mapping[str, Any]) -> None:
    """Write `finished.json`, the last act of a run, and remove the mark of an earlier failure."""
    write_json(Path(run_folder) / FINISHED_FILE, dict(payload))
    clear_failed(run_folder)


def finished(run_folder: Path) -> dict[str, Any] | None:
    """What `mark_finished` was given, or None; an unreadable mark is reported and counts as none."""
    return read_json_if_whole(Path(run_folder) / FINISHED_FILE)


def mark_failed(run_folder: Path, message: str, **details: Any) -> None:
    """Write `failed.json` with the error message. A run that is started again clears it."""
    write_json(Path(run_folder) / FAILED_FILE, {"message": message, **details})


def failed(run_folder: Path) -> dict[str, Any] | None:
    """What `mark_failed` was given (`message` and details), or None."""
    return read_json_if_whole(Path(run_folder) / FAILED_FILE)


def clear_failed(run_folder: Path) -> None:
    """Remove the mark of a failure, if there is one."""
    (Path(run_folder) / FAILED_FILE).unlink(missing_ok=True)


def status(run_folder: Path) -> Status:
    """State of a run folder.

    Returns:
        `finished` (has its mark), `running` (a living process holds the lock), `failed` (ended with
        an error), `partial` (was killed or stopped: the same command resumes it) or `missing`.
    """
    run_folder = Path(run_folder)
    if finished(run_folder) is not None:
        return "finished"
    if is_locked(run_folder):
        return "running"
    if failed(run_folder) is not None:
        return "failed"
    return "partial" if run_folder.is_dir() and any(run_folder.iterdir()) else "missing"


# --- lock ----------------------------------------------------------------------------------------


class RunLock:
    """One process on one run folder: `with RunLock(run_folder): ...`.

    The lock is the operating system's, on the open file, so a process that dies in any way lets go
    of it; the empty file `.lock` that stays behind means nothing.

    Raises:
        ValueError: on entering, when another process holds the folder or it cannot be written.
    """

    def __init__(self, run_folder: Path):
        self.run_folder = Path(run_folder)
        self._lock: Any = None

    def __enter__(self) -> RunLock:
        from filelock import FileLock, Timeout

        try:
            self.run_folder.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.run_folder / LOCK_FILE)
            self._lock.acquire(timeout=LOCK_WAIT_SECONDS, poll_interval=0.05)
        except Timeout:
            raise ValueError(
                f"output_dir = {self.run_folder} is in use by another process. "
                "Wait until it ends, or give another output_dir."
            ) from None
        except OSError as error:
            raise ValueError(
                f"output_dir = {self.run_folder} cannot be written ({error.strerror or error}). "
                "Give an output_dir that this user may write to."
            ) from error
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._lock.release()


def is_locked(run_folder: Path) -> bool:
    """Whether a living process holds the run folder. Creates nothing."""
    from filelock import FileLock, Timeout

    path = Path(run_folder) / LOCK_FILE
    if not path.is_file():
        return False
    probe = FileLock(path)
    try:
        probe.acquire(timeout=0)
    except Timeout:
        return True
    except OSError:  # not ours to write: nobody we could get in the way of
        return False
    probe.release()
    return False


# --- the model of a run --------------------------------------------------------------------------


def build_model(
    config: TrainConfig, vocab_size: int, attention: str | None = None, context_length: int | None = None
) -> TransformerLM:
    """The model of a config, freshly initialised from torch's global generator.

    Args:
        config: of the run.
        vocab_size: of its tokenizer.
        attention: backend, where it is not the config's own.
        context_length: longest sequence to be served; None: train_length.
    """
    return TransformerLM(
        config.model,
        config.position,
        attention or config.attention.name,
        vocab_size,
        config.train_length,
        context_length,
    )


def load_run(
    folder: str | Path,
    inference_length: int | None = None,
    checkpoint: str = "best",
    attention: str = "auto",
    device: str | torch.device = "cpu",
    position: dict[str, Any] | None = None,
    precision: str = "float32",
) -> TransformerLM:
    """Load a trained model in evaluation mode.

    The checkpoint is read and checked once; `model.serve(length)` prepares the model for further lengths.

    Args:
        folder: the run folder.
        inference_length: longest sequence it will be given, >= 1; schemes with automatic scaling depend on it.
            None: the training length.
        checkpoint: `best` (lowest validation loss), `last` or `step:<number>`.
        attention: backend; they differ by float32 rounding.
        device: where to put the model: cpu, cuda or cuda:<index>.
        position: settings of the scheme to change for this test, e.g. {"scaling": "yarn"}.
        precision: of scoring: float32, bfloat16, or auto (bfloat16 on GPUs that have it).

    Returns:
        The model, with `label` (the folder's name), `identity` (what its scores depend on) and `precision`.

    Raises:
        ValueError: an argument out of range, not a run folder, no whole checkpoint, files of another run, or
            weights that do not fit the config.
    """
    folder = Path(folder)
    length = _whole_number("inference_length", inference_length)
    require(attention in ATTENTION, f"attention = {attention!r}. Allowed: {', '.join(ATTENTION)}.")
    where = runtime.existing_device(device)
    precision = runtime.resolve_precision(where, precision)
    config = load_config(folder)
    if position:
        own = config.position.name
        name = position.get("name", own) if isinstance(position, Mapping) else None
        require(
            name == own,
            f"position = {position}. The run was trained with position={own}; another scheme is another model. "
            'Give settings of its own scheme as a mapping, such as {"scaling": "yarn"} for rotary.',
        )
        try:
            changed = OmegaConf.merge(OmegaConf.structured(config.position), position)
            config = dataclasses.replace(config, position=OmegaConf.to_object(changed))
        except OmegaConfBaseException as error:
            raise ValueError(
                f"position = {position} does not fit position={config.position.name}: {error}"
            ) from error
    found = CheckpointStore(folder / CHECKPOINTS).get(checkpoint)
    require_own_files(folder, found)
    model = build_model(config, int(found.state["vocab_size"]), attention, length)
    found.load_into(model)
    settings = {
        "weights": found.weights_sha256,
        "model": dataclasses.asdict(config.model),
        "position": dataclasses.asdict(config.position),
        "train_length": config.train_length,
        "backend": model.backend.name,
        "precision": precision,
    }
    model.label, model.identity = folder.resolve().name, short_hash(settings, digits=12)
    model.precision = precision
    return model.to(where).eval()


def _whole_number(name: str, value: Any) -> int | None:
    if value is None:
        return None
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    require(number >= 1 and not isinstance(value, bool), f"{name} = {value!r}. Use a whole number >= 1.")
    return number
