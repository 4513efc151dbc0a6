"""The table of test-time changes, made from rows only: one line per change, one column per inference length."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from alibi_lm.results.curves import CHECKPOINT
from alibi_lm.results.documents import DocumentSums
from alibi_lm.results.rows import ResultRow, RowKey
from alibi_lm.study.compare import measure, sample
from alibi_lm.study.pages import Block, Table, markdown, numbered, refer
from alibi_lm.study.records import shortened
from alibi_lm.study.style import label

Cell = list[ResultRow]
"""Rows of one change at one length, one for each seed."""


def change_tables(rows: Sequence[ResultRow], documents: Mapping[RowKey, DocumentSums]) -> str:
    """Markdown with one table for each trained model, its seeds together.

    Args:
        rows: rows of scripts/test_time.py; others are ignored.
        documents: sums per document of these rows.
    """
    models: dict[tuple[str, str, str | None], dict[str, dict[int, Cell]]] = {}
    for row in rows:
        if row.run is not None and row.inference_length is not None and "change" in row.extra:
            # Those of another checkpoint or text are no seeds of these.
            model = re.sub(r"_s\d+(?=_|$)", "", row.run), str(row.changes.get(CHECKPOINT, "")), row.corpus
            of_model = models.setdefault(model, {})
            of_model.setdefault(str(row.extra["change"]), {}).setdefault(row.inference_length, []).append(row)
    page: list[Block] = ["# Changes of trained models for the test"]
    for (name, step, text), changes in models.items():
        all_rows = [row for cells in changes.values() for cell in cells.values() for row in cell]
        seeds = ", ".join(sorted({str(row.seed) for row in all_rows}))
        first = all_rows[0]
        others = [step] if step else []
        others += [f"text {shortened(text)}"] if len({corpus for _, _, corpus in models}) > 1 else []
        named = ", ".join([name, f"seed {seeds}", *others])
        page.append(f"## {label(first.position)}, trained at {first.train_length} ({named})")
        page.append(_table(changes, documents))
    return markdown(page)


def _table(changes: Mapping[str, Mapping[int, Cell]], documents: Mapping[RowKey, DocumentSums]) -> Table:
    lengths = sorted({length for cells in changes.values() for length in cells})
    order = sorted(changes, key=lambda name: (name != "crop to L", name != "unchanged"))
    best = {n: min(_loss(cells.get(n, [])) for cells in changes.values()) for n in lengths}
    reasons: list[str] = []
    body = []
    for name in order:
        line = [name]
        for length in lengths:
            cell, crop = (changes.get(which, {}).get(length, []) for which in (name, "crop to L"))
            loss = _loss(cell)
            if not math.isfinite(loss):
                why = next((row.reason for row in cell if row.reason), "not evaluated")
                line.append(f"- {refer(why, reasons)}")
                continue
            value = f"**{math.exp(loss):.2f}**" if loss == best[length] else f"{math.exp(loss):.2f}"
            chosen = ", ".join(dict.fromkeys(_value(row) for row in cell if row.extra.get("tuned_on")))
            line.append(value + _sign(cell, crop, documents) + (f" ({chosen})" if chosen else ""))
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
    """The mean loss over the seeds; infinite if one has no value."""
    losses = [math.inf if row.loss is None else row.loss for row in cell]
    return math.fsum(losses) / len(losses) if losses else math.inf


def _value(row: ResultRow) -> str:
    """The tuned value, as text."""
    (number,) = (v for k, v in row.changes.items() if k != CHECKPOINT and not k.endswith((".name", ".scaling")))
    return f"{number:.3g}"


def _sign(cell: Cell, crop: Cell, documents: Mapping[RowKey, DocumentSums]) -> str:
    if cell == crop or not math.isfinite(_loss(crop)):
        return ""
    left, right = sample(cell, documents), sample(crop, documents)
    gap = measure(left, right)
    if left.nats is None or right.nats is None or gap.low is None or gap.high is None:
        return ""
    return " <" if gap.high < 0 else " >" if gap.low > 0 else ""
