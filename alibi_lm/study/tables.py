"""Tables of results as Markdown or HTML, and the line that says where the numbers are from."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from alibi_lm.results.curves import Curve, View, baselines, curves, text_names, view_of, views
from alibi_lm.results.rows import ResultRow
from alibi_lm.results.statistics import accuracy_interval
from alibi_lm.study.analysis import AT, TERM_NAMES, TITLES, Analysis, Series, context_words, perplexity, times
from alibi_lm.study.fairness import Difference
from alibi_lm.study.records import shortened
from alibi_lm.study.stages import Stage
from alibi_lm.study.style import label

_BOLD = re.compile(r"\*\*(.+)\*\*")


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
        """As a Markdown table; bold cells (`**1.0**`) and line breaks stay, everything else is escaped."""
        rule = ["---" if i < self.words else "--:" for i in range(len(self.header))]
        cells = [[_markdown_cell(cell) for cell in row] for row in [self.header, *self.rows]]
        lines = ["| " + " | ".join(row) + " |" for row in [cells[0], rule, *cells[1:]]]
        return "\n".join(lines) + "\n" + "".join(f"\n{escape(note, keep='[]')}\n" for note in self.notes)

    def html(self) -> str:
        """As an HTML table; the same, with everything escaped."""
        head = "".join(_html_cell("th", cell, i < self.words) for i, cell in enumerate(self.header))
        rows = [
            "<tr>" + "".join(_html_cell("td", cell, i < self.words) for i, cell in enumerate(row)) + "</tr>"
            for row in self.rows
        ]
        notes = "".join(f'<p class="soft small">{html.escape(note)}</p>' for note in self.notes)
        body = "\n".join(rows)
        grid = f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>"
        return f'<div class="wide">{grid}</div>{notes}'


def markdown(
    rows: Sequence[ResultRow],
    words: Mapping[str, str] | None = None,
    unfair: Sequence[Difference] = (),
    stages: Sequence[Stage] = (),
) -> str:
    """The whole `table.md`: a section per view, then what makes the comparison unfair, if anything does."""
    parts = ["# Results by inference length\n"]
    for view in views(rows):
        metric = "" if view.metric == "perplexity" else f": {view.metric}"
        parts.append(f"## {view.title[0].upper()}{view.title[1:]}{metric}\n")
        parts.append(view_table(rows, view, words).markdown())
        parts.append(provenance(rows, view) + "\n")
    if stages:
        parts.append("## Extrapolation by stage of training\n")
        parts.append(stage_table(stages).markdown())
    if unfair:
        parts.append("## Differences between the runs other than the scheme\n")
        parts.append("".join(f"- {escape(item.sentence)}\n" for item in unfair))
    return "\n".join(parts)


def stage_table(stages: Sequence[Stage]) -> Table:
    """Schemes down, training steps across: perplexity over that at the training length, mean over the seeds."""
    steps = sorted({step for stage in stages for step in stage.ratios})
    body = []
    for one in stages:
        cells = [f"{one.mean(step):.3f}" if step in one.ratios else "-" for step in steps]
        body.append([label(one.position, one.variant), str(one.train_length), f"{one.factor} L", *cells])
    notes = ["Perplexity over that at the training length, both of the checkpoint after so many steps."]
    return Table(["scheme", "trained at", "tested at", *(f"step {step}" for step in steps)], body, 3, notes)


def view_table(rows: Sequence[ResultRow], view: View, words: Mapping[str, str] | None = None) -> Table:
    """Schemes down, inference lengths across; beside each perplexity its ratio to that at the training length."""
    found = curves(rows, view, words)
    lengths = sorted({n for curve in found for n in [*curve.losses, *curve.refused]})
    reasons: list[str] = []
    body = []
    for curve in found:
        head = [label(curve.position, curve.variant), str(curve.train_length), _seeds(curve)]
        body.append(head + [_cell(curve, n, reasons) for n in lengths])
    for name, value in sorted(baselines(rows, view).items()):
        body.append([f"{name} baseline", "", "", *(f"{value:.2f}" for _ in lengths)])
    notes = numbered(reasons)
    if view.metric == "perplexity":
        notes.append("In brackets: ratio to the value at the training length (bold).")
    if view.metric == "accuracy":
        notes.append("Mean over all seeds; in brackets its 95% interval, over seeds and items.")
    return Table(["scheme", "trained at", "runs", *map(str, lengths)], body, 3, notes)


def provenance(rows: Iterable[ResultRow], view: View) -> str:
    """One line: corpus, tokens, seeds, code. Where rows disagree, all their values are named."""
    own = [row for row in rows if row.run is not None and view_of(row) == view]
    seeds = {row.seed for row in own if row.seed is not None}
    names = text_names(own).items()
    texts = [
        f"({shortened(corpus)})" if name == "text" else f"{name} ({shortened(corpus)})" for corpus, name in names
    ]
    what = "tokens scored" if view.task == "text" else f"targets of task {view.task} scored"
    parts = [
        ("corpus " if len(texts) == 1 else f"{len(texts)} texts: ") + ", ".join(sorted(texts)),
        _all(f"{row.tokens:,}" for row in own) + f" {what}",
        *sorted({str(row.extra["note"]) for row in own if row.extra.get("note")}),
        (f"{len(seeds)} seeds" + (", means of the loss" if view.metric == "perplexity" else ""))
        if len(seeds) > 1
        else "one seed",
        "commit " + _all(shortened(row.commit) for row in own),
    ]
    return "; ".join(parts)


def _cell(curve: Curve, length: int, reasons: list[str]) -> str:
    why = refer(curve.refused[length], reasons) if length in curve.refused else ""
    if length not in curve.losses:
        return f"- {why}" if why else "-"
    digits = 2 if curve.metric == "perplexity" else 3
    value = f"{curve.value(length):.{digits}f}"
    if curve.metric == "accuracy":
        low, high = accuracy_interval(list(curve.losses[length].values()), curve.items[length])
        value = f"{value} ({low:.2f}-{high:.2f})"
    ratio = curve.ratio(length)
    if length == curve.train_length and curve.metric == "perplexity":
        value = value if why else f"**{value}**"
    elif ratio is not None:
        value = f"{value} ({ratio:.2f})"
    return f"{value} {why}".strip()  # with a reason: some of the runs have no value there


def _seeds(curve: Curve) -> str:
    seeds = sorted(seed for seed in curve.seeds.values() if seed is not None)
    unknown = len(curve.seeds) - len(seeds)
    parts = [("seed " if len(seeds) == 1 else "seeds ") + ", ".join(map(str, seeds))] if seeds else []
    return " and ".join([*parts, *([f"{unknown} without a seed"] if unknown else [])])


_NOTES = {
    "perplexity": "Perplexity per token; in brackets its ratio to that at the training length.",
    "position": "Mean nats per token of the positions of each doubling, from the shortest windows that reach it.",
    "last": "Perplexity per token at each window's end; in brackets its ratio to that at the training length.",
    "documents": "Documents that cost more nats than in windows of the training length, of all documents.",
    "fixed": "Perplexity per token of the same targets; in brackets its ratio to that at the training length.",
    "decomposition": "Nats per token with interval, and the factor of perplexity (below 1 is better).",
    "effective_context": "Perplexity per token of the same targets; in brackets its ratio to that at the training "
    "length. Effective context: the least one whose loss is within 1% of the best. Field: how many of the last "
    "tokens hold 99% of the gradient of the loss, in windows of the longest context; median of the runs.",
    "repeat": "Nats per token that a segment costs less where it has been read before, with interval.",
    "attention": "How far heads look, how widely, and how many rest on the first token.",
    "self_longppl": "Perplexity of the key tokens, which a long context makes cheap by the judgement of one of "
    "the runs; in brackets its ratio to that at the training length, where the runs are flattered: they chose "
    "these tokens by their low loss there.",
    "offset": "Change in nats per token against positions from 0, in brackets the largest of a single token.",
    "windows": "Keys per head by the share of attention that may be lost; in brackets those needed on the text.",
    "safe_length": "Perplexity per token; in brackets its ratio to that at the training length.",
}


def analysis_markdown(found: Analysis, own: Table | None = None) -> str:
    """The table of an analysis; `own` where the view makes it itself."""
    kinds = {"decomposition": _decomposition, "windows": _windows}
    table = own or kinds.get(found.view, _grid)(found)
    lines = [f"## {TITLES[found.view]}", "", _NOTES[found.view] + " " + found.provenance + ".", ""]
    if not found.same_text:
        lines += ["NOT THE SAME TEXT: levels cannot be compared between rows.", ""]
    told = [f"- {s.name}, L = {s.train_length}: {s.verdict}" for s in found.series if s.verdict]
    return "\n".join([*lines, *told, *([""] if told else [])]) + "\n" + table.markdown()


def _grid(found: Analysis) -> Table:
    """A row per curve (and mode), a column per length, context or offset."""
    reasons: list[str] = []
    cells: dict[tuple[str, ...], dict[int, str]] = {}
    for series in found.series:
        for point in series.points:
            mode = point.get("mode", "")
            if point.get("stride"):
                mode += f", stride {point['stride']}"
            if found.view == "effective_context":
                mode = context_words(point)
            row = cells.setdefault((series.name, str(series.train_length), mode), {})
            if found.view == "position":
                if point["nats"] is not None:  # shorter windows come first and have more targets
                    row |= _octaves(point["curve"]) | row
            else:
                row[point[AT.get(found.view, "length")]] = _analysis_cell(found.view, series, point, reasons)
    columns = sorted({column for row in cells.values() for column in row})
    heads = [f"to {c}" if found.view == "position" else str(c) for c in columns]
    named = "context" if found.view == "effective_context" else "windows"
    windows = [named] if any(mode for _, _, mode in cells) else []
    body = [
        [*head[: 2 + len(windows)], *(row.get(column, "") for column in columns)] for head, row in cells.items()
    ]
    return Table(["scheme", "trained at", *windows, *heads], body, 1, numbered(reasons))


def _analysis_cell(view: str, series: Series, point: Mapping[str, Any], reasons: list[str]) -> str:
    if point["nats"] is None:
        return f"- {refer(point['reason'], reasons)}"
    if view == "documents":
        base = next((p for p in series.points if p["length"] == series.train_length), None)
        if base is None or base["nats"] is None:
            return str(sum(v is not None for v in point["documents"]))
        both = zip(point["documents"], base["documents"], strict=True)
        pairs = [(a, b) for a, b in both if a is not None and b is not None]
        return f"{sum(a > b for a, b in pairs)} of {len(pairs)}"
    if view == "repeat":
        ends = "" if point["low"] is None else f" ({point['low']:+.3f} to {point['high']:+.3f})"
        return f"{point['nats']:+.3f}{ends}"
    if view == "offset":
        return f"{point['nats']:+.4f} ({point['largest']:.1g})"
    change = point.get("difference")
    if change is None or change["low"] is None or change["from"] == point.get(AT.get(view, "length")):
        return f"{perplexity(point['nats']):.2f}"
    ends = f"{perplexity(change['low']):.3f}-{perplexity(change['high']):.3f}"
    return f"{perplexity(point['nats']):.2f} ({perplexity(change['nats']):.3f}, {ends})"


def _windows(found: Analysis) -> Table:
    """A row per layer and head."""
    reasons: list[str] = []
    points = [(series, point) for series in found.series for point in series.points]
    shares = next((list(point["windows"]) for _, point in points if "windows" in point), [])
    body = []
    for series, point in points:
        name = [series.name, str(series.train_length)]
        if point.get("reason"):
            body.append([*name, *["-"] * 4, *[f"- {refer(point['reason'], reasons)}" for _ in shares]])
            continue
        needed = {s: f" ({n:,})" for s, n in point.get("needed", {}).items()}
        keys = [f"{point['windows'][s]:,}{needed.get(s, '')}" for s in shares]
        numbers = [f"{point['slope']:.4g}", f"{point['excess']:.1f}"]
        body.append([*name, str(point["layer"]), str(point["head"]), *numbers, *keys])
    return Table(["scheme", "trained at", "layer", "head", "slope", "bound", *shares], body, 1, numbered(reasons))


def _octaves(curve: Mapping[str, list[float]]) -> dict[int, str]:
    """Last positions of doublings and the mean of the bins up to there, weighted by their width."""
    found: dict[int, list[tuple[float, float]]] = {}
    for first, last, nats in zip(curve["first"], curve["last"], curve["nats"], strict=True):
        end = 1 << max(0, math.ceil(math.log2(last)))
        found.setdefault(end, []).append((last - first + 1, nats))
    return {end: f"{sum(w * v for w, v in bins) / sum(w for w, _ in bins):.3f}" for end, bins in found.items()}


def _decomposition(found: Analysis) -> Table:
    reasons: list[str] = []
    body = []
    for series in found.series:
        for point in series.points:
            row = [series.name, str(series.train_length), str(point["length"])]
            for name in TERM_NAMES:
                term = point[name]
                if term is None or term["nats"] is None:
                    row.append(f"- {refer(point.get('reason') or term['reason'], reasons)}")
                    continue
                interval = "" if term["low"] is None else f" [{term['low']:+.4f}, {term['high']:+.4f}]"
                row.append(f"{term['nats']:+.4f}{interval}, {times(term['nats'])}")
            body.append(row)
    return Table(["scheme", "trained at", "length", *TERM_NAMES.values()], body, 1, numbered(reasons))


def escape(text: str, keep: str = "") -> str:
    """Text that stays text inside a Markdown table; signs in `keep` stay as they are."""
    for sign in "\\`*_|<>[]":
        if sign not in keep:
            text = text.replace(sign, "\\" + sign)
    return " ".join(text.split())


def _markdown_cell(cell: str) -> str:
    if bold := _BOLD.fullmatch(cell):
        return f"**{escape(bold[1])}**"
    return "<br>".join(escape(line, keep="[]") for line in cell.split("\n"))


def _html_cell(tag: str, cell: str, words: bool) -> str:
    bold = _BOLD.fullmatch(cell)
    text = "<br>".join(html.escape(line) for line in (bold[1] if bold else cell).split("\n"))
    kind = ' class="word"' if words else ""
    return f"<{tag}{kind}>{f'<strong>{text}</strong>' if bold else text}</{tag}>"


def refer(reason: str, reasons: list[str]) -> str:
    """The mark `[1]` of a note, which is added where it is new."""
    if reason not in reasons:
        reasons.append(reason)
    return f"[{reasons.index(reason) + 1}]"


def numbered(reasons: Sequence[str]) -> list[str]:
    """Notes below a table, with the marks of `refer`."""
    return [f"[{number}] {reason}" for number, reason in enumerate(reasons, start=1)]


def number(value: float | None, digits: int = 2) -> str:
    """With so many digits after the point; `-` where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def _all(values: Iterable[str]) -> str:
    *first, last = sorted(set(values))
    return f"{', '.join(first)} and {last}" if first else last
