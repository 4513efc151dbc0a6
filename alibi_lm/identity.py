"""What a run is known by, and whether the files in a folder belong to it.

A run is known by what it depends on: the settings that count and the digests of its text, wherever both lie.
Checkpoints, `best.json` and `finished.json` carry its identity, which is checked when they are read, so that a
file of another run's folder is refused. Files written before they carried one are held against one another.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from alibi_lm.checkpoint import BEST_FILE, Checkpoint
from alibi_lm.config import TrainConfig, load_config
from alibi_lm.data.corpus import Corpus
from alibi_lm.files import read_json, read_json_if_whole
from alibi_lm.settings import counting, require
from alibi_lm.tracking import METRICS_FILE, read_metrics

CONFIG_FILE, CORPUS_FILE, FINISHED_FILE, CHECKPOINTS = "config.yaml", "corpus.json", "finished.json", "checkpoints"
PUT_BACK = "Put the run's own file back, or train it again with overwrite=true."


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


def require_own_files(folder: Path, checkpoint: Checkpoint | None) -> None:
    """Refuse a checkpoint, best.json, finished.json or corpus.json that came from another run's folder.

    Files written before they carried an identity are held against one another as far as their contents allow.

    Raises:
        ValueError: naming the file and the run that it belongs to.
    """
    config, own = load_config(folder), folder_identity(folder)
    best_path, done_path, corpus_path = (
        folder / CHECKPOINTS / BEST_FILE, folder / FINISHED_FILE, folder / CORPUS_FILE,
    )  # fmt: skip
    best, done = read_json_if_whole(best_path) or {}, read_json_if_whole(done_path) or {}
    state = {} if checkpoint is None else checkpoint.state
    state_path = folder if checkpoint is None else checkpoint.path
    for path, content in ((state_path, state), (best_path, best), (done_path, done)):
        run = content.get("run", own)
        missing = "" if corpus_path.is_file() else f" {corpus_path.name} is missing here."
        require(
            run == own,
            f"{path} belongs to another run, {content.get('run_name')} ({run}), than the rest of {folder}: "
            f"{config.position.name}_L{config.train_length}_s{config.seed} ({own}).{missing} {PUT_BACK}",
        )
    facts = [
        ("position", config.position.name, folder / CONFIG_FILE, done, "position"),
        ("train_length", config.train_length, folder / CONFIG_FILE, done, "train_length"),
        ("best validation loss", best.get("validation_loss"), best_path, done, "best_validation_loss"),
        ("training text", _text_hash(corpus_path), corpus_path, done, "corpus"),
    ]
    if checkpoint is not None and done.get("steps") == checkpoint.step:
        for key in ("validation_loss", "best_validation_loss", "tokens_seen"):
            facts.append((key, state.get(key), state_path, done, key))
    for what, here, where, there, key in facts:
        require(
            here is None or there.get(key) is None or here == there[key],
            f"{done_path} says {what} = {there.get(key)}, {where} {here}: one is another run's. {PUT_BACK}",
        )
    if checkpoint is not None and best.get("step") == checkpoint.step == state.get("best_step"):
        noted, saved = best.get("validation_loss"), state.get("best_validation_loss")
        require(
            noted is None or saved is None or noted == saved,
            f"{best_path} says validation loss = {noted}, {state_path} {saved}: one is another run's. {PUT_BACK}",
        )


def _text_hash(path: Path) -> str | None:
    """What finished.json calls `corpus`: tokenizer and training text."""
    try:
        manifest = read_json(path)
        parts = manifest["tokenizer"]["sha256"], manifest["splits"]["train"]["text_sha256"]
    except (FileNotFoundError, KeyError, TypeError):
        return None
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def own_metrics(folder: Path, latest: Checkpoint) -> int:
    """How many rows of metrics.jsonl were there when a checkpoint was written; the others come again.

    Raises:
        ValueError: some of them are missing, or they are another run's.
    """
    path = folder / METRICS_FILE
    rows = [row for row in (read_metrics(path) if path.is_file() else []) if row["step"] <= latest.step]
    # Runs that were begun by an earlier version do not say how many, but they logged as often as they were told.
    expected = latest.state.get("metrics_rows", max(len(rows), latest.step // load_config(folder).log_every))
    require(
        len(rows) >= expected,
        f"{path} holds {len(rows)} of the {expected} rows that were written up to step {latest.step}. {PUT_BACK}",
    )
    rows = rows[:expected]
    measured = [row["validation/loss"] for row in rows if "validation/loss" in row][-1:]
    loss = latest.state.get("validation_loss")
    require(
        loss is None or measured == [loss],
        f"{path} says validation/loss = {measured}, {latest.path.name} {loss}: it is another run's. {PUT_BACK}",
    )
    return len(rows)


def require_same_settings(config: TrainConfig, folder: Path) -> None:
    """Refuse to continue a run with other settings. Where its files and its text lie is no setting of it."""
    there = load_config(folder)
    now, before = differing_settings(config, there), differing_settings(there, config)
    differences = "; ".join(f"{name}: {before[name]!r} there, {now[name]!r} now" for name in now)
    require(
        not differences,
        f"output_dir = {folder} holds a run with other settings ({differences}). "
        "Use overwrite=true to start over, or another output_dir.",
    )


def same_place(config: TrainConfig, folder: Path) -> bool:
    """Whether a run's text is asked for from where the run in a folder has it, however the path is written."""
    here, there = (
        "" if c.data.path is None else str(Path(c.data.path).resolve()) for c in (config, load_config(folder))
    )
    return here == there


def require_same_text(folder: Path, corpus: Corpus) -> None:
    """Refuse to continue a run on another text, or with another tokenizer."""
    record = folder / CORPUS_FILE
    if not record.is_file() or not any((folder / CHECKPOINTS).glob("*")):
        return
    there, here = corpus_digests(read_json(record)), corpus_digests(corpus.manifest)
    for what in there:
        require(
            there[what] == here[what],
            f"output_dir = {folder} holds a run with another {what} (sha256 {str(there[what])[:12]} there, "
            f"{str(here[what])[:12]} now). Give it the text it was begun with, or use overwrite=true to start "
            "over.",
        )
