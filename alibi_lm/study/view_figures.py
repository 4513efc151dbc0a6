"""Figures of the views that look inside an extrapolation curve, drawn from `<view>.json`."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alibi_lm.files import write_text
from alibi_lm.study.analysis import AT, TERM_NAMES, TITLES, Analysis, Series, perplexity, read_analysis, times
from alibi_lm.study.context_figures import (
    ATTENTION_NOTE,
    attention_cells,
    attention_table,
    effective_note,
    repeat_panel,
)
from alibi_lm.study.figures import CLOSE_UP_FROM, COMPANY, homes_of
from alibi_lm.study.plots import SOFT, Line, Panel, build, dress, grid, save_both, say
from alibi_lm.study.style import label, look
from alibi_lm.study.tables import analysis_markdown
from alibi_lm.study.window_figures import window_panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TERM_COLORS = {"early_tokens": "#56B4E9", "positions_beyond": "#CC79A7", "keys_beyond": "#E69F00"}


def draw_analysis(path: str | Path) -> list[Path]:
    """Draw the figure of `<view>.json` beside it: `<view>.png`, `<view>.svg`, and its table `<view>.md`.

    Raises:
        ValueError: no such file, or not one of ours.
    """
    path = Path(path)
    found = read_analysis(path)
    drawn = save_both(analysis_figure(found), path.parent, path.stem)
    table = path.with_suffix(".md")
    own = attention_table(found) if found.view == "attention" else None
    write_text(table, analysis_markdown(found, own))
    return [*drawn, table]


def analysis_figure(found: Analysis) -> Figure:
    """The figure of one view."""
    marks = [] if found.same_text else ["NOT THE SAME TEXT: levels cannot be compared between curves"]
    remarks: list[str] = []
    size = (3.6, 3.1)
    if found.view == "windows":
        cells: list[Any] = list(window_panels(found))
        size = (2.9, 2.6)
        remarks.append(
            "Lines: proved by the weights for every input. Crosses: needed on the text (dashed: its end)."
        )
    elif found.view in ("documents", "decomposition"):
        # What has nothing to show is told in words.
        shown = [s for s in found.series if any(not p.get("reason") for p in s.points[-1:])] or found.series
        panel = decomposition_panel if found.view == "decomposition" else documents_panel
        cells = [functools.partial(panel, series=series) for series in shown]
        size = (2.7, 2.3)
        if found.view == "decomposition":
            remarks.append(
                "Bars from left to right: early tokens (blue), positions beyond L (pink), keys further than L "
                "(orange); diamond: their total. Left: nats per token, right: factor of perplexity; each panel "
                "has its own scale."
            )
    elif found.view == "attention":
        rows = attention_cells(found)
        return build(TITLES[found.view], rows, found.provenance, [ATTENTION_NOTE], marks, (2.9, 2.0))
    elif found.view == "position":
        cells = list(position_panels(found))
        size = (2.9, 2.3)
        remarks.append("Each panel has one curve with its intervals; the grey lines are the others.")
    else:
        cells = list(view_panels(found))
        if found.view not in ("offset", "repeat"):
            remarks.append("An interval that leaves its panel is in the table.")
    reasons: dict[str, list[str]] = {}
    for series in found.series:
        for reason in {str(p["reason"]) for p in series.points if p.get("reason")}:
            reasons.setdefault(reason, []).append(series.name)
    for reason, names in sorted(reasons.items()):
        remarks.append(f"Without a value at some lengths: {', '.join(names)}: {reason}.")
    columns = 2 if len(cells) in (2, 4) else min(len(cells), 3)
    return build(TITLES[found.view], grid(cells, columns), found.provenance, remarks, marks, size)


def view_panels(found: Analysis) -> list[Panel]:
    """A panel for each training length that curves share, twice where the close lines would fall together."""
    shared, homes = homes_of([s.train_length for s in found.series])
    if not shared:
        shared = [max(s.train_length for s in found.series)]
        homes = shared * len(found.series)
    panels = []
    for length in shared:
        members = [s for s, home in zip(found.series, homes, strict=True) if home == length]
        lines = [n for s in members for n in view_lines(found.view, s, s.train_length != length) if n.x]
        x_label, title = _X_NAMES.get(found.view, Panel.x_label), f"trained at {length}"
        panel = functools.partial(Panel, lines=lines, trained=length, x_label=x_label)
        if found.view == "repeat":
            panels.append(repeat_panel(found, lines, length))
            continue
        if found.view == "offset":
            y_label = "change of the mean loss, nats per token"
            panels.append(panel(title=title, y_label=y_label, zero=True))
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

    Empty where no line is near the best one at all lengths.
    """
    near = {
        id(line): [v for x, v in zip(line.x, line.y, strict=True) if x <= length] or line.y[:1] for line in lines
    }
    best = min(min(values) for values in near.values())
    found = [line for line in lines if min(near[id(line)]) <= COMPANY * best]
    if not any(max(line.y) <= COMPANY * best for line in found):
        return []
    return [line if max(line.y) <= COMPANY * best else replace(line, low=[], high=[]) for line in found]


