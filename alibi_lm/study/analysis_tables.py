"""A view of an analysis as a Markdown table."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from alibi_lm.study.analysis_data import TERM_NAMES, TITLES, Analysis, Series, read_analysis

_COLUMN = {"fixed": "context", "offset": "offset"}
"""What the columns of a view are, where they are not lengths."""
_NOTES = {
    "perplexity": "Perplexity per token; in brackets its ratio to that at the training length.",
    "position": "Mean nats per token of the positions of each doubling, from the shortest windows that reach it.",
    "last": "Perplexity per token at each window's end; in brackets its ratio to that at the training length.",
    "documents": "Documents that cost more nats than in windows of the training length, of all documents.",
    "fixed": "Perplexity per token of the same targets; in brackets its ratio to that at the training length.",
    "decomposition": "Nats per token with interval, and the factor of perplexity (below 1 is better).",
    "offset": "Change in nats per token against positions from 0, in brackets the largest of a single token.",
}


def markdown(path: str | Path) -> str:
    """The table of `<view>.json`.

    Raises:
        ValueError: as `read_analysis`.
    """
    found = read_analysis(path)
    reasons: list[str] = []
    rows = _decomposition(found, reasons) if found.view == "decomposition" else _grid(found, reasons)
    lines = [f"## {TITLES[found.view]}", "", _NOTES[found.view] + " " + found.provenance + ".", ""]
    if not found.same_text:
        lines += ["NOT THE SAME TEXT: levels cannot be compared between rows.", ""]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    if reasons:
        lines += ["", *(f"[{number}] {reason}" for number, reason in enumerate(reasons, start=1))]
    return "\n".join(lines) + "\n"


def _grid(found: Analysis, reasons: list[str]) -> list[list[str]]:
    """A row a curve (and mode), a column a length, context or offset."""
    cells: dict[tuple[str, ...], dict[int, str]] = {}
    for series in found.series:
        for point in series.points:
            mode = point.get("mode", "")
            if point.get("stride"):
                mode += f", stride {point['stride']}"
            row = cells.setdefault((series.name, str(series.train_length), mode), {})
            if found.view == "position":
                if point["nats"] is not None:  # shorter windows come first and have more targets
                    row |= _octaves(point["curve"]) | row
            else:
                row[point[_COLUMN.get(found.view, "length")]] = _cell(found.view, series, point, reasons)
    columns = sorted({column for row in cells.values() for column in row})
    modes = any(mode for _, _, mode in cells)
    heads = [f"to {c}" if found.view == "position" else str(c) for c in columns]
    table = [["scheme", "trained at", *(["windows"] if modes else []), *heads]]
    table.append(["---", "--:", *(["---"] if modes else []), *["--:"] * len(columns)])
    for (name, trained, mode), row in cells.items():
        table.append([name, trained, *([mode] if modes else []), *(row.get(c, "") for c in columns)])
    return table


def _cell(view: str, series: Series, point: dict[str, Any], reasons: list[str]) -> str:
    if point["nats"] is None:
        return _refer(point["reason"], reasons)
    if view == "documents":
        base = next((p for p in series.points if p["length"] == series.train_length), None)
        if base is None or base["nats"] is None:
            return str(sum(v is not None for v in point["documents"]))
        pairs = [
            (a, b)
            for a, b in zip(point["documents"], base["documents"], strict=True)
            if a is not None and b is not None
        ]
        return f"{sum(a > b for a, b in pairs)} of {len(pairs)}"
    if view == "offset":
        return f"{point['nats']:+.4f} ({point['largest']:.1g})"
    change = point.get("difference")
    if change is None or change["low"] is None or change["from"] == point.get(_COLUMN.get(view, "length")):
        return _number(point["nats"])
    ends = f"{math.exp(change['low']):.3f}-{math.exp(min(change['high'], 700)):.3f}"
    return f"{_number(point['nats'])} ({math.exp(min(change['nats'], 700)):.3f}, {ends})"


def _number(nats: float) -> str:
    return f"{math.exp(min(nats, 700)):.2f}"


def _octaves(curve: dict[str, list[float]]) -> dict[int, str]:
    """Last positions of doublings and the mean of the bins up to there, weighted by their width."""
    found: dict[int, list[tuple[float, float]]] = {}
    for first, last, nats in zip(curve["first"], curve["last"], curve["nats"], strict=True):
        end = 1 << max(0, math.ceil(math.log2(last)))
        found.setdefault(end, []).append((last - first + 1, nats))
    return {end: f"{sum(w * v for w, v in bins) / sum(w for w, _ in bins):.3f}" for end, bins in found.items()}


def _decomposition(found: Analysis, reasons: list[str]) -> list[list[str]]:
    table = [["scheme", "trained at", "length", *TERM_NAMES.values()], ["---", *["--:"] * (2 + len(TERM_NAMES))]]
    for series in found.series:
        for point in series.points:
            row = [series.name, str(series.train_length), str(point["length"])]
            for name in TERM_NAMES:
                term = point[name]
                if term is None or term["nats"] is None:
                    row.append(_refer(point.get("reason") or term["reason"], reasons))
                    continue
                interval = "" if term["low"] is None else f" [{term['low']:+.4f}, {term['high']:+.4f}]"
                row.append(f"{term['nats']:+.4f}{interval}, x{math.exp(min(term['nats'], 700)):.3g}")
            table.append(row)
    return table


def _refer(reason: str, reasons: list[str]) -> str:
    if reason not in reasons:
        reasons.append(reason)
    return f"- [{reasons.index(reason) + 1}]"
