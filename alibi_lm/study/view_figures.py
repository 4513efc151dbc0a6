"""Figures and tables of the views that look inside an extrapolation curve, made from `<view>.json`."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from alibi_lm.files import write_text
from alibi_lm.study.analysis import (
    TERM_NAMES,
    VIEWS,
    Analysis,
    Series,
    context_words,
    perplexity,
    read_analysis,
    times,
)
from alibi_lm.study.figures import CLOSE_UP_FROM, COMPANY, homes_of
from alibi_lm.study.pages import Block, Table, markdown, numbered, refer
from alibi_lm.study.plots import Cell, Line, Panel, build, grid, save_both
from alibi_lm.study.style import label
from alibi_lm.study.view_panels import decomposition_panel, documents_panel, heat_map, weight_lines, windows_panel

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_analysis(path: str | Path) -> list[Path]:
    """Draw the figure of `<view>.json` beside it: `<view>.png`, `<view>.svg`, and its table `<view>.md`.

    Raises:
        ValueError: no such file, or not one of ours.
    """
    path = Path(path)
    found = read_analysis(path)
    drawn = save_both(analysis_figure(found), path.parent, path.stem)
    write_text(path.with_suffix(".md"), markdown(analysis_page(found)))
    return [*drawn, path.with_suffix(".md")]


# --- figures -------------------------------------------------------------------------------------


def analysis_figure(found: Analysis) -> Figure:
    """The figure of one view."""
    draw, size = _DRAWN.get(found.view, (line_panels, (3.6, 3.1)))
    cells = draw(found)
    marks = [] if found.same_text else ["NOT THE SAME TEXT: levels cannot be compared between curves"]
    remarks = [VIEWS[found.view].remark] if VIEWS[found.view].remark else []
    reasons: dict[str, list[str]] = {}
    for series in found.series:
        for reason in {str(p["reason"]) for p in series.points if p.get("reason")}:
            reasons.setdefault(reason, []).append(series.name)
    for reason, names in sorted(reasons.items()):
        remarks.append(f"Without a value at some lengths: {', '.join(names)}: {reason}.")
    columns = 2 if len(cells) in (2, 4) else min(len(cells), 3)
    return build(VIEWS[found.view].title, grid(cells, columns), found.provenance, remarks, marks, size)


def _each(panel: Callable[..., None], found: Analysis) -> list[Cell]:
    """A panel for each curve; curves with nothing to show get a remark, unless there is nothing else."""
    shown = [s for s in found.series if any(not p.get("reason") for p in s.points[-1:])] or found.series
    return [functools.partial(panel, series=series) for series in shown]


def _windows_panels(found: Analysis) -> list[Cell]:
    layers = [(s, n) for s in found.series for n in sorted({p["layer"] for p in s.points if "layer" in p})]
    return [
        functools.partial(windows_panel, series=series, layer=layer)
        for series, layer in layers or [(found.series[0], None)]
    ]


def _heat_maps(found: Analysis) -> list[Cell]:
    """For each curve, a map at the training length, one at the longest length, and lines of both."""
    cells: list[Cell] = []
    for series in found.series:
        points = [point for point in series.points if "heads" in point]
        own = next((p for p in points if p["length"] == series.train_length), points[0] if points else None)
        far = points[-1] if points and points[-1] is not own else None
        cells.append(functools.partial(heat_map, series=series, point=own))
        cells.append(functools.partial(heat_map, series=series, point=far) if far else None)
        both = [point for point in (own, far) if point]
        cells.append(functools.partial(weight_lines, series=series, points=both) if both else None)
    return cells


def position_panels(found: Analysis) -> list[Cell]:
    """A panel per curve, with its band; the other curves are behind it in grey. All have the same axes."""
    lines = [(series, line) for series in found.series if (line := _position_line(series)).x]
    values = [v for _, line in lines for v in line.y]
    if not values:
        return [Panel([])]
    room = 0.12 * (max(values) - min(values)) or 0.1
    return [
        Panel(
            [line],
            f"{series.name}, trained at {series.train_length}",
            x_label=VIEWS["position"].x_label,
            y_label="nats per token",
            trained=series.train_length,
            limits=(min(values) - room, max(values) + room),
            band=True,
            behind=[other for _, other in lines if other is not line],
        )
        for series, line in lines
    ]


_BINS = ("first", "last", "nats", "low", "high")


def _position_line(series: Series) -> Line:
    """The curve by position; each part comes from the shortest windows that reach it, which have most targets."""
    bins: list[tuple[int, int, float, float, float]] = []
    for point in sorted((p for p in series.points if p["nats"] is not None), key=lambda p: p["length"]):
        reached = bins[-1][1] if bins else 0
        for first, last, nats, low, high in zip(*(point["curve"][k] for k in _BINS), strict=True):
            if last > reached:
                bins.append((first, last, nats, nats if low is None else low, nats if high is None else high))
    y, low, high = ([values[k] for values in bins] for k in (2, 3, 4))
    x = [math.sqrt(first * last) for first, last, *_ in bins]
    return Line(series.position, "", x, y, "", low, high)  # the panel's title is its name


_DRAWN: dict[str, tuple[Callable[[Analysis], list[Cell]], tuple[float, float]]] = {
    "position": (position_panels, (2.9, 2.3)),
    "decomposition": (functools.partial(_each, decomposition_panel), (2.7, 2.3)),
    "documents": (functools.partial(_each, documents_panel), (2.7, 2.3)),
    "windows": (_windows_panels, (2.9, 2.6)),
    "attention": (_heat_maps, (2.9, 2.0)),
}
"""Cells of a view that are not lines by length, and their size in inches."""


def line_panels(found: Analysis) -> list[Cell]:
    """A panel for each training length that curves share; twice if close lines would coincide."""
    shared, homes = homes_of([s.train_length for s in found.series])
    if not shared:
        shared = [max(s.train_length for s in found.series)]
        homes = shared * len(found.series)
    panels: list[Cell] = []
    for length in shared:
        members = [s for s, home in zip(found.series, homes, strict=True) if home == length]
        lines = [n for s in members for n in _lines(found.view, s, s.train_length != length) if n.x]
        title = f"trained at {length}"
        panel = functools.partial(Panel, lines=lines, trained=length, x_label=VIEWS[found.view].x_label)
        if found.view == "repeat":
            width = next(point["width"] for series in found.series for point in series.points)
            ends = [v for line in lines for v in [*line.y, *line.low, *line.high]] + [0.0]
            room = 0.08 * (max(ends) - min(ends)) or 0.1
            limits = min(ends) - room, max(ends) + room
            title, y_label = f"{title}, segments of {width} tokens", "gain, nats per token"
            panels.append(panel(title=title, y_label=y_label, limits=limits, levels={"no gain": 0.0}))
            continue
        if found.view == "offset":
            panels.append(panel(title=title, y_label="change of the mean loss, nats per token", zero=True))
            continue
        values = [v for line in lines for v in line.y] or [1.0]
        span = max(values) / min(values)
        panels.append(panel(title=title, log_y=span > 1.5))
        close = close_lines(lines, length) if span > CLOSE_UP_FROM else []
        if close:
            ends = [v for line in close for v in [*line.low, *line.high]]
            near = [v for line in close for x, v in zip(line.x, line.y, strict=True) if x <= length or line.low]
            low, high = min([*near, *ends]), max([*near, *ends])
            room = 0.07 * (high - low) or 0.05 * high
            panels.append(panel(title=f"{title}, close-up", lines=close, limits=(low - room, high + room)))
    return panels


def close_lines(lines: Sequence[Line], length: int) -> list[Line]:
    """Lines for a close-up; those that leave it have no intervals there, which would hide the others.

    Empty if no line is near the best one at all lengths.
    """
    near = {
        id(line): [v for x, v in zip(line.x, line.y, strict=True) if x <= length] or line.y[:1] for line in lines
    }
    best = min(min(values) for values in near.values())
    found = [line for line in lines if min(near[id(line)]) <= COMPANY * best]
    if not any(max(line.y) <= COMPANY * best for line in found):
        return []
    return [line if max(line.y) <= COMPANY * best else replace(line, low=[], high=[]) for line in found]


def _lines(view: str, series: Series, guest: bool) -> list[Line]:
    """The lines of one series; two where perplexity was measured in both kinds of windows."""
    unit = float if view in ("offset", "repeat") else perplexity
    notes = {"": ""}
    if view == "perplexity":
        notes = {"nonoverlapping": "", "sliding": "sliding"}
    elif view == "effective_context":
        notes[""] = next((context_words(p) for p in series.points if p["effective"] is not None), "")
    found = []
    for mode, note in notes.items():
        points = [p for p in series.points if p["nats"] is not None and mode in ("", p.get("mode"))]
        ends = [tuple(unit(v) for v in _interval(p)) for p in points]
        known = any(low < high for low, high in ends)
        found.append(
            Line(
                series.position,
                label(series.position, length=series.train_length if guest else None),
                [float(p[VIEWS[view].at]) for p in points],
                [unit(p["nats"]) for p in points],
                "; ".join(filter(None, [series.variant, note])),
                [low for low, _ in ends] if known else [],
                [high for _, high in ends] if known else [],
                stray=guest or bool(series.variant) or mode == "sliding",
            )
        )
    return found


def _interval(point: Mapping[str, Any]) -> tuple[float, float]:
    """Interval of the difference from the trained length, around the point; only the point if there is none."""
    known = point.get("difference", point if "offset" in point or "distance" in point else None)
    if known is None or known["low"] is None:
        return point["nats"], point["nats"]
    return point["nats"] + known["low"] - known["nats"], point["nats"] + known["high"] - known["nats"]


# --- tables --------------------------------------------------------------------------------------


def analysis_page(found: Analysis) -> list[Block]:
    """The page of a view: what it shows, the source of its numbers, and its table."""
    kinds = {"decomposition": _decomposition, "windows": _windows, "attention": _attention}
    page: list[Block] = [f"## {VIEWS[found.view].title}", f"{VIEWS[found.view].note} {found.provenance}."]
    if not found.same_text:
        page.append("NOT THE SAME TEXT: levels cannot be compared between rows.")
    if told := [f"{s.name}, L = {s.train_length}: {s.verdict}" for s in found.series if s.verdict]:
        page.append(told)
    return [*page, kinds.get(found.view, _grid)(found)]


def _grid(found: Analysis) -> Table:
    """One row per curve (and mode), one column per length, context or offset."""
    reasons: list[str] = []
    cells: dict[tuple[str, ...], dict[int, str]] = {}
    for series in found.series:
        for point in series.points:
            mode = point.get("mode", "") + (f", stride {point['stride']}" if point.get("stride") else "")
            if found.view == "effective_context":
                mode = context_words(point)
            row = cells.setdefault((series.name, str(series.train_length), mode), {})
            if found.view != "position":
                row[point[VIEWS[found.view].at]] = _cell(found.view, series, point, reasons)
            elif point["nats"] is not None:  # shorter windows come first and have more targets
                row |= _octaves(point["curve"]) | row
    columns = sorted({column for row in cells.values() for column in row})
    heads = [f"to {c}" if found.view == "position" else str(c) for c in columns]
    named = "context" if found.view == "effective_context" else "windows"
    windows = [named] if any(mode for _, _, mode in cells) else []
    body = [
        [*head[: 2 + len(windows)], *(row.get(column, "") for column in columns)] for head, row in cells.items()
    ]
    return Table(["scheme", "trained at", *windows, *heads], body, 1, numbered(reasons))


def _cell(view: str, series: Series, point: Mapping[str, Any], reasons: list[str]) -> str:
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
    if change is None or change["low"] is None or change["from"] == point.get(VIEWS[view].at):
        return f"{perplexity(point['nats']):.2f}"
    ends = f"{perplexity(change['low']):.3f}-{perplexity(change['high']):.3f}"
    return f"{perplexity(point['nats']):.2f} ({perplexity(change['nats']):.3f}, {ends})"


def _octaves(curve: Mapping[str, list[float]]) -> dict[int, str]:
    """Last position of each doubling -> mean of the bins in it, weighted by their width."""
    found: dict[int, list[tuple[float, float]]] = {}
    for first, last, nats in zip(curve["first"], curve["last"], curve["nats"], strict=True):
        end = 1 << max(0, math.ceil(math.log2(last)))
        found.setdefault(end, []).append((last - first + 1, nats))
    return {end: f"{sum(w * v for w, v in bins) / sum(w for w, _ in bins):.3f}" for end, bins in found.items()}


def _windows(found: Analysis) -> Table:
    """One row per layer and head."""
    points = [(series, point) for series in found.series for point in series.points]
    shares = next((list(point["windows"]) for _, point in points if "windows" in point), [])

    def row(point: Mapping[str, Any]) -> list[str]:
        needed = {s: f" ({n:,})" for s, n in point.get("needed", {}).items()}
        keys = [f"{point['windows'][s]:,}{needed.get(s, '')}" for s in shares]
        return [str(point["layer"]), str(point["head"]), f"{point['slope']:.4g}", f"{point['excess']:.1f}", *keys]

    return _by_point(found, ["layer", "head", "slope", "bound", *shares], row, at="")


def _decomposition(found: Analysis) -> Table:
    def row(point: Mapping[str, Any]) -> list[str]:
        cells = []
        for term in (point[name] for name in TERM_NAMES):
            interval = "" if term["low"] is None else f" [{term['low']:+.4f}, {term['high']:+.4f}]"
            cells.append(f"{term['nats']:+.4f}{interval}, {times(term['nats'])}")
        return cells

    return _by_point(found, list(TERM_NAMES.values()), row)


def _attention(found: Analysis) -> Table:
    """Mean distance and entropy of the attention weights, and how many heads rest on the first token."""

    def row(point: Mapping[str, Any]) -> list[str]:
        values = [[head[key] for head in point["heads"]] for key in ("distance", "entropy", "first")]
        numbers, alone = point.get("numbers") or {}, point.get("bias_alone") or {}
        means = []
        for key in ("distance", "near", "beyond"):
            own = list((numbers.get(key) or {}).values())
            bias = f" ({alone[key]:.3g})" if key in alone else ""
            means.append(f"{sum(own) / len(own):.3g}{bias}" if own else "-")
        spread = [f"{min(v):.3g}, {median(v):.3g}, {max(v):.3g}" for v in values]
        return [*means, *spread, f"{point['sink_rate']:.2f}"]

    note = (
        "First the means over heads and seeds; in brackets what the bias alone does, with queries of zero. near: "
        "weight of the last L/8 keys, beyond: of keys at a distance of L or more. Then minimum, median and "
        "maximum over the heads of the first seed. Sink rate: share of heads, over all seeds, that give the first "
        "token more than 0.3 of their weight. Queries of the second half of each window."
    )
    of_heads = ["distance of heads", "entropy in nats", "weight of first token", "sink rate"]
    table = _by_point(found, ["mean distance", "near", "beyond", *of_heads], row)
    return replace(table, notes=[note, *table.notes])


def _by_point(
    found: Analysis, head: list[str], row: Callable[[Mapping[str, Any]], list[str]], at: str = "length"
) -> Table:
    """One row for each curve and point; for a point without a value, the reason."""
    reasons: list[str] = []
    body = []
    for series in found.series:
        for point in series.points:
            first = [series.name, str(series.train_length), *([str(point[at])] if at else [])]
            why = point.get("reason")
            body.append([*first, *([f"- {refer(why, reasons)}"] * len(head) if why else row(point))])
    return Table(["scheme", "trained at", *([at] if at else []), *head], body, 1, numbered(reasons))
