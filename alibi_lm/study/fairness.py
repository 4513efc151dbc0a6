"""What differs between compared runs other than the scheme.

Curves of two schemes can be compared only if the runs had the same model, text, budget and code. Every other
difference is listed; those that can change a result are marked on figures. Each config field says whether it can
(`alibi_lm.settings`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alibi_lm.results.curves import step_of
from alibi_lm.results.rows import ResultRow
from alibi_lm.study.records import RunRecord, shortened, show

SMALL_PARAMETERS = 0.05
"""More is a difference. Those of the scheme itself do not count where the run says how many they are; older runs
may have this share of them (a table of positions, a bias per head)."""
SMALL_TOKENS = 0.005
"""Steps are cut to whole sequences, so tokens seen may differ a little between training lengths."""


@dataclass(frozen=True)
class Difference:
    """One thing in which runs differ."""

    what: str
    """Setting or fact, for example `optimizer.lr`."""
    values: dict[str, list[str]]
    """Value -> runs, the most frequent first."""
    matters: bool
    """Whether it can change a perplexity beyond rounding; figures are then marked."""

    @property
    def sentence(self) -> str:
        """As a sentence: `optimizer.lr: 0.002 in 5 runs, 0.001 in rotary_L64_s1`."""
        named = {v: ", ".join(runs) if len(runs) <= 2 else f"{len(runs)} runs" for v, runs in self.values.items()}
        return f"{self.what}: " + "; ".join(f"{value} in {runs}" for value, runs in named.items())


def refuse(found: Iterable[Difference]) -> None:
    """Raise ValueError, with the reasons, if one of these differences matters."""
    if lines := [f"\n  {item.sentence}" for item in found if item.matters]:
        raise ValueError(f"strict = true, and the runs differ in more than the scheme:{''.join(lines)}")


def differences(rows: Sequence[ResultRow], records: Mapping[str, RunRecord]) -> list[Difference]:
    """All differences between the runs of these rows, those that matter first.

    Args:
        rows: rows of one study.
        records: records of its runs, from `alibi_lm.study.records.find_records`.
    """
    # An earlier checkpoint is not a difference: such rows are never on a curve with others.
    own = [row for row in rows if row.run is not None and step_of(row) is None]
    runs = {str(row.run) for row in own}
    tasks = {run: records[run].task if run in records else "text" for run in runs}
    found = []
    for task in sorted(set(tasks.values())):  # runs of different tasks are never compared
        part = [row for row in own if tasks[str(row.run)] == task]
        known = {run: records[run] for run in records if tasks.get(run) == task}
        prefix = f"task {task}, " if len(set(tasks.values())) > 1 else ""
        for what, facts, matters in (*_of_rows(part), *_of_records(list(known.values()))):
            by_value: dict[str, set[str]] = {}
            for run, value in facts:
                by_value.setdefault(value, set()).add(run)
            if len(by_value) > 1:
                ordered = sorted(by_value.items(), key=lambda item: (-len(item[1]), item[0]))
                values = {value: sorted(runs) for value, runs in ordered}
                found.append(Difference(prefix + what, values, matters))
        unknown = sorted(run for run, record in known.items() if not record.config)
        if unknown and len(known) > 1:
            found.append(Difference(f"{prefix}settings not compared", {"no config.yaml at hand": unknown}, False))
    if old := sorted(run for run, record in records.items() if not record.readable):
        what = "all settings compared, also those without effect"
        found.append(Difference(what, {"config.yaml of another version": old}, False))
    return sorted(found, key=lambda item: (not item.matters, item.what))


Facts = tuple[str, list[tuple[str, str]], bool]
"""Setting or fact, (run, its value) for each run or row, and whether it matters."""


def _of_rows(rows: Sequence[ResultRow]) -> Iterator[Facts]:
    for split in sorted({row.split for row in rows if row.task == "text"}):
        part = [row for row in rows if row.split == split and row.task == "text"]
        yield f"{split} text (hash)", [(str(r.run), shortened(r.corpus)) for r in part], True
        yield f"{split} tokens scored", [(str(r.run), f"{r.tokens:,}") for r in part], True
    # Points are compared at one length in one view; each length and view may have been measured at another time.
    points: dict[tuple[Any, ...], list[ResultRow]] = {}
    for row in rows:
        if row.value is not None:
            points.setdefault(row.key[1:7], []).append(row)
    mixed = [row for point in points.values() if len({row.commit for row in point}) > 1 for row in point]
    yield "commit of the evaluation", [(str(r.run), shortened(r.commit)) for r in mixed], True
    for name in ("checkpoint", "precision", "attention"):
        ways = [(str(r.run), str(r.extra[name])) for r in rows if name in r.extra]
        yield f"{name} of the evaluation", ways, name != "attention"


def _of_records(records: Sequence[RunRecord]) -> Iterator[Facts]:
    known = [record for record in records if record.config]
    for kind, matters in (("settings", True), ("rounding", False)):
        settings = {record.name: getattr(record, kind) for record in known}
        for key in sorted({key for values in settings.values() for key in values}):
            if key.partition(".")[0] not in ("position", "train_length", "seed"):  # what is compared
                yield key, [(name, show(own.get(key, "unset"))) for name, own in settings.items()], matters
    # A run that ends when its task is solved sees as many tokens as it needs: a result, no difference.
    most = math.inf if any(r.config.get("task.stop_when_solved") for r in known) else SMALL_TOKENS
    for what, small, counted in (
        ("parameters", SMALL_PARAMETERS, {r.name: r.parameters for r in records}),
        ("tokens seen in training", most, {r.name: r.finished.get("tokens_seen") for r in records}),
    ):
        counts = {name: int(count) for name, count in counted.items() if count}
        matters = max(counts.values(), default=0) > min(counts.values(), default=0) * (1 + small)
        yield what, [(name, f"{count:,}") for name, count in counts.items()], matters
    texts = [(r.name, shortened(r.training_text)) for r in records if r.finished and r.training_text]
    yield "training text (hash)", texts, True
    env = {record.name: record.environment for record in records if record.environment}
    changed = {name: " with changes" if e.get("dirty") else "" for name, e in env.items()}
    commits = [(name, shortened(e.get("commit")) + changed[name]) for name, e in env.items()]
    yield "commit of the training", commits, True
    for key in ("torch", "python", "device"):
        yield f"environment: {key}", [(name, show(e.get(key))) for name, e in env.items()], False
