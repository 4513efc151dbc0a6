"""Result rows: reading, checking and writing `results.jsonl` and `results.csv`.

One row is one measurement of one run: its loss or accuracy on a task at one inference length.
Figures, tables, claims and reports are made from these rows only, so rows are checked when they are read
and when they are written. This needs neither a model nor torch.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from alibi_lm.files import write_text

MODES = ("nonoverlapping", "sliding", "items", "stream")

KINDS: dict[str, tuple[Any, str]] = {
    "str": (str, "text"),
    "int": (int, "a whole number"),
    "float": ((int, float), "a number"),
    "dict[str, Any]": (dict, "an object"),
}
"""The types that a field may have, by its annotation, and their names in messages."""


class RowKey(NamedTuple):
    """Identifies a measurement: rows with equal keys are the same one."""

    run: str
    """Name of the run folder; for a baseline its own name in angle brackets, `<unigram>`."""
    task: str
    metric: str
    inference_length: int | None
    mode: str
    stride: int | None
    split: str
    corpus: str | None
    changes: str
    """`changes` of the row as JSON with sorted keys."""


@dataclass(frozen=True, kw_only=True)
class ResultRow:
    """One measurement: the run, what was measured, and its value. Fields are in the order of the file.

    Raises:
        ValueError: a field has the wrong type or range, or two fields contradict each other.
    """

    run: str | None = None
    """Name of the run folder; null for baselines."""
    position: str
    """Position scheme, or `unigram` for the baseline."""
    train_length: int | None = None
    seed: int | None = None
    inference_length: int | None = None
    """Tokens per window; null only for the unigram baseline."""
    mode: str
    """How the task gives targets their context: `nonoverlapping` or `sliding` windows of a token stream, `stream`
    (all tokens before it), or `items`, which are separate sequences."""
    stride: int | None = None
    """Targets scored by each window in sliding mode; null otherwise."""
    split: str
    """`validation` or `test`."""
    corpus: str | None = None
    """Hash of the token stream."""
    tokens: int
    """Number of scored targets."""
    words: int | None = None
    bytes: int | None = None
    nats: float | None = None
    """Sum over the scored tokens; null if the scheme cannot run at this length."""
    perplexity: float | None = None
    """exp(nats / tokens); null if nats is null, or if it is too large for a float."""
    word_perplexity: float | None = None
    """exp(nats / words); null likewise."""
    tokens_per_second: float | None = None
    peak_memory_bytes: int | None = None
    commit: str | None = None
    reason: str | None = None
    """Why a value is null."""
    task: str = "text"
    """Name of the task, see alibi_lm/tasks."""
    metric: str = "perplexity"
    """Name of the metric that `value` is."""
    value: float | None = None
    """The result; for perplexity the same number as `perplexity`."""
    n: int | None = None
    """How many things the value is a mean over: tokens for perplexity, items for accuracy."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Settings that were changed for the test, such as {"position.scaling": "yarn"}."""
    run_id: str | None = None
    """Identity of the run; null in rows of earlier versions."""
    folder: str | None = None
    """The run folder, as it was given to the command."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Fields other than these, unchanged."""

    def __post_init__(self) -> None:
        if self.metric == "perplexity":
            # These are one number under two names; whoever makes a row gives it once.
            object.__setattr__(self, "value", self.perplexity if self.value is None else self.value)
            object.__setattr__(self, "n", self.tokens if self.n is None else self.n)
        for item in fields(self):
            kind, _, optional = str(item.type).partition(" | ")
            self._check(item.name, kind, bool(optional))
        if self.mode not in MODES:
            raise ValueError(f"mode = {self.mode!r}; allowed: {', '.join(MODES)}")
        longest = (self.inference_length or self.stride or 0) if self.mode == "sliding" else 0
        if (self.stride is None) == (self.mode == "sliding") or not (
            self.stride is None or 1 <= self.stride <= longest
        ):
            allowed = f"1 to inference_length = {self.inference_length}" if self.mode == "sliding" else "null"
            raise ValueError(f"stride = {self.stride} with mode = {self.mode}; allowed: {allowed}")
        for name in ("train_length", "inference_length"):
            if self.run is not None and getattr(self, name) is None:
                raise ValueError(f"{name} is null in a row of run {self.run!r}; only baselines may lack it")
        self._check_value()

    def _check(self, name: str, kind: str, optional: bool) -> None:
        """Check a field's type, given as a key of KINDS, and its range."""
        value, (kinds, words) = getattr(self, name), KINDS[kind]
        if value is None and optional:
            return
        if value is None or (value == "" and not optional):
            raise ValueError(f"{name} is missing; every row needs it")
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise ValueError(f"{name} = {value!r}; it must be {words}{' or null' if optional else ''}")
        if kind == "float" and not (math.isfinite(value) and (value >= 0 or name == "value")):
            raise ValueError(f"{name} = {value}; it must be finite and not negative")
        if name in ("train_length", "inference_length", "tokens", "n") and value < 1:
            raise ValueError(f"{name} = {value}; it must be at least 1")

    @property
    def bits_per_byte(self) -> float | None:
        """Bits per byte of the text, a measure independent of the tokenizer; None if it is not known."""
        return None if self.nats is None or not self.bytes else self.nats / math.log(2) / self.bytes

    @property
    def key(self) -> RowKey:
        """Identifies the measurement: a later row with the same key replaces an earlier one."""
        run = f"<{self.position}>" if self.run is None else self.run
        plain = (getattr(self, name) for name in RowKey._fields[1:-1])
        return RowKey._make([run, *plain, json.dumps(self.changes, sort_keys=True)])

    @property
    def loss(self) -> float | None:
        """Mean nats per token, or None if the scheme could not run."""
        return None if self.nats is None else self.nats / self.tokens

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ResultRow:
        """Build a row from a JSON object; unknown fields go to `extra`.

        Raises:
            ValueError: `values` is not an object, or is not a valid row.
        """
        if not isinstance(values, dict):
            raise ValueError(f"expected a JSON object, got {type(values).__name__}")
        missing = [name for name in REQUIRED if name not in values]
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

    def _check_value(self) -> None:
        if self.value is None and not self.reason:
            raise ValueError(f"{self.metric} is null without a reason; say why it does not exist")
        if self.nats is None and (self.perplexity is not None or self.word_perplexity is not None):
            raise ValueError("nats is null but a perplexity is not; both come from the same pass")
        if self.metric == "perplexity" and (self.value != self.perplexity or self.n != self.tokens):
            raise ValueError(
                f"value = {self.value} of n = {self.n}, but perplexity = {self.perplexity} of "
                f"tokens = {self.tokens}; they are the same two numbers"
            )
        if self.metric == "accuracy" and self.value is not None and not (0 <= self.value <= 1 and self.n):
            raise ValueError(f"value = {self.value} of n = {self.n}; an accuracy is 0 to 1, a share of n items")
        for name, count in (("perplexity", self.tokens), ("word_perplexity", self.words)):
            value = getattr(self, name)
            if value is None or not count:
                continue
            assert self.nats is not None
            expected = self.nats / count
            if value <= 0 or abs(math.log(value) - expected) > 1e-6 * max(1.0, expected):
                raise ValueError(f"{name} = {value}, but exp(nats / count) has logarithm {expected:.6f}")


