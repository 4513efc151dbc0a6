"""The run folder: its name, identity, lock and marks, and the model that was trained in it.

    outputs/<experiment>/runs/<position>_L<train_length>_s<seed>[_<hash of the settings that differ>]/

A folder is named by what was asked for, so that the same command given again finds it. Its state is read from
three things only: the operating system's lock on `.lock` (gone with the process, however it ended), `finished.json`
and `failed.json`. Checkpoints, `best.json` and `finished.json` carry the identity of their run, which is checked when
they are read: a file that was copied from another run's folder is refused.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import json
import logging
import operator
import re
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from alibi_lm import runtime
from alibi_lm.attention import ATTENTION
from alibi_lm.checkpoint import BEST_FILE, Checkpoint, CheckpointStore
from alibi_lm.config import TrainConfig, load_config
from alibi_lm.files import read_json, write_json
from alibi_lm.model.transformer import TransformerLM
from alibi_lm.settings import counting, require

Status = Literal["finished", "running", "failed", "partial", "missing"]

CONFIG_FILE, CORPUS_FILE, CHECKPOINTS = "config.yaml", "corpus.json", "checkpoints"
FINISHED_FILE, FAILED_FILE, LOCK_FILE = "finished.json", "failed.json", ".lock"
LOCK_WAIT_SECONDS = 1.0
"""A status query holds the lock for an instant; a run that starts in that instant waits it out."""

log = logging.getLogger("alibi_lm")


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


def short_hash(mapping: Mapping[str, Any], digits: int = 8) -> str:
    """Hex digits that stand for a mapping of plain values; the order of keys does not matter."""
    text = json.dumps(mapping, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:digits]


def differing_settings(config: TrainConfig, baseline: TrainConfig) -> dict[str, Any]:
    """Settings that count and in which `config` differs from `baseline`, by dotted name.

    Those in which a run differs from its experiment's own give its folder a suffix. A setting that only the
    baseline has is None.
    """
    ours, theirs = (counting(c, "run", "rounding") for c in (config, baseline))
    return {name: ours.get(name) for name in sorted(ours | theirs) if ours.get(name) != theirs.get(name)}


# --- identity ------------------------------------------------------------------------------------


def run_identity(config: TrainConfig, corpus_manifest: Mapping[str, Any], names: set[str] | None = None) -> str:
    """12 hex digits that stand for the settings and the text of a run, wherever both lie.

    Args:
        config: of the run.
        corpus_manifest: of its corpus, as in corpus.json; empty where it is not known.
        names: settings that count here, dotted; None: all. A run that was saved by an earlier version is known by
            the settings that there were then.
    """
    settings = counting(config, "run", "rounding")
    return short_hash(
        {
            "settings": {name: value for name, value in settings.items() if names is None or name in names},
            **corpus_digests(corpus_manifest),
        },
        digits=12,
    )


def corpus_digests(manifest: Mapping[str, Any]) -> dict[str, str | None]:
    """sha256 of what a run is trained on: tokenizer, training text and validation text (None: not known)."""
    splits = manifest.get("splits") or {}
    parts = {"tokenizer": manifest.get("tokenizer"), "training text": splits.get("train")}
    parts["validation text"] = splits.get("validation")
    return {what: (part or {}).get("sha256") for what, part in parts.items()}


def folder_identity(folder: Path) -> str:
    """`run_identity` of the run in a folder, by its config.yaml and corpus.json.

    Raises:
        ValueError: no run folder, or one of the files is damaged.
    """
    config = load_config(folder)
    path = folder / CORPUS_FILE
    manifest = read_json(path) if path.is_file() else {}
    return run_identity(config, manifest, _names(OmegaConf.to_container(OmegaConf.load(folder / CONFIG_FILE))))


def _names(settings: Any, prefix: str = "") -> set[str]:
    if not isinstance(settings, dict):
        return {prefix.rstrip(".")}
    return {name for key, value in settings.items() for name in _names(value, f"{prefix}{key}.")}


def require_own_files(folder: Path, checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint, best.json, finished.json or corpus.json that came from another run's folder.

    Files written before they carried an identity are held against one another as far as their contents allow.

    Raises:
        ValueError: naming the file and the run that it belongs to.
    """
    own = folder_identity(folder)
    best = _read_mark(folder / CHECKPOINTS / BEST_FILE) or {}
    done = finished(folder) or {}
    state = checkpoint.state
    advice = "Put the run's own file back, or train it again with overwrite=true."
    for path, content in (
        (checkpoint.path, state),
        (folder / CHECKPOINTS / BEST_FILE, best),
        (folder / FINISHED_FILE, done),
    ):
        run = content.get("run")
        if run is None:
            continue
        require(
            (folder / CORPUS_FILE).is_file(),
            f"{folder / CORPUS_FILE} is missing: it tells which text the run was trained on. {advice}",
        )
        require(
            run == own,
            f"{path} belongs to another run, {content.get('run_name')} ({run}), than the rest of {folder} "
            f"({own} by its {CONFIG_FILE} and {CORPUS_FILE}). {advice}",
        )

    config = load_config(folder)
    facts: list[tuple[str, Any, str, Any]] = [
        ("position", config.position.name, CONFIG_FILE, done.get("position")),
        ("train_length", config.train_length, CONFIG_FILE, done.get("train_length")),
        ("best validation loss", best.get("validation_loss"), BEST_FILE, done.get("best_validation_loss")),
    ]
    name = checkpoint.path.name
    if done.get("steps") == checkpoint.step:
        facts += [
            (what, state.get(key), name, done.get(key))
            for what, key in (
                ("validation loss", "validation_loss"),
                ("best validation loss", "best_validation_loss"),
                ("tokens_seen", "tokens_seen"),
            )
        ]
    if (folder / CORPUS_FILE).is_file():
        facts.append(
            ("training text", _text_hash(read_json(folder / CORPUS_FILE)), CORPUS_FILE, done.get("corpus"))
        )
    for what, here, where, there in facts:
        require(
            here is None or there is None or here == there,
            f"{folder / FINISHED_FILE} says {what} = {there}, {where} {here}: one of them came from another run. "
            f"{advice}",
        )
    if best.get("step") == checkpoint.step and state.get("best_step") == checkpoint.step:
        noted, saved = best.get("validation_loss"), state.get("best_validation_loss")
        require(
            noted is None or saved is None or noted == saved,
            f"{folder / CHECKPOINTS / BEST_FILE} says validation loss {noted}, {name} {saved}: one of them came "
            f"from another run. {advice}",
        )