def position_panels(found: Analysis) -> list[Panel]:
    """A panel per curve, with its band; the other curves stand behind it in grey. All have the same axes."""
    lines = [(series, line) for series in found.series if (line := _position_line(series)).x]
    values = [v for _, line in lines for v in line.y]
    if not values:
        return [Panel([])]
    room = 0.12 * (max(values) - min(values)) or 0.1
    return [
        Panel(
            [line],
            f"{series.name}, trained at {series.train_length}",
            x_label=_X_NAMES["position"],
            y_label="nats per token",
            trained=series.train_length,
            limits=(min(values) - room, max(values) + room),
            band=True,
            behind=[other for _, other in lines if other is not line],
        )
        for series, line in lines
    ]


def _view_line(
    series: Series, guest: bool, at: str, points: Sequence[dict[str, Any]], unit: Callable[[float], float]
) -> Line:
    points = [p for p in points if p["nats"] is not None]
    ends = [tuple(unit(v) for v in _interval(p)) for p in points]
    known = any(low < high for low, high in ends)
    return Line(
        series.position,
        label(series.position, length=series.train_length if guest else None),
        [float(p[at]) for p in points],
        [unit(p["nats"]) for p in points],
        series.variant,
        [low for low, _ in ends] if known else [],
        [high for _, high in ends] if known else [],
        stray=guest or bool(series.variant),
    )


def _interval(point: Mapping[str, Any]) -> tuple[float, float]:
    """Interval of the difference from the trained length, around the point; nothing where there is none."""
    known = point.get("difference", point if "offset" in point or "distance" in point else None)
    if known is None or known["low"] is None:
        return point["nats"], point["nats"]
    return point["nats"] + known["low"] - known["nats"], point["nats"] + known["high"] - known["nats"]


def view_lines(view: str, series: Series, guest: bool) -> list[Line]:
    """The lines of one series; two where perplexity was measured in both kinds of windows."""
    if view != "perplexity":
        unit = float if view in ("offset", "repeat") else perplexity
        line = _view_line(series, guest, AT.get(view, "length"), series.points, unit)
        note = effective_note(series) if view == "effective_context" else ""
        return [replace(line, note="; ".join(filter(None, [line.note, note])))]
    lines = []
    for mode in ("nonoverlapping", "sliding"):
        line = _view_line(series, guest, "length", [p for p in series.points if p["mode"] == mode], perplexity)
        if mode == "sliding":
            line = replace(line, note="; ".join(filter(None, [line.note, "sliding"])), stray=True)
        lines.append(line)
    return lines


_X_NAMES = {
    "position": "position in the window = tokens of context, log axis",
    "fixed": "tokens of context of every target, log axis",
    "offset": "position of the first token",
    "effective_context": "tokens of context of every target, log axis",
}
_BINS = ("first", "last", "nats", "low", "high")


