"""What differs between compared runs other than the scheme.

A curve of one scheme above another's says something about the schemes only if the runs had the same model,
text, budget and code. Every other difference is listed; those that can move a result are marked on figures.
Which settings can, each config field says itself (`alibi_lm.settings`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from alibi_lm.results.curves import step_of
from alibi_lm.results.rows import ResultRow
from alibi_lm.study.records import RunRecord, shortened, show

SMALL_PARAMETERS = 0.05
"""A scheme's own parameters (a table of positions, a bias per head) are part of it; more is a difference."""
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
    """Whether it can move a perplexity beyond rounding: figures are marked."""

    @property
    def sentence(self) -> str:
        """For people: `optimizer.lr: 0.002 in 5 runs, 0.001 in rotary_L64_s1`."""
        named = {v: ", ".join(runs) if len(runs) <= 2 else f"{len(runs)} runs" for v, runs in self.values.items()}
        return f"{self.what}: " + "; ".join(f"{value} in {runs}" for value, runs in named.items())


def differences(rows: Sequence[ResultRow], records: Mapping[str, RunRecord]) -> list[Difference]:
    """All differences between the runs of these rows, those that matter first.

    Args:
        rows: of one study.
        records: of its runs, from `alibi_lm.study.records.find_records`.
    """
    # An earlier checkpoint is no difference: such rows are never beside others on a curve.
    own = [row for row in rows if row.run is not None and step_of(row) is None]
    members: dict[str, set[str]] = {}
    for row in own:
        run = str(row.run)
        members.setdefault(records[run].task if run in records else "text", set()).add(run)
    found = []
    for task, runs in sorted(members.items()):  # runs of different tasks are never compared
        part = [*_of_rows([row for row in own if row.run in runs])]
        part += _of_records({run: records[run] for run in records if run in runs})
        several = len(members) > 1
        found += [replace(item, what=f"task {task}, {item.what}") if several else item for item in part]
    return sorted(found, key=lambda item: (not item.matters, item.what))


def _of_rows(rows: Sequence[ResultRow]) -> list[Difference]:
    found = []
    for split in sorted({row.split for row in rows if row.task == "text"}):
        part = [row for row in rows if row.split == split and row.task == "text"]
        found += _compare(f"{split} text (hash)", {(r.run or "", r.key): shortened(r.corpus) for r in part}, True)
        found += _compare(f"{split} tokens scored", {(r.run or "", r.key): f"{r.tokens:,}" for r in part}, True)
    # Points are compared at one length in one view, and each of these may have been measured at another time.
    points: dict[tuple[Any, ...], list[ResultRow]] = {}
    for row in rows:
        if row.nats is not None:
            points.setdefault(row.key[1:7], []).append(row)
    mixed = [row for point in points.values() if len({row.commit for row in point}) > 1 for row in point]
    found += _compare("commit of the evaluation", {(r.run or "", r.key): shortened(r.commit) for r in mixed}, True)
    for name in ("checkpoint", "precision", "attention"):
        ways = {(r.run or "", r.key): str(r.extra[name]) for r in rows if name in r.extra}
        found += _compare(f"{name} of the evaluation", ways, name != "attention")
    return found


def _of_records(records: Mapping[str, RunRecord]) -> list[Difference]:
    known = {name: record for name, record in records.items() if record.config}
    readable = all(record.readable for record in known.values())
    found = []
    for attribute, matters in (("settings", True), ("rounding", False)) if readable else (("config", True),):
        settings = {name: getattr(record, attribute) for name, record in known.items()}
        for key in sorted({key for values in settings.values() for key in values}):
            if key.partition(".")[0] not in ("position", "train_length", "seed"):  # what is compared
                values = {name: show(own.get(key, "unset")) for name, own in settings.items()}
                found += _compare(key, values, matters)
    if not readable:
        old = sorted(name for name, record in known.items() if not record.readable)
        what = "all settings compared, also those without effect"
        found.append(Difference(what, {"config.yaml of another version": old}, False))
    found += _compare_counts(records, "num_parameters", "parameters", SMALL_PARAMETERS)
    found += _compare_counts(records, "tokens_seen", "tokens seen in training", SMALL_TOKENS)
    trained_on = {name: record.training_text for name, record in records.items() if record.finished}
    hashes = {name: shortened(text) for name, text in trained_on.items() if text}
    found += _compare("training text (hash)", hashes, True)
    env = {name: record.environment for name, record in records.items() if record.environment}
    found += _compare("commit of the training", {n: _commit(e) for n, e in env.items()}, True)
    for key in ("torch", "python", "device"):
        found += _compare(f"environment: {key}", {n: show(e.get(key)) for n, e in env.items()}, False)
    unknown = sorted(set(records) - set(known))
    if unknown and len(records) > 1:
        found.append(Difference("settings not compared", {"no config.yaml at hand": unknown}, False))
    return found


def _compare_counts(records: Mapping[str, RunRecord], key: str, what: str, small: float) -> list[Difference]:
    numbers = {name: record.finished.get(key) for name, record in records.items()}
    counts = {name: int(number) for name, number in numbers.items() if isinstance(number, int | float)}
    matters = max(counts.values(), default=0) > min(counts.values(), default=0) * (1 + small)
    return _compare(what, {name: f"{count:,}" for name, count in counts.items()}, matters)


def _compare(what: str, values: Mapping[Any, str], matters: bool) -> list[Difference]:
    """One difference, or none; keys are runs, or pairs that begin with a run."""
    by_value: dict[str, set[str]] = {}
    for key, value in values.items():
        by_value.setdefault(value, set()).add(key[0] if isinstance(key, tuple) else key)
    if len(by_value) < 2:
        return []
    ordered = sorted(by_value.items(), key=lambda item: (-len(item[1]), item[0]))
    return [Difference(what, {value: sorted(runs) for value, runs in ordered}, matters)]


def _commit(environment: Mapping[str, Any]) -> str:
    return shortened(environment.get("commit")) + (" with changes" if environment.get("dirty") else "")
