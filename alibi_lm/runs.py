"""The run folder: its name, identity, records, lock and marks.

    outputs/<experiment>/runs/<position>_L<train_length>_s<seed>[_<hash of the settings that differ>]/

A folder is named after what was asked for, so that repeating the command finds it. Its state is read from
three things only: the operating system's lock on `.lock` (released when the process ends, for any reason),
`finished.json` and `failed.json`. A run is identified by the settings that count and the digests of its text.
Checkpoints, `best.json` and `finished.json` carry this identity, which is checked when they are read: a file from
another run's folder is refused.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from alibi_lm import runtime
from alibi_lm.checkpoint import BEST_FILE, Checkpoint
from alibi_lm.config import CONFIG_FILE, TrainConfig, from_yaml, load_config, to_yaml
from alibi_lm.files import read_json, read_json_if_whole, short_digest, write_json, write_text
from alibi_lm.model.transformer import TransformerLM
from alibi_lm.settings import counting, identifying, require
from alibi_lm.tasks.training import TrainingData
from alibi_lm.tracking import METRICS_FILE, WANDB_ID_FILE, read_metrics

Status = Literal["finished", "running", "failed", "partial", "missing"]

CORPUS_FILE, CHECKPOINTS, LOCK_FILE = "corpus.json", "checkpoints", ".lock"
FINISHED_FILE, FAILED_FILE = "finished.json", "failed.json"
ENVIRONMENT_FILE, TOKENIZER_FILE = "environment.json", "tokenizer.json"
RUN_FILES = (
    FINISHED_FILE, FAILED_FILE, CHECKPOINTS, "import.json", METRICS_FILE, "wandb", WANDB_ID_FILE, TOKENIZER_FILE,
    CORPUS_FILE, ENVIRONMENT_FILE, CONFIG_FILE,
)  # fmt: skip
"""All that a run writes into its folder, in the order of deletion: what is left by a kill is still a run folder,
and not a finished one."""
_PASSING = re.compile(r"\..*|.*\.(log|out|err)|multirun\.yaml")
"""Names that stand in a run folder without being the run's: hidden ones (`.lock`, Hydra's `.hydra`, `.submitit`),
and logs of a scheduler or a shell, which make them before a run starts. They are never deleted."""
LOCK_WAIT_SECONDS = 1.0
"""A status query holds the lock for an instant; a run that starts in that instant waits it out."""
PUT_BACK = "Put the run's own file back, or train it again with overwrite=true."


# --- names ---------------------------------------------------------------------------------------


def experiment_folder(experiment: str) -> Path:
    """The folder of all files of an experiment, relative to the current folder."""
    return Path("outputs") / experiment


def run_folders(runs: str | Path) -> list[Path]:
    """The folders that `runs` names, in order: one folder, or those that match a glob (`outputs/quick/runs/*`)."""
    pattern = glob.escape(str(runs)) if Path(runs).is_dir() else str(runs)
    return [path for path in map(Path, sorted(glob.glob(pattern))) if path.is_dir()]


def run_name(config: TrainConfig, suffix: str = "") -> str:
    """Name of a run, for example `alibi_L64_s1`, or `alibi_L50_s1_sort_0f3a9c21` with its task and a suffix.

    Raises:
        ValueError: the name would not be a plain file name.
    """
    task = "" if config.task.name == "text" else config.task.name
    parts = [f"{config.position.name}_L{config.train_length}_s{config.seed}", task, suffix]
    name = "_".join(part for part in parts if part)
    require(
        re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name) is not None,
        f"run name = {name!r} is not a plain folder name. "
        "Use letters, digits, '_', '.' and '-' in the name of a position scheme, or give output_dir.",
    )
    return name


# --- identity ------------------------------------------------------------------------------------


def short_hash(mapping: Mapping[str, Any], digits: int = 8) -> str:
    """A hash, in hex digits, of a mapping of plain values; the order of keys does not matter."""
    text = json.dumps(mapping, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:digits]


def differing_settings(config: TrainConfig, baseline: TrainConfig) -> dict[str, Any]:
    """The settings that count in which `config` differs from `baseline`, by dotted name.

    If a run differs from its experiment's settings, its folder gets a suffix. A setting that only the baseline has
    is None.
    """
    ours, theirs = (counting(c, "run", "rounding") for c in (config, baseline))
    return {name: ours.get(name) for name in sorted(ours | theirs) if ours.get(name) != theirs.get(name)}


def run_identity(config: TrainConfig, corpus_manifest: Mapping[str, Any]) -> str:
    """A hash, 12 hex digits, of the settings and the text of a run; it does not depend on where they are stored.

    Args:
        config: the run's.
        corpus_manifest: that of its corpus, as in corpus.json; empty if unknown.
    """
    return short_hash({"settings": identifying(config), **_corpus_digests(corpus_manifest)}, digits=12)


def _corpus_digests(manifest: Mapping[str, Any]) -> dict[str, str | None]:
    """sha256 of the tokenizer, training text and validation text of a run (None: not known)."""
    splits = manifest.get("splits") or {}
    parts = {"tokenizer": manifest.get("tokenizer"), "training text": splits.get("train")}
    parts["validation text"] = splits.get("validation")
    return {what: (part or {}).get("sha256") for what, part in parts.items()}


def folder_identity(folder: Path) -> str:
    """`run_identity` of the run in a folder, by its config.yaml and corpus.json.

    Raises:
        ValueError: not a run folder, or one of the files is damaged.
    """
    path = folder / CORPUS_FILE
    return run_identity(load_config(folder), read_json(path) if path.is_file() else {})


def require_own_files(folder: Path, checkpoint: Checkpoint | None) -> None:
    """Refuse a checkpoint, best.json, finished.json, corpus.json or config.yaml of another run.

    Files written before identities existed are compared with one another as far as their contents allow.

    Raises:
        ValueError: a file is foreign; the message names it and the run that it belongs to.
    """
    config, own = load_config(folder), folder_identity(folder)
    config_path, corpus_path = folder / CONFIG_FILE, folder / CORPUS_FILE
    best_path, done_path = folder / CHECKPOINTS / BEST_FILE, folder / FINISHED_FILE
    best, done = read_json_if_whole(best_path) or {}, read_json_if_whole(done_path) or {}
    state, state_path = ({}, folder) if checkpoint is None else (checkpoint.state, checkpoint.path)

    written = {state_path: state, best_path: best, done_path: done}
    known = {path: content for path, content in written.items() if "run" in content}
    foreign = [path for path, content in known.items() if content["run"] != own]
    if foreign:
        theirs = known[foreign[0]]
        itself, other = f"{run_name(config)} ({own})", f"{theirs.get('run_name')} ({theirs['run']})"
        if len(foreign) == len(known) > 1:
            changed = "" if corpus_path.is_file() else f"{corpus_path.name} is missing here, or "
            changed += f"a setting in {CONFIG_FILE} was changed after the training, or it was taken from elsewhere"
            message = f"{config_path} describes {itself}, but {', '.join(p.name for p in known)} beside it are of"
            raise ValueError(f"{message} another run, {other}: {changed}. {PUT_BACK}")
        raise ValueError(
            f"{foreign[0]} belongs to another run, {other}, than the rest of {folder}: {itself}. {PUT_BACK}"
        )

    same = [  # what finished.json says under this name, and another file as well
        ("position", "position", config.position.name, config_path),
        ("train_length", "train_length", config.train_length, config_path),
        ("best validation loss", "best_validation_loss", best.get("validation_loss"), best_path),
        ("training text", "corpus", _text_hash(corpus_path), corpus_path),
    ]
    if checkpoint is not None and done.get("steps") == checkpoint.step:
        names = ("validation_loss", "best_validation_loss", "tokens_seen")
        same += [(name, name, state.get(name), state_path) for name in names]
    facts = [(what, here, where, done.get(name), done_path) for what, name, here, where in same]
    if checkpoint is not None and best.get("step") == checkpoint.step == state.get("best_step"):
        saved = state.get("best_validation_loss")
        facts.append(("best validation loss", saved, state_path, best.get("validation_loss"), best_path))
    for what, here, where, there, place in facts:
        require(
            here is None or there is None or here == there,
            f"{place} says {what} = {there}, {where} {here}: one is another run's. {PUT_BACK}",
        )


def _text_hash(path: Path) -> str | None:
    """The value that finished.json has as `corpus`: a hash of tokenizer and training text."""
    try:
        manifest = read_json(path)
        return short_digest(manifest["tokenizer"]["sha256"], manifest["splits"]["train"]["text_sha256"])
    except (FileNotFoundError, KeyError, TypeError):
        return None


def own_metrics(folder: Path, latest: Checkpoint) -> int:
    """How many rows metrics.jsonl held when a checkpoint was written; later rows will be written again.

    Raises:
        ValueError: some of these rows are missing, or they are another run's.
    """
    path = folder / METRICS_FILE
    rows = [row for row in (read_metrics(path) if path.is_file() else []) if row["step"] <= latest.step]
    # Runs of an earlier version do not record the number, but it follows from their settings.
    expected = latest.state.get("metrics_rows", max(len(rows), latest.step // load_config(folder).log_every))
    require(
        len(rows) >= expected,
        f"{path} holds {len(rows)} of the {expected} rows that were written up to step {latest.step}. {PUT_BACK}",
    )
    measured = [row["validation/loss"] for row in rows[:expected] if "validation/loss" in row][-1:]
    loss = latest.state.get("validation_loss")
    require(
        loss is None or measured == [loss],
        f"{path} says validation/loss = {measured}, {latest.path.name} {loss}: it is another run's. {PUT_BACK}",
    )
    return expected


def require_same_settings(config: TrainConfig, folder: Path) -> None:
    """Refuse to continue a run with other settings. Where its files and its text are stored does not matter."""
    there = load_config(folder)
    now, before = differing_settings(config, there), differing_settings(there, config)
    differences = "; ".join(f"{name}: {before[name]!r} there, {now[name]!r} now" for name in now)
    require(
        not differences,
        f"output_dir = {folder} holds a run with other settings ({differences}). "
        "Use overwrite=true to start over, or another output_dir.",
    )


def same_place(config: TrainConfig, folder: Path) -> bool:
    """Whether the config names the same place of the text as the run in a folder, however the path is written."""
    here, there = (
        "" if c.data.path is None else str(Path(c.data.path).resolve()) for c in (config, load_config(folder))
    )
    return here == there


def require_same_text(folder: Path, corpus: TrainingData) -> None:
    """Refuse to continue a run on another text, or with another tokenizer."""
    record = folder / CORPUS_FILE
    if not record.is_file() or not any((folder / CHECKPOINTS).glob("*")):
        return
    there, here = _corpus_digests(read_json(record)), _corpus_digests(corpus.manifest)
    for what in there:
        require(
            there[what] == here[what],
            f"output_dir = {folder} holds a run with another {what} (sha256 {str(there[what])[:12]} there, "
            f"{str(here[what])[:12]} now). Give it the text it was begun with, or use overwrite=true to start "
            "over.",
        )


# --- records -------------------------------------------------------------------------------------


def require_readable(config: TrainConfig) -> None:
    """Before training, refuse settings that could not be read back from config.yaml."""
    try:
        again = from_yaml(to_yaml(config))
    except ValueError as error:
        raise ValueError(
            f"These settings could not be read back from a run's {CONFIG_FILE}: {' '.join(str(error).split())}. "
            "Choose an entry of a group by its name alone (position=<name>, not position.name=<name>)."
        ) from error
    changed = [
        f"{field.name} = {getattr(config, field.name)!r} becomes {getattr(again, field.name)!r}"
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != getattr(again, field.name)
    ]
    require(not changed, f"{CONFIG_FILE} would not hold these settings: {'; '.join(changed)}. Use plain values.")


def write_records(config: TrainConfig, folder: Path, corpus: TrainingData, model: TransformerLM) -> None:
    """Write config.yaml, environment.json, corpus.json and the tokenizer, before training begins."""
    if not (folder / CONFIG_FILE).exists():
        write_text(folder / CONFIG_FILE, to_yaml(config))
    environment = runtime.environment(model.device) | {"attention": model.backend.name}
    write_json(folder / ENVIRONMENT_FILE, environment)
    write_json(folder / CORPUS_FILE, dict(corpus.manifest))
    if corpus.tokenizer is not None:
        corpus.tokenizer.save(folder / TOKENIZER_FILE)


def _is_of_run(name: str, files: tuple[str, ...] = RUN_FILES) -> bool:
    """Whether a run writes an entry of this name, or the temporary file that a kill leaves of it."""
    return re.sub(r"\.\d+\.tmp$", "", name) in files


def _foreign(folder: Path, files: tuple[str, ...], cache: Path | None) -> list[str]:
    """Names in a folder that are neither in `files` nor passing ones, nor lead to the folder of prepared texts."""
    names = [entry.name for entry in folder.iterdir()]
    names = [name for name in names if not _is_of_run(name, files) and not _PASSING.fullmatch(name)]
    return sorted(n for n in names if cache is None or not cache.resolve().is_relative_to((folder / n).resolve()))


def require_place(folder: Path, cache: Path | None = None) -> None:
    """Refuse to begin a run in a folder that holds files but no run; nothing is written.

    What a run leaves that is killed before it has written config.yaml is no obstacle.

    Args:
        folder: the run folder, which need not exist.
        cache: folder of prepared texts, which may lie in the run folder.

    Raises:
        ValueError: there are such files; the message names them.
    """
    path = folder / CONFIG_FILE
    if not folder.is_dir() or path.is_file():
        return
    try:
        foreign = _foreign(folder, (CONFIG_FILE, FAILED_FILE), cache) + [CONFIG_FILE] * path.exists()
    except OSError as error:
        raise ValueError(
            f"output_dir = {folder} cannot be read ({error.strerror or error}). Give another folder."
        ) from error
    require(
        not foreign,
        f"output_dir = {folder} holds files but no run: {_listed(foreign)}, and no file {CONFIG_FILE}. "
        "Give a new or empty folder.",
    )


def delete_run(folder: Path, cache: Path | None = None) -> None:
    """Delete what a run has written into its folder, config.yaml last.

    Args:
        folder: the run folder, which need not exist.
        cache: folder of prepared texts; it is left where it lies in the run folder.

    Raises:
        ValueError: not a run folder, or it holds anything that no run writes, or it is in use; nothing was
            deleted.
    """
    if not folder.exists():
        return
    require_place(folder, cache)
    with run_lock(folder):
        foreign = _foreign(folder, RUN_FILES, cache)
        require(
            not foreign,
            f"overwrite = true, but {folder} holds more than a run: {_listed(foreign)}. Nothing was deleted. "
            "Move what does not belong to the run elsewhere, or give another output_dir.",
        )
        own = [name for name in (entry.name for entry in folder.iterdir()) if _is_of_run(name)]
        for name in sorted(own, key=lambda name: RUN_FILES.index(name) if name in RUN_FILES else -1):
            path = folder / name
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _listed(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


# --- marks and lock ------------------------------------------------------------------------------


def mark_finished(folder: Path, payload: Mapping[str, Any]) -> None:
    """Write `finished.json`, the last act of a run, and remove the mark of an earlier failure."""
    write_json(folder / FINISHED_FILE, dict(payload))
    clear_failed(folder)


def finished(folder: Path) -> dict[str, Any] | None:
    """The payload given to `mark_finished`, or None; an unreadable mark is reported and ignored."""
    return read_json_if_whole(folder / FINISHED_FILE)


def mark_failed(folder: Path, message: str) -> None:
    """Write `failed.json` with the error message. Starting the run again removes it."""
    write_json(folder / FAILED_FILE, {"message": message})


def failed(folder: Path) -> str | None:
    """The message given to `mark_failed`, or None."""
    mark = read_json_if_whole(folder / FAILED_FILE)
    return None if mark is None else str(mark.get("message", ""))


def clear_failed(folder: Path) -> None:
    """Remove the mark of a failure, if there is one."""
    (folder / FAILED_FILE).unlink(missing_ok=True)


def status(folder: Path) -> Status:
    """State of a run folder.

    Returns:
        `finished` (has its mark), `running` (a process holds the lock), `failed` (ended with an error),
        `partial` (killed or stopped: the same command resumes it) or `missing`.
    """
    if finished(folder) is not None:
        return "finished"
    if is_locked(folder):
        return "running"
    if failed(folder) is not None:
        return "failed"
    return "partial" if folder.is_dir() and any(folder.iterdir()) else "missing"


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Inside this context, only this process works on the run folder, which is created if missing.

    The operating system holds the lock on the open file, so a process that dies in any way releases it; the
    empty file `.lock` that stays behind means nothing.

    Raises:
        ValueError: another process holds the folder, or it cannot be written.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / LOCK_FILE)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=LOCK_WAIT_SECONDS, poll_interval=0.05)
    except Timeout:
        raise ValueError(
            f"output_dir = {folder} is in use by another process. Wait until it ends, or give another output_dir."
        ) from None
    except OSError as error:
        raise ValueError(
            f"output_dir = {folder} cannot be written ({error.strerror or error}). "
            "Give an output_dir that this user may write to."
        ) from error
    try:
        yield
    finally:
        lock.release()


def is_locked(folder: Path) -> bool:
    """Whether a process holds the lock of the run folder. Creates nothing."""
    from filelock import FileLock, Timeout

    path = folder / LOCK_FILE
    if not path.is_file():
        return False
    try:
        with FileLock(path, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # we may not write here, so we cannot disturb another process
        return False