def _position_line(series: Series) -> Line:
    """Each part of the window from the shortest windows that reach it, where most targets are."""
    bins: list[tuple[int, int, float, float, float]] = []
    for point in sorted((p for p in series.points if p["nats"] is not None), key=lambda p: p["length"]):
        reached = bins[-1][1] if bins else 0
        for first, last, nats, low, high in zip(*(point["curve"][k] for k in _BINS), strict=True):
            if last > reached:
                bins.append((first, last, nats, nats if low is None else low, nats if high is None else high))
    y, low, high = ([values[k] for values in bins] for k in (2, 3, 4))
    x = [math.sqrt(first * last) for first, last, *_ in bins]
    return Line(series.position, "", x, y, "", low, high)  # the panel's title is its name


def decomposition_panel(axis: Axes, series: Series) -> None:
    """Bars of the three parts at each length, and their sum as a diamond; every panel has its own scale."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    dress(axis, f"{series.name}, L = {series.train_length}", look(series.position).color)
    points = [p for p in series.points if p["total"] is not None and p["total"]["nats"] is not None]
    if not points:
        say(axis, series.reason or "no length beyond L")
        return
    axis.grid(visible=False, axis="x")
    axis.axhline(0, color="#555555", linewidth=0.8, zorder=3)
    places = [float(k) for k in range(len(points))]
    for index, (name, color) in enumerate(TERM_COLORS.items()):
        x = [k + (index - 1) * 0.26 for k in places]
        axis.bar(x, [p[name]["nats"] for p in points], width=0.24, color=color, zorder=2, label=TERM_NAMES[name])
        _whiskers(axis, x, [p[name] for p in points])
    # Beside the bars: on the middle one it would hide that one's interval.
    beside = [k + 0.47 for k in places]
    _whiskers(axis, beside, [p["total"] for p in points])
    total = [p["total"]["nats"] for p in points]
    axis.plot(beside, total, "D", color="#222222", markersize=4.5, markerfacecolor="white", zorder=5)
    axis.set_xticks(places, [str(p["length"]) for p in points])
    axis.set_xlim(-0.55, len(points) - 0.25)
    axis.yaxis.set_major_locator(MaxNLocator(6))
    axis.set_xlabel("inference length", fontsize=8, labelpad=1)
    factor = axis.secondary_yaxis("right")
    factor.yaxis.set_major_locator(MaxNLocator(6))
    factor.yaxis.set_major_formatter(FuncFormatter(lambda v, _: times(v)))
    factor.tick_params(labelsize=7, length=2, colors=SOFT)
    factor.spines["right"].set_visible(False)


def documents_panel(axis: Axes, series: Series) -> None:
    """Each document's mean loss at the longest length against that at the trained length."""
    dress(axis, f"{series.name}, L = {series.train_length}", look(series.position).color)
    known = [p for p in series.points if p["nats"] is not None]
    base = next((p for p in known if p["length"] == series.train_length), None)
    far = max(known, key=lambda p: p["length"], default=None)
    if base is None or far is None or far is base:
        say(axis, series.reason or "no value at the trained length and beyond")
        return
    both = zip(base["documents"], far["documents"], strict=True)
    pairs = [(a, b) for a, b in both if a is not None and b is not None]
    x, y = ([pair[k] for pair in pairs] for k in (0, 1))
    axis.scatter(x, y, s=9, color=look(series.position).color, alpha=0.55, linewidth=0, zorder=3)
    low, high = min(map(min, pairs)), max(map(max, pairs))
    room = 0.05 * (high - low) or 0.05
    axis.axline((low, low), slope=1, color="#888888", linewidth=0.8, zorder=2)
    axis.set_xlim(min(x) - room, max(x) + room)
    axis.set_ylim(low - room, max(y) + room)
    words = f"{sum(b > a for a, b in pairs)} of {len(pairs)} above the line: worse"
    axis.text(0.03, 0.97, words, transform=axis.transAxes, va="top", fontsize=7.5, color=SOFT)
    axis.set_xlabel(f"nats per token at {series.train_length} (trained)", fontsize=8, labelpad=1)
    axis.set_ylabel(f"at {far['length']}", fontsize=8, labelpad=2)


def _whiskers(axis: Axes, x: Sequence[float], terms: Sequence[Mapping[str, float]]) -> None:
    for place, term in zip(x, terms, strict=True):
        if term["low"] is not None:
            axis.plot([place, place], [term["low"], term["high"]], color="#333333", linewidth=0.9, zorder=4)
