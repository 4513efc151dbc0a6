"""What run folders say about themselves, and which runs are seeds of one recipe. Files only, no models."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from alibi_lm.files import read_json
from alibi_lm.results.curves import by_name
from alibi_lm.results.rows import ResultRow

RUN_FILES = ("config.yaml", "environment.json", "corpus.json", "finished.json")
NAMED = ("position", "train_length", "seed")
"""Settings that every figure, table and claim names: they are what is compared."""


@dataclass(frozen=True)
class RunRecord:
    """One run's own account; an empty mapping where a file is missing."""

    name: str
    folder: Path | None = None
    """None where no run folder was found."""
    config: dict[str, Any] = field(default_factory=dict)
    """Everything in config.yaml, flat: {'optimizer.lr': 0.002, ...}."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Those that the trained model depends on; of a config that this version cannot read, all of them."""
    rounding: dict[str, Any] = field(default_factory=dict)
    """Those that change its last bits."""
    readable: bool = True
    """Whether config.yaml is one of this version, so that its settings say what depends on them."""
    environment: dict[str, Any] = field(default_factory=dict)
    corpus: dict[str, Any] = field(default_factory=dict)
    finished: dict[str, Any] = field(default_factory=dict)

    @property
    def training_text(self) -> str | None:
        """Hash of the token stream that it was trained on, where the folder tells."""
        train = (self.corpus.get("splits") or {}).get("train") or {}
        return self.finished.get("corpus") or train.get("sha256")


def find_records(rows: Iterable[ResultRow], folder: str | os.PathLike[str]) -> dict[str, RunRecord]:
    """The record of every run in the rows, by the row's `run`.

    Run folders are looked for beside the results (`../runs/<run>`), below them (`runs/<run>`, as in a published
    study), and where the row says that its run lies.

    Raises:
        ValueError: a file of a run folder is damaged.
    """
    base = Path(folder)
    places: dict[str, list[Path]] = {}
    for row in rows:
        if row.run is not None:
            name = PurePath(row.run).name
            found = places.setdefault(row.run, [base / "runs" / name, base.parent / "runs" / name])
            found += [Path(row.folder)] if row.folder else []
    records = {}
    for run, folders in sorted(places.items()):
        place = next((p for p in folders if any((p / file).is_file() for file in RUN_FILES)), None)
        records[run] = RunRecord(run) if place is None else read_record(place, run)
    return records


def read_record(folder: Path, name: str) -> RunRecord:
    """Read one run folder.

    Raises:
        ValueError: a file that is there cannot be read, naming it.
    """
    config = flatten(_read_yaml(folder / "config.yaml"))
    settings, readable = config, not config
    rounding: dict[str, Any] = {}
    try:
        if config:
            settings, rounding = _counting(folder)
            readable = True
    except ValueError:
        pass  # written by another version: all its settings are compared, and fairness says so
    account = (_read_json(folder / file) for file in RUN_FILES[1:])
    return RunRecord(name, folder, config, settings, rounding, readable, *account)


def recipes(rows: Sequence[ResultRow], records: Mapping[str, RunRecord]) -> dict[str, str]:
    """What tells each run from other runs of its scheme and training length, in words: run -> `lr 0.002`.

    Runs are seeds of one recipe where they agree in scheme, training length, training text and every setting that
    results depend on, but for the seed. Empty words are the experiment's own settings: those of the runs whose
    name has no suffix, else the most frequent ones. A run without a config.yaml is left out.

    Args:
        rows: of one experiment.
        records: of its runs, from `find_records`.
    """
    first: dict[str, ResultRow] = {}
    for row in rows:
        if row.run is not None:
            first.setdefault(row.run, row)
    groups: dict[tuple[str, int | None], list[str]] = {}
    for run, row in first.items():
        groups.setdefault((row.position, row.train_length), []).append(run)
    texts: dict[str, set[str | None]] = {run: set() for run in first}
    for row in rows:
        if row.run is not None:
            texts[row.run].add(row.corpus)
    found: dict[str, str] = {}
    for runs in groups.values():
        known_runs = [records[run] for run in runs if records[run].config]
        readable = all(record.readable for record in known_runs)
        facts = {record.name: _facts(record, readable) for record in known_runs}
        kinds: dict[str, list[str]] = {}
        for run, known in facts.items():
            kinds.setdefault(repr(sorted(known.items())), []).append(run)
        if not kinds:
            continue
        own = min(kinds.values(), key=lambda k: (not any(by_name(first[r]) == "" for r in k), -len(k), k[0]))
        keys = sorted({key for known in facts.values() for key in known})
        varying = [key for key in keys if len({repr(known.get(key)) for known in facts.values()}) > 1]
        hashes = [own_text := facts[own[0]][TEXT]]
        for members in kinds.values():
            base, known = facts[own[0]], dict(facts[members[0]])
            if known[TEXT] not in hashes:
                hashes.append(known[TEXT])
            if known[TEXT] != own_text and texts[members[0]].isdisjoint(texts[own[0]]):
                known[TEXT] = own_text  # curves tell evaluated texts apart themselves
            elif known[TEXT] != own_text:
                known[TEXT] = hashes.index(known[TEXT]) + 1
            changed = [key for key in varying if known.get(key) != base.get(key)]
            found |= dict.fromkeys(
                members, ", ".join(_words(_short(key, varying), known.get(key)) for key in changed)
            )
    return found


TEXT = "training text"


def _facts(record: RunRecord, readable: bool) -> dict[str, Any]:
    """What makes a recipe: everything that results depend on but the seed, scheme and training length."""
    left_out = ("position.name", "train_length", "seed")
    settings = record.settings if readable else record.config
    facts = {key: value for key, value in settings.items() if key not in left_out}
    return facts | {TEXT: record.training_text}


def _short(key: str, others: Sequence[str]) -> str:
    """`optimizer.lr` -> `lr`, `tokenizer.name` -> `tokenizer`; the whole key where that is not clear."""
    parts = [part for part in key.split(".") if part != "name"] or [key]
    same = [other for other in others if [p for p in other.split(".") if p != "name"][-1:] == parts[-1:]]
    return parts[-1] if len(same) < 2 else ".".join(parts)


def _words(name: str, value: Any) -> str:
    if value is True:
        return name
    if value is False:
        return f"no {name}"
    if isinstance(value, int | float):
        return f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
    return f"{name}={'null' if value is None else value}"


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name; lists stay whole."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _counting(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    from alibi_lm.config import load_config
    from alibi_lm.settings import counting

    config = load_config(folder)
    return counting(config, "run"), counting(config, "rounding")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return read_json(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    import yaml

    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    return value if isinstance(value, dict) else {}
