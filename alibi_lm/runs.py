"""The run folder: its name, its lock, its marks, and the model that was trained in it.

A run folder is named by what was asked for, so that the same command given again finds it:
`<position>_L<train_length>_s<seed>[_<hash of the other overrides>]`.
Its state is read from three things only: the operating system's lock on `.lock` (gone with the
process, however it ended), `finished.json` and `failed.json`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from alibi_lm.checkpoint import CheckpointStore
from alibi_lm.config import TrainConfig, load_config
from alibi_lm.files import read_json, write_json
from alibi_lm.model.transformer import TransformerLM
from alibi_lm.settings import require

Status = Literal["finished", "running", "failed", "partial", "missing"]

LOCK_FILE = ".lock"
FINISHED_FILE = "finished.json"
FAILED_FILE = "failed.json"
# A status query holds the lock for an instant; a run that starts in that instant waits it out.
_LOCK_WAIT_SECONDS = 1.0

log = logging.getLogger("alibi_lm")


def short_hash(mapping: Mapping[str, Any]) -> str:
    """Eight hex digits that stand for a mapping of plain values; the order of keys does not matter."""
    return hashlib.sha256(_canonical(mapping).encode()).hexdigest()[:8]


def run_name(position: str, train_length: int, seed: int, overrides_hash: str | None = None) -> str:
    """Name of a run folder, for example `alibi_L64_s1` or `alibi_L64_s1_0f3a9c21`.

    Args:
        position: name of the position scheme.
        train_length: tokens in a training sequence.
        seed: seed of the run.
        overrides_hash: `short_hash` of the settings that differ from the experiment's own, or None.

    Raises:
        ValueError: a part that would not be a plain file name.
    """
    name = f"{position}_L{train_length}_s{seed}" + (f"_{overrides_hash}" if overrides_hash else "")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise ValueError(
            f"run name = {name!r} is not a plain folder name. "
            "Use letters, digits, '_', '.' and '-' in position and seed, or give output_dir."
        )
    return name


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)


# --- marks ---------------------------------------------------------------------------------------


def mark_finished(run_folder: Path, payload: Mapping[str, Any]) -> None:
    """Writes `finished.json` (the last act of a run) and removes the mark of an earlier failure."""
    write_json(Path(run_folder) / FINISHED_FILE, dict(payload))
    clear_failed(run_folder)


def finished(run_folder: Path) -> dict[str, Any] | None:
    """What `mark_finished` was given, or None; an unreadable mark is reported and counts as none."""
    return _read_mark(Path(run_folder) / FINISHED_FILE)


def mark_failed(run_folder: Path, message: str, **details: Any) -> None:
    """Writes `failed.json` with the error message. A run that is started again clears it."""
    write_json(Path(run_folder) / FAILED_FILE, {"message": message, **details})


def failed(run_folder: Path) -> dict[str, Any] | None:
    """What `mark_failed` was given (`message` and details), or None."""
    return _read_mark(Path(run_folder) / FAILED_FILE)


def clear_failed(run_folder: Path) -> None:
    """Removes the mark of a failure, if there is one."""
    (Path(run_folder) / FAILED_FILE).unlink(missing_ok=True)


def _read_mark(path: Path) -> dict[str, Any] | None:
    try:
        return read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, OSError) as error:
        log.warning("%s; taken as absent", error)
        return None


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
            self._lock.acquire(timeout=_LOCK_WAIT_SECONDS, poll_interval=0.05)
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


# --- the model of a run ---------------------------------------------------------------------------


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
) -> TransformerLM:
    """Load a trained model in evaluation mode.

    Args:
        folder: the run folder.
        inference_length: longest sequence it will be given; schemes with automatic scaling depend on it.
            None: the training length.
        checkpoint: `best` (lowest validation loss) or `last`.
        attention: backend; they differ by float32 rounding.
        device: where to put the model.
        position: settings of the scheme to change for this test, e.g. {"scaling": "yarn"}.

    Raises:
        ValueError: not a run folder, no whole checkpoint, or weights that do not fit the config.
    """
    folder = Path(folder)
    config = load_config(folder)
    if position:
        try:
            changed = OmegaConf.merge(OmegaConf.structured(config.position), position)
            config = dataclasses.replace(config, position=OmegaConf.to_object(changed))
        except OmegaConfBaseException as error:
            raise ValueError(
                f"position = {position} does not fit position={config.position.name}: {error}"
            ) from error
    store = CheckpointStore(folder / "checkpoints")
    found = store.get(checkpoint)
    require(found is not None, f"{folder} holds no whole {checkpoint} checkpoint. Train it first.")
    assert found is not None
    vocab_size = int(found.state["vocab_size"])
    model = build_model(config, vocab_size, attention, inference_length)
    found.load_into(model)
    return model.to(device).eval()
