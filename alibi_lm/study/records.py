"""The records in run folders, and which runs are seeds of one recipe. Reads files only, no models."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from alibi_lm.files import read_json
from alibi_lm.results.curves import by_name
from alibi_lm.results.rows import ResultRow
from alibi_lm.settings import COMBINED, counting

if TYPE_CHECKING:
    from alibi_lm.config import TrainConfig

TEXT = "training text"
NAMED = ("position.name", "train_length", "seed")
"""Settings that identify a curve or its seeds."""
WITHOUT = {"query_scale.name": "none", "training_positions.name": "plain", "positions_until": None}
"""What combines with every scheme, where it is not used; where it is, the label of a curve always says so."""
RUN_FILES = ("config.yaml", "environment.json", "corpus.json", "finished.json")


@dataclass(frozen=True)
class RunRecord:
    """The records of one run; an empty mapping for each missing file."""

    name: str
    folder: Path | None = None
    """The run folder; None if none was found."""
    config: dict[str, Any] = field(default_factory=dict)
    """Everything in config.yaml, flat: {'optimizer.lr': 0.002, ...}."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings that the trained model depends on."""
    rounding: dict[str, Any] = field(default_factory=dict)
    """Settings that change its last bits."""
    readable: bool = True
    """Whether config.yaml fits this version, so that it is known what depends on its settings."""
    unusual: int = 0
    """Number of settings of its scheme that are not the scheme's defaults."""
    environment: dict[str, Any] = field(default_factory=dict)
    corpus: dict[str, Any] = field(default_factory=dict)
    finished: dict[str, Any] = field(default_factory=dict)

    @property
    def training_text(self) -> str | None:
        """Hash of the token stream that it was trained on, if the folder says so."""
        return self.finished.get("corpus") or self.train_split.get("sha256")

    @property
    def parameters(self) -> int | None:
        """Trained parameters, without those of the position scheme if it is known how many these are."""
        total = self.finished.get("num_parameters")
        return total and int(total) - int(self.finished.get("position_parameters", 0))

    @property
    def task(self) -> str:
        """What it was trained on: `text`, or the name of a task."""
        return str(self.config.get("task.name", "text"))

    @property
    def train_split(self) -> dict[str, Any]:
        """The entry of the training split in corpus.json."""
        return (self.corpus.get("splits") or {}).get("train") or {}


def find_records(rows: Iterable[ResultRow], folder: str | os.PathLike[str]) -> dict[str, RunRecord]:
    """The record of every run in the rows, by the row's `run`.

    Run folders are looked for beside the results (`../runs/<run>`), below them (`runs/<run>`, as in a published
    study), and in the folder that the row names.

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
    if not all(record.readable for record in records.values()):
        # One was written by another version: it is unknown which of its settings count, so all are compared.
        records = {run: replace(record, settings=record.config, rounding={}) for run, record in records.items()}
    return records


def read_record(folder: Path, name: str) -> RunRecord:
    """Read one run folder.

    Raises:
        ValueError: an existing file cannot be read; the message names it.
    """
    values = [_read(folder / file) for file in RUN_FILES]
    config = flatten(values[0])
    settings, rounding, readable, unusual = {}, {}, not config, 0
    if config:
        from alibi_lm.config import load_config

        with contextlib.suppress(ValueError):  # written by another version
            own = load_config(folder)
            settings, rounding, readable = _counting(own), counting(own, "rounding"), True
            usual = vars(type(own.position)())
            unusual = sum(value != usual[setting] for setting, value in vars(own.position).items())
    return RunRecord(name, folder, config, settings, rounding, readable, unusual, *values[1:])


def _counting(config: TrainConfig) -> dict[str, Any]:
    """The settings that results depend on, without defaults of what combines with every scheme."""
    usual = {
        f"{group}.{name}": value
        for group in ("query_scale", "training_positions")
        for name, value in vars(type(getattr(config, group))()).items()
        if name != "name"
    }
    return {k: v for k, v in counting(config, "run").items() if k not in usual or v != usual[k]}


def recipes(rows: Sequence[ResultRow], records: Mapping[str, RunRecord]) -> dict[str, str]:
    """How each run differs from other runs of its scheme and training length, in words: run -> `lr 0.002`.

    Runs are seeds of one recipe if they agree in scheme, training length, training text and every setting that
    results depend on, except the seed. Empty words mean the experiment's own settings: those of the runs whose
    name has no suffix, else the most frequent ones; of equally many, those nearest to the scheme's defaults. A run
    without a config.yaml is left out.

    Args:
        rows: rows of one experiment.
        records: records of its runs, from `find_records`.
    """
    first: dict[str, ResultRow] = {}
    texts: dict[str, set[str | None]] = {}
    for row in rows:
        if row.run is not None and records[row.run].config:
            first.setdefault(row.run, row)
            texts.setdefault(row.run, set()).add(row.corpus)
    groups: dict[tuple[Any, ...], list[RunRecord]] = {}
    for run, row in first.items():
        key = row.position, row.train_length, records[run].task
        groups.setdefault(key, []).append(records[run])
    found: dict[str, str] = {}
    for members in groups.values():
        facts = {
            record.name: {
                k: v for k, v in record.settings.items() if k not in NAMED and (k, v) not in WITHOUT.items()
            }
            | {TEXT: record.training_text}
            for record in members
        }
        kinds: dict[str, list[str]] = {}
        for run, known in facts.items():
            kinds.setdefault(repr(sorted(known.items())), []).append(run)
        own = min(
            kinds.values(),
            key=lambda k: (not any(by_name(first[r]) == "" for r in k), -len(k), records[k[0]].unusual, k[0]),
        )
        base = {key: value for key, value in facts[own[0]].items() if not key.startswith(COMBINED)}
        keys = sorted({key for known in facts.values() for key in known})
        varying = [key for key in keys if len({repr(known.get(key)) for known in [base, *facts.values()]}) > 1]
        trained_on = list(dict.fromkeys([base[TEXT], *(facts[runs[0]][TEXT] for runs in kinds.values())]))
        for runs in kinds.values():
            known = dict(facts[runs[0]])
            if known[TEXT] != base[TEXT]:
                # A number says as much as a hash; curves of other evaluated texts are told apart by those.
                same_test = not texts[runs[0]].isdisjoint(texts[own[0]])
                known[TEXT] = trained_on.index(known[TEXT]) + 1 if same_test else base[TEXT]
            changed = [key for key in varying if known.get(key) != base.get(key)]
            words = ", ".join(_words(_short(key, varying), known.get(key)) for key in changed)
            found |= dict.fromkeys(runs, words)
    return found


def _short(key: str, others: Sequence[str]) -> str:
    """`optimizer.lr` -> `lr`, `tokenizer.name` -> `tokenizer`; the whole key if that would be ambiguous."""
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
    return f"{name}={show(value)}"


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name; lists stay whole."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def show(value: Any) -> str:
    """A setting as text."""
    return "null" if value is None else str(value)


def shortened(text: str | None) -> str:
    """The first ten characters of a hash or commit."""
    return str(text)[:10] if text else "unknown"


def _read(path: Path) -> dict[str, Any]:
    """A YAML or JSON object; empty if there is no file."""
    import yaml

    if not path.is_file():
        return {}
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8")) if path.suffix == ".yaml" else read_json(path)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    return value if isinstance(value, dict) else {}
