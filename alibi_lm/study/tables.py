"""Markdown tables of perplexity by inference length, and the line that says where the numbers are from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from alibi_lm.evaluation.results import ResultRow
from alibi_lm.study.curves import Curve, View, baselines, curves, views
from alibi_lm.study.fairness import Difference
from alibi_lm.study.style import look


def markdown(rows: Sequence[ResultRow], unfair: Sequence[Difference] = ()) -> str:
    """The whole `table.md`: a section a view, then what makes the comparison unfair, if anything does."""
    parts = ["# Perplexity by inference length\n"]
    for view in views(rows):
        parts.append(f"## {view.title[0].upper()}{view.title[1:]}\n")
        parts.append(view_table(rows, view))
        parts.append(provenance(rows, view) + "\n")
    if unfair:
        parts.append("## Differences between the runs other than the scheme\n")
        parts.append("".join(f"- {escape(item.sentence)}\n" for item in unfair))
    return "\n".join(parts)


def view_table(rows: Sequence[ResultRow], view: View) -> str:
    """Schemes down, inference lengths across; beside each value its ratio to that at the training length."""
    found = curves(rows, view)
    lengths = sorted({n for curve in found for n in [*curve.losses, *curve.refused]})
    notes: dict[str, int] = {}
    lines = [
        "| scheme | trained at | seeds | " + " | ".join(str(n) for n in lengths) + " |",
        "| --- | --: | --: |" + " --: |" * len(lengths),
    ]
    for curve in found:
        name = look(curve.position).name + (f" ({curve.variant})" if curve.variant else "")
        cells = [_cell(curve, n, notes) for n in lengths]
        seeds = ", ".join("?" if s is None else str(s) for s in sorted(curve.seeds.values(), key=_none_last))
        lines.append(f"| {escape(name)} | {curve.train_length} | {seeds} | " + " | ".join(cells) + " |")
    for name, value in sorted(baselines(rows, view).items()):
        lines.append(f"| {escape(name)} baseline | | | " + " | ".join(f"{value:.2f}" for _ in lengths) + " |")
    text = "\n".join(lines) + "\n\nIn brackets: ratio to the value at the training length (bold).\n"
    for reason, number in notes.items():
        text += f"\n[{number}] {escape(reason)}\n"
    return text


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


def escape(text: str) -> str:
    """Text that stays text inside a Markdown table."""
    for sign in "\\`*_|<>[]":
        text = text.replace(sign, "\\" + sign)
    return " ".join(text.split())


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
