"""Markdown tables of perplexity by inference length, and the line that says where the numbers are from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from alibi_lm.results.curves import Curve, View, baselines, curves, views
from alibi_lm.results.rows import ResultRow
from alibi_lm.study.fairness import Difference
from alibi_lm.study.style import look


def markdown(rows: Sequence[ResultRow], unfair: Sequence[Difference] = ()) -> str:
    """The whole `table.md`: a section a view, then what makes the comparison unfair, if anything does."""
    parts = ["# Perplexity by inference length\n"]
    for view in views(rows):
        parts.append(f"## {view.title[0].upper()}{view.title[1:]}\n")
        parts.append(view_table(rows, view).markdown())
        parts.append(provenance(rows, view) + "\n")
    if unfair:
        parts.append("## Differences between the runs other than the scheme\n")
        parts.append("".join(f"- {escape(item.sentence)}\n" for item in unfair))
    return "\n".join(parts)


@dataclass(frozen=True)
class Table:
    """Plain text cells, before they become Markdown or HTML."""

    header: list[str]
    rows: list[list[str]]
    words: int = 1
    """Columns from the left that hold words; the others hold numbers."""
    notes: list[str] = field(default_factory=list)
    """What stands below, `[1] ...` first where cells refer to it."""

    def markdown(self) -> str:
        """As a Markdown table; bold cells (`**1.0**`) stay bold, everything else is escaped."""
        rule = ["---" if i < self.words else "--:" for i in range(len(self.header))]
        cells = [[_markdown_cell(cell) for cell in row] for row in [self.header, *self.rows]]
        lines = ["| " + " | ".join(row) + " |" for row in [cells[0], rule, *cells[1:]]]
        return "\n".join(lines) + "\n" + "".join(f"\n{escape(note, keep='[]')}\n" for note in self.notes)


def view_table(rows: Sequence[ResultRow], view: View) -> Table:
    """Schemes down, inference lengths across; beside each value its ratio to that at the training length."""
    found = curves(rows, view)
    lengths = sorted({n for curve in found for n in [*curve.losses, *curve.refused]})
    reasons: dict[str, int] = {}
    body = []
    for curve in found:
        name = look(curve.position).name + (f" ({curve.variant})" if curve.variant else "")
        seeds = ", ".join("?" if s is None else str(s) for s in sorted(curve.seeds.values(), key=_none_last))
        cells = [_cell(curve, n, reasons) for n in lengths]
        body.append([name, str(curve.train_length), seeds, *cells])
    for name, value in sorted(baselines(rows, view).items()):
        body.append([f"{name} baseline", "", "", *(f"{value:.2f}" for _ in lengths)])
    return Table(
        ["scheme", "trained at", "seeds", *map(str, lengths)],
        body,
        notes=[f"[{number}] {reason}" for reason, number in reasons.items()]
        + ["In brackets: ratio to the value at the training length (bold)."],
    )


def provenance(rows: Iterable[ResultRow], view: View) -> str:
    """One line: corpus, tokens, seeds, code. Where rows disagree, all their values are named."""
    own = [row for row in rows if row.run is not None and View(row.split, row.mode, row.stride) == view]
    names = {str(row.extra["corpus_name"]) for row in own if row.extra.get("corpus_name")}
    seeds = {row.seed for row in own if row.seed is not None}
    parts = [
        "corpus " + " ".join([*sorted(names), f"({_either(_short(row.corpus) for row in own)})"]),
        _either(f"{row.tokens:,}" for row in own) + " tokens scored",
        *sorted({str(row.extra["note"]) for row in own if row.extra.get("note")}),
        f"{len(seeds)} seeds, means of the loss" if len(seeds) > 1 else "one seed",
        "commit " + _either(_short(row.commit) for row in own),
    ]
    return "; ".join(parts)


def escape(text: str, keep: str = "") -> str:
    """Text that stays text inside a Markdown table; signs in `keep` stay as they are."""
    for sign in "\\`*_|<>[]":
        if sign not in keep:
            text = text.replace(sign, "\\" + sign)
    return " ".join(text.split())


def _markdown_cell(cell: str) -> str:
    if len(cell) > 4 and cell.startswith("**") and cell.endswith("**"):
        return f"**{escape(cell[2:-2])}**"
    return escape(cell, keep="[]")


def _cell(curve: Curve, length: int, notes: dict[str, int]) -> str:
    if length not in curve.losses:
        if length not in curve.refused:
            return "-"
        return f"- [{notes.setdefault(curve.refused[length], len(notes) + 1)}]"
    value = f"{curve.perplexity(length):.2f}"
    if length == curve.train_length:
        return f"**{value}**"
    ratio = curve.ratio(length)
    return value if ratio is None else f"{value} ({ratio:.2f})"


def _none_last(seed: int | None) -> tuple[bool, int]:
    return (seed is None, seed or 0)


def _short(text: str | None) -> str:
    return "unknown" if not text else text[:10]


def _either(values: Iterable[str]) -> str:
    return " or ".join(sorted(set(values)))
