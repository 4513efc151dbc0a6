"""Result rows: reading, checking and writing `results.jsonl` and `results.csv`.

One row is one evaluation of one run: how many nats the tokens of a split cost at one inference length.
Figures, tables, claims and reports are made from these rows alone, so they are checked when they are read
and when they are written. No model is needed for that, nor torch.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from alibi_lm.files import write_text

MODES = ("nonoverlapping", "sliding")

_INTEGERS = (
    "train_length",
    "seed",
    "inference_length",
    "stride",
    "tokens",
    "words",
    "bytes",
    "peak_memory_bytes",
)
_NUMBERS = ("nats", "perplexity", "word_perplexity", "tokens_per_second")
_STRINGS = ("run", "position", "mode", "split", "corpus", "commit", "reason")
_REQUIRED = ("position", "mode", "split", "tokens")

RowKey = tuple[str, int | None, str, int | None, str]


@dataclass(frozen=True)
class ResultRow:
    """One evaluation: (run, inference_length, mode, stride, split) and what it cost.

    Raises:
        ValueError: a field has the wrong type or range, or two fields contradict each other.
    """

    position: str
    """Position scheme, or `unigram` for the baseline."""
    mode: str
    """`nonoverlapping` or `sliding`."""
    split: str
    """`validation` or `test`."""
    tokens: int
    """Scored targets."""
    inference_length: int | None = None
    """Tokens in a window; null only where there is no run (the unigram baseline)."""
    run: str | None = None
    """Name of the run folder; null for baselines."""
    train_length: int | None = None
    seed: int | None = None
    stride: int | None = None
    """Targets scored by each window in sliding mode; null for nonoverlapping."""
    corpus: str | None = None
    """Hash of the token stream."""
    words: int | None = None
    bytes: int | None = None
    nats: float | None = None
    """Sum over the scored tokens; null where the scheme cannot run at this length."""
    perplexity: float | None = None
    """exp(nats / tokens)."""
    word_perplexity: float | None = None
    """exp(nats / words)."""
    tokens_per_second: float | None = None
    peak_memory_bytes: int | None = None
    commit: str | None = None
    reason: str | None = None
    """Why nats are null."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Fields beyond these, kept as they were."""

    def __post_init__(self) -> None:
        for name in _STRINGS:
            _check(name, getattr(self, name), str, "text")
        for name in _INTEGERS:
            _check(name, getattr(self, name), int, "a whole number")
        for name in _NUMBERS:
            _check(name, getattr(self, name), (int, float), "a number")
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} = {value}; it must be finite and not negative")
        for name in _REQUIRED:
            if getattr(self, name) in (None, ""):
                raise ValueError(f"{name} is missing; every row needs it")
        for name in ("train_length", "inference_length", "tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} = {value}; it must be at least 1")
        self._check_mode()
        self._check_run()
        self._check_nats()

    @property
    def key(self) -> RowKey:
        """What makes two rows the same evaluation; a baseline goes by its name in place of the run."""
        name = f"<{self.position}>" if self.run is None else self.run
        return (name, self.inference_length, self.mode, self.stride, self.split)

    @property
    def loss(self) -> float | None:
        """Mean nats per token, or None where the scheme could not run."""
        return None if self.nats is None else self.nats / self.tokens

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ResultRow:
        """Build a row from a JSON object; fields it does not know go to `extra`.

        Raises:
            ValueError: `values` is not an object, or is not a valid row.
        """
        if not isinstance(values, dict):
            raise ValueError(f"expected a JSON object, got {type(values).__name__}")
        missing = [name for name in _REQUIRED if name not in values]
        if missing:
            raise ValueError(f"no field {', '.join(missing)}; this is not a result row")
        known = {name: values[name] for name in FIELDS if name in values}
        return cls(**known, extra={name: value for name, value in values.items() if name not in FIELDS})

    def to_dict(self) -> dict[str, Any]:
        """All fields in the documented order, then the extra ones by name."""
        values = {name: getattr(self, name) for name in FIELDS}
        clash = set(values) & set(self.extra)
        if clash:
            raise ValueError(f"extra fields must not repeat a field of the row: {', '.join(sorted(clash))}")
        return values | {name: self.extra[name] for name in sorted(self.extra)}

    def _check_mode(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode = {self.mode!r}; allowed: {', '.join(MODES)}")
        if self.mode == "nonoverlapping" and self.stride is not None:
            raise ValueError(f"stride = {self.stride} with mode = nonoverlapping; it must be null")
        if self.mode == "sliding":
            if self.stride is None:
                raise ValueError("stride is null with mode = sliding; give the stride")
            limit = self.inference_length
            if self.stride < 1 or (limit is not None and self.stride > limit):
                raise ValueError(f"stride = {self.stride}; allowed: 1 to inference_length = {limit}")

    def _check_run(self) -> None:
        if self.run is None:
            return
        for name in ("train_length", "inference_length"):
            if getattr(self, name) is None:
                raise ValueError(f"{name} is null in a row of run {self.run!r}; only baselines may lack it")

    def _check_nats(self) -> None:
        if self.nats is None:
            if self.perplexity is not None or self.word_perplexity is not None:
                raise ValueError("nats is null but a perplexity is not; both come from the same pass")
            if not self.reason:
                raise ValueError("nats is null without a reason; say why the scheme cannot run here")
            return
        for name, count in (("perplexity", self.tokens), ("word_perplexity", self.words)):
            value = getattr(self, name)
            if name == "perplexity" and value is None:
                raise ValueError("perplexity is null but nats is not")
            if value is None or not count:
                continue
            expected = self.nats / count
            if value <= 0 or abs(math.log(value) - expected) > 1e-6 * max(1.0, expected):
                raise ValueError(f"{name} = {value}, but exp(nats / count) has logarithm {expected:.6f}")


FIELDS = (
    "run position train_length seed inference_length mode stride split corpus tokens words bytes nats "
    "perplexity word_perplexity tokens_per_second peak_memory_bytes commit reason"
).split()
assert set(FIELDS) == {item.name for item in fields(ResultRow)} - {"extra"}


def read_rows(path: str | os.PathLike[str]) -> list[ResultRow]:
    """Read and check a `results.jsonl`.

    Raises:
        ValueError: the file does not exist, or a line is no valid row or repeats an evaluation; the message
            names the file and the line.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{file} does not exist; evaluate first, or give another folder") from None
    except (IsADirectoryError, PermissionError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read as result rows: {error}") from None
    rows: list[ResultRow] = []
    seen: dict[RowKey, int] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = ResultRow.from_dict(json.loads(line, parse_constant=_refuse_constant))
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{file}, line {number}: {error}. Delete the line, or the file, and evaluate again."
            ) from None
        if row.key in seen:
            raise ValueError(
                f"{file}, line {number}: the same evaluation as line {seen[row.key]} {row.key}. "
                "Delete one of the two lines."
            )
        seen[row.key] = number
        rows.append(row)
    return rows


def write_rows(path: str | os.PathLike[str], rows: Iterable[ResultRow]) -> list[ResultRow]:
    """Replace a `results.jsonl` atomically by these rows, in a fixed order; returns them in that order."""
    ordered = sorted(rows, key=_order)
    lines = [json.dumps(row.to_dict(), allow_nan=False, ensure_ascii=False) for row in ordered]
    write_text(Path(path), "".join(line + "\n" for line in lines))
    return ordered


def upsert_rows(path: str | os.PathLike[str], rows: Iterable[ResultRow]) -> list[ResultRow]:
    """Add rows to a `results.jsonl`; a row of the same key is replaced. Safe between processes.

    Args:
        path: the file; it and its folder are made when missing.
        rows: new rows; where two have the same key, the last one counts.

    Returns:
        All rows now in the file, in its order.

    Raises:
        ValueError: the existing file is no valid result file (it is then left as it was).
    """
    from filelock import FileLock

    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_name(f".{file.name}.lock")):
        merged = {row.key: row for row in (read_rows(file) if file.exists() else [])}
        merged.update({row.key: row for row in rows})
        return write_rows(file, merged.values())


def write_csv(path: str | os.PathLike[str], rows: Sequence[ResultRow]) -> None:
    """Write the rows as CSV, atomically: the documented columns, then the extra ones; null is empty."""
    extras = sorted({name for row in rows for name in row.extra})
    out = io.StringIO()
    writer = csv.DictWriter(out, [*FIELDS, *extras], restval="", lineterminator="\n")
    writer.writeheader()
    for row in sorted(rows, key=_order):
        writer.writerow({name: _cell(value) for name, value in row.to_dict().items()})
    write_text(Path(path), out.getvalue())


def _check(name: str, value: Any, kinds: type | tuple[type, ...], words: str) -> None:
    if value is not None and (not isinstance(value, kinds) or isinstance(value, bool)):
        raise ValueError(f"{name} = {value!r}; it must be {words} or null")


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON; a value that does not exist is null, with a reason")


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    if isinstance(value, dict | list | bool):
        return json.dumps(value, sort_keys=True)
    return repr(value) if isinstance(value, float) else value


def _order(row: ResultRow) -> tuple[Any, ...]:
    """Runs by scheme, training length and seed; baselines last. The same rows always give the same file."""
    return (
        row.run is None,
        row.position,
        row.train_length or 0,
        -1 if row.seed is None else row.seed,
        row.run or "",
        row.split,
        row.mode,
        row.stride or 0,
        row.inference_length or 0,
    )
