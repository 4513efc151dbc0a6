"""The table of changes for a test: changes down, inference lengths across, from rows alone."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from alibi_lm.results.documents import DocumentSums
from alibi_lm.results.rows import ResultRow, RowKey
from alibi_lm.results.statistics import paired_difference
from alibi_lm.study.style import label
from alibi_lm.study.tables import Table, numbered, refer

Cell = list[ResultRow]
"""Rows of one change at one length: one for each seed."""


def change_tables(rows: Sequence[ResultRow], documents: Mapping[RowKey, DocumentSums]) -> str:
    """Markdown with one table for each trained model, its seeds together.

    Args:
        rows: those of scripts/test_time.py; others are left out.
        documents: sums per document of these rows.
    """
    models: dict[str, dict[str, dict[int, Cell]]] = {}
    for row in rows:
        if row.run is not None and row.inference_length is not None and "change" in row.extra:
            of_model = models.setdefault(re.sub(r"_s\d+(?=_|$)", "", row.run), {})
            of_model.setdefault(str(row.extra["change"]), {}).setdefault(row.inference_length, []).append(row)
    parts = ["# Changes of trained models for the test\n"]
    for name, changes in models.items():
        first = next(iter(next(iter(changes.values())).values()))[0]
        seeds = sorted({str(row.seed) for cells in changes.values() for cell in cells.values() for row in cell})
        parts.append(
            f"## {label(first.position)}, trained at {first.train_length} ({name}, seed {', '.join(seeds)})\n"
        )
        parts.append(_table(changes, documents).markdown())
    return "\n".join(parts)


def _table(changes: Mapping[str, Mapping[int, Cell]], documents: Mapping[RowKey, DocumentSums]) -> Table:
    lengths = sorted({length for cells in changes.values() for length in cells})
    order = sorted(changes, key=lambda name: (name != "crop to L", name != "unchanged"))
    best = {
        n: min((_loss(cells[n]) for cells in changes.values() if n in cells), default=math.inf) for n in lengths
    }
    reasons: list[str] = []
    body = []
    for name in order:
        line = [name]
        for length in lengths:
            cell, crop = changes[name].get(length, []), changes.get("crop to L", {}).get(length, [])
            line.append(_cell(cell, crop, documents, best[length], reasons))
        body.append(line)
    first = next(iter(changes[order[0]].values()))[0]
    notes = numbered(reasons)
    notes.append(
        f"Perplexity of the test split ({first.tokens:,} tokens), the lowest at each length in bold. In brackets: "
        "the value with the lowest loss on the validation split. < better and > worse than the crop, by the 95% "
        "interval of their difference over documents (and seeds, where there are several); no sign: not settled."
    )
    if untried := first.extra.get("untried"):
        notes.append(f"Not tried, because it would mean nothing: {untried}.")
    return Table(["change", *map(str, lengths)], body, 1, notes)


def _loss(cell: Cell) -> float:
    losses = [row.loss for row in cell]
    return math.inf if not cell or None in losses else math.fsum(losses) / len(losses)  # type: ignore[arg-type]


def _cell(
    cell: Cell, crop: Cell, documents: Mapping[RowKey, DocumentSums], best: float, reasons: list[str]
) -> str:
    loss = _loss(cell)
    if not math.isfinite(loss):
        why = next((row.reason for row in cell if row.reason), "not evaluated")
        return f"- {refer(why, reasons)}"
    value = f"{math.exp(loss):.2f}"
    chosen = ", ".join(dict.fromkeys(_value(row.changes) for row in cell if row.extra.get("tuned_on")))
    return (
        (f"**{value}**" if loss == best else value)
        + _sign(cell, crop, documents)
        + (f" ({chosen})" if chosen else "")
    )


def _value(changes: Mapping[str, Any]) -> str:
    """The number that was tuned."""
    (number,) = (v for k, v in changes.items() if not k.endswith((".name", ".scaling")))
    return f"{number:.3g}"


def _sign(cell: Cell, crop: Cell, documents: Mapping[RowKey, DocumentSums]) -> str:
    sums = [[documents.get(row.key) for row in rows] for rows in (cell, crop)]
    if cell == crop or not crop or any(found is None for side in sums for found in side):
        return ""
    nats = [np.array([found.nats for found in side if found is not None]) for side in sums]
    tokens = np.array(sums[0][0].tokens)  # type: ignore[union-attr]
    if nats[0].shape[1] < 2:
        return ""
    own, theirs = ([row.seed or 0 for row in rows] for rows in (cell, crop))
    gap = paired_difference(nats[0], nats[1], tokens, own, theirs)
    return " <" if gap.high < 0 else " >" if gap.low > 0 else ""