FIELDS = [item.name for item in fields(ResultRow) if item.name != "extra"]
REQUIRED = [item.name for item in fields(ResultRow) if item.default is item.default_factory is MISSING]


def perplexity_of(nats: float, n: int) -> tuple[float | None, str | None]:
    """The perplexity exp(nats / n) and None, or None and the reason why there is none.

    There is none if the sum is not finite, or the perplexity is too large for a float (more than about 709 nats
    per target).
    """
    if not math.isfinite(nats):
        return None, f"the sum of nats is {nats}"
    try:
        return math.exp(nats / n), None
    except OverflowError:
        return None, f"exp({nats / n:.6g}) is too large for a number"


def read_rows(path: str | os.PathLike[str]) -> list[ResultRow]:
    """Read and check a `results.jsonl`.

    Raises:
        ValueError: the file does not exist, or a line is not a valid row or repeats an evaluation; the message
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
    """Add rows to a `results.jsonl`, created if missing; replaces rows of the same key. Safe between processes.

    All rows of an earlier run in the same folder are removed too: that run no longer exists.

    Returns:
        All rows now in the file, in its order.

    Raises:
        ValueError: the existing file is not a valid result file (it is then left unchanged).
    """
    file = Path(path)
    with locked(file):
        old, new = read_rows(file) if file.exists() else [], list(rows)
        ids = {str(row.run): (row.run_id, row.folder) for row in new if row.run_id is not None}
        refuse_another_run(old, ids)
        kept = [row for row in old if row.run_id is None or row.run_id == ids.get(str(row.run), (row.run_id,))[0]]
        return write_rows(file, {row.key: row for row in (*kept, *new)}.values())


def refuse_another_run(rows: Iterable[ResultRow], runs: Mapping[str, tuple[str | None, str | None]]) -> None:
    """Refuse to add rows of a run to those of another run with the same name in another folder.

    Args:
        rows: the existing rows.
        runs: identity and folder of the runs to be added, by name.

    Raises:
        ValueError: there are such rows; the message names both folders.
    """
    for row in rows:
        run_id, folder = runs.get(str(row.run), (row.run_id, row.folder))
        if row.run_id in (None, run_id) or row.folder is None or folder is None:
            continue
        if Path(row.folder).resolve() != Path(folder).resolve():
            raise ValueError(
                f"the results have rows of {row.folder} ({row.run_id}), and {folder} ({run_id}) is another run of "
                f"the same name, {row.run}. Evaluate it with another output_dir, or rename its folder."
            )


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lock a file that several processes read, change and replace; its folder is created if missing."""
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        yield


def write_csv(path: str | os.PathLike[str], rows: Sequence[ResultRow]) -> None:
    """Write the rows as CSV, atomically: the documented columns, then the extra ones; null is empty."""
    extras = sorted({name for row in rows for name in row.extra})
    out = io.StringIO()
    writer = csv.DictWriter(out, [*FIELDS, *extras], restval="", lineterminator="\n")
    writer.writeheader()
    for row in sorted(rows, key=_order):
        cells = row.to_dict().items()
        # None is written as an empty cell, and floats by repr, with every digit.
        plain = {k: json.dumps(v, sort_keys=True) if isinstance(v, dict | list | bool) else v for k, v in cells}
        writer.writerow(plain)
    write_text(Path(path), out.getvalue())


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON; a value that does not exist is null, with a reason")


def _order(row: ResultRow) -> tuple[Any, ...]:
    """Runs by scheme, training length and seed; baselines last. The same rows always give the same file."""
    seed = -1 if row.seed is None else row.seed
    run = (row.run is None, row.position, row.train_length or 0, seed, row.run or "", row.key.changes)
    stream = (row.task, row.metric, row.corpus or "", row.split, row.mode, row.stride or 0)
    return (*run, *stream, row.inference_length or 0)
