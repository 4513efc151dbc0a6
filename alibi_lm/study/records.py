"""What run folders say about themselves: config, environment, corpus, tokens seen. Files only, no models."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alibi_lm.results.rows import ResultRow

RUN_FILES = ("config.yaml", "environment.json", "corpus.json", "finished.json")


@dataclass(frozen=True)
class RunRecord:
    """One run's own account; an empty mapping where a file is missing."""

    name: str
    folder: Path | None = None
    """None where no run folder was found."""
    config: dict[str, Any] = field(default_factory=dict)
    """Flat: {'optimizer.lr': 0.002, ...}."""
    environment: dict[str, Any] = field(default_factory=dict)
    corpus: dict[str, Any] = field(default_factory=dict)
    finished: dict[str, Any] = field(default_factory=dict)


def run_of(label: str) -> str:
    """Name of the run folder behind a row's `run` (`alibi_L64_s1+scaling=yarn` was changed for a test)."""
    return label.split("+", 1)[0]


def find_records(rows: Iterable[ResultRow], folder: str | os.PathLike[str]) -> dict[str, RunRecord]:
    """The record of every run in the rows, by the row's `run`.

    Run folders are looked for beside the results (`../runs/<run>`) and below them (`runs/<run>`, as in a
    published study).

    Raises:
        ValueError: a file of a run folder is damaged.
    """
    base = Path(folder)
    found: dict[str, RunRecord] = {}
    for label in sorted({row.run for row in rows if row.run is not None}):
        name = run_of(label)
        places = [base / "runs" / name, base.parent / "runs" / name]
        place = next((p for p in places if any((p / file).is_file() for file in RUN_FILES)), None)
        found[label] = RunRecord(label) if place is None else read_record(place, label)
    return found


def read_record(folder: Path, name: str) -> RunRecord:
    """Read one run folder.

    Raises:
        ValueError: a file that is there cannot be read, naming it.
    """
    return RunRecord(
        name,
        folder,
        flatten(_read_yaml(folder / "config.yaml")),
        _read_json(folder / "environment.json"),
        _read_json(folder / "corpus.json"),
        _read_json(folder / "finished.json"),
    )


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name; lists stay whole."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    return value if isinstance(value, dict) else {}


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    import yaml

    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    return value if isinstance(value, dict) else {}
