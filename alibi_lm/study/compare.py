"""Is A better than B? Two sets of runs, paired by document and by seed, at several inference lengths."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np

from alibi_lm.results.curves import View, curves, views
from alibi_lm.results.rows import ResultRow, RowKey
from alibi_lm.results.statistics import Interval, as_perplexity, paired_difference, verdict
from alibi_lm.study.style import look

ANSWERS = {"yes": "YES", "no": "NO", "not settled": "NOT SETTLED"}


@dataclass(frozen=True)
class Answer:
    """What is known of A against B at one inference length."""

    inference_length: int
    answer: str
    """YES (A is better), NO (B is), NOT SETTLED, or NOT RUN."""
    difference: Interval | None
    """A minus B in nats per token."""
    note: str

    @property
    def line(self) -> str:
        """For a terminal."""
        head = f"{self.inference_length:>8}  {self.answer:<11}"
        if self.difference is None:
            return f"{head}  {self.note}"
        ratio = as_perplexity(self.difference)
        text = (
            f"{head}  {self.difference.estimate:+.4f} [{self.difference.low:+.4f}, {self.difference.high:+.4f}] "
            f"nats, perplexity x {ratio.estimate:.4f} [{ratio.low:.4f}, {ratio.high:.4f}]"
        )
        return f"{text}  ({self.note})" if self.note else text


def select(rows: Sequence[ResultRow], pattern: str, view: View, name: str) -> list[ResultRow]:
    """Rows of the runs that a pattern means, which must be seeds of each other.

    Args:
        rows: of one study.
        pattern: a run's name or a glob of names (`alibi_L64_s*`); of a path only the last part counts.
        view: split, mode and stride.
        name: of the setting, for messages.

    Raises:
        ValueError: no such run, or runs that differ in more than their seed.
    """
    glob = PurePath(pattern).name
    named = {row.run for row in rows if row.run is not None}
    wanted = {run for run in named if run == glob or fnmatch.fnmatchcase(PurePath(run).name, glob)}
    found = [row for row in rows if row.run in wanted and View(row.split, row.mode, row.stride) == view]
    if not found:
        known = "; ".join(known_view.title for known_view in views([r for r in rows if r.run in wanted]))
        reason = f"its runs have {known} only" if known else f"runs here: {', '.join(sorted(named)) or 'none'}"
        raise ValueError(f"{name} = {pattern} has no results for {view.title}; {reason}")
    groups = curves(found, view)
    if len(groups) > 1:
        kinds = ", ".join(f"{c.position} L={c.train_length} {c.variant}".strip() for c in groups)
        raise ValueError(
            f"{name} = {pattern} means runs that are not seeds of each other ({kinds}); name one kind"
        )
    return found


def compare_runs(
    a: Sequence[ResultRow],
    b: Sequence[ResultRow],
    summaries: Mapping[RowKey, Any],
    lengths: Sequence[int],
) -> list[Answer]:
    """Whether A is better than B at each length, all lengths judged together.

    Args:
        a: rows of A's runs, from `select`.
        b: rows of B's.
        summaries: document sums by row key.
        lengths: inference lengths; intervals are widened for their number.

    Returns:
        An answer a length. One seed settles nothing about schemes.

    Raises:
        ValueError: A and B were scored on different texts.
    """
    return [_answer(a, b, summaries, length, len(lengths)) for length in lengths]


def common_lengths(a: Sequence[ResultRow], b: Sequence[ResultRow]) -> list[int]:
    """Inference lengths at which both have rows, rising."""
    sides = [{row.inference_length for row in side if row.inference_length is not None} for side in (a, b)]
    return sorted(sides[0] & sides[1])


def title(rows: Sequence[ResultRow]) -> str:
    """Name of one side: scheme, training length, seeds."""
    seeds = ", ".join(sorted({"?" if row.seed is None else str(row.seed) for row in rows}))
    return f"{look(rows[0].position).name} trained at {rows[0].train_length} (seeds {seeds})"


def _answer(
    a: Sequence[ResultRow],
    b: Sequence[ResultRow],
    summaries: Mapping[RowKey, Any],
    length: int,
    comparisons: int,
) -> Answer:
    sides = [[row for row in side if row.inference_length == length] for side in (a, b)]
    for side, name in zip(sides, "AB", strict=True):
        refused = [row.reason for row in side if row.loss is None]
        if refused or not side:
            note = f"{name} has no value: {refused[0] if refused else 'not evaluated there'}"
            return Answer(length, "NOT RUN", None, note)
    missing = sorted({str(row.run) for side in sides for row in side if row.key not in summaries})
    if missing:
        note = f"no document sums of {', '.join(missing)} in summary.npz; evaluate again"
        return Answer(length, "NOT RUN", None, note)
    texts = {row.corpus for side in sides for row in side}
    sums = [[summaries[row.key] for row in side] for side in sides]
    tokens = sums[0][0].document_tokens
    if len(texts) > 1 or any(not np.array_equal(tokens, s.document_tokens) for side in sums for s in side):
        hashes = ", ".join(sorted(text or "unknown" for text in texts))
        raise ValueError(
            f"A and B were scored on different texts at length {length} ({hashes}); evaluate both on the same one"
        )
    seeds = [[row.seed for row in side] for side in sides]
    known = all(seed is not None for side in seeds for seed in side)
    nats_a, nats_b = (np.stack([s.document_nats for s in side]) for side in sums)
    found = paired_difference(
        nats_a,
        nats_b,
        tokens,
        comparisons=comparisons,
        seeds_a=[s for s in seeds[0] if s is not None] if known else None,
        seeds_b=[s for s in seeds[1] if s is not None] if known else None,
    )
    notes = [found.kind, found.note.strip("; ")]
    return Answer(length, ANSWERS[verdict(found)], found, "; ".join(note for note in notes if note))