def _text_hash(manifest: Mapping[str, Any]) -> str | None:
    """What finished.json calls `corpus`: tokenizer and training text."""
    try:
        parts = manifest["tokenizer"]["sha256"], manifest["splits"]["train"]["text_sha256"]
    except (KeyError, TypeError):
        return None
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


# --- marks ---------------------------------------------------------------------------------------


def mark_finished(run_folder: Path, payload: Mapping[str, Any]) -> None:
    """Write `finished.json`, the last act of a run, and remove the mark of an earlier failure."""
    write_json(Path(run_folder) / FINISHED_FILE, dict(payload))
    clear_failed(run_folder)


def finished(run_folder: Path) -> dict[str, Any] | None:
    """What `mark_finished` was given, or None; an unreadable mark is reported and counts as none."""
    return _read_mark(Path(run_folder) / FINISHED_FILE)


def mark_failed(run_folder: Path, message: str, **details: Any) -> None:
    """Write `failed.json` with the error message. A run that is started again clears it."""
    write_json(Path(run_folder) / FAILED_FILE, {"message": message, **details})


def failed(run_folder: Path) -> dict[str, Any] | None:
    """What `mark_failed` was given (`message` and details), or None."""
    return _read_mark(Path(run_folder) / FAILED_FILE)


def clear_failed(run_folder: Path) -> None:
    """Remove the mark of a failure, if there is one."""
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
        checkpoint: `best` (lowest validation loss) or `last`.
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
    named = {"label": folder.resolve().name, "identity": short_hash(settings, digits=12), "precision": precision}
    for name, value in named.items():
        setattr(model, name, value)
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
