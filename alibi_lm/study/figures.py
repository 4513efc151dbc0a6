"""Figures from result rows and analyses alone; the same files always give the same bytes.

One figure per view (split, mode, stride, task), one panel for each training length that two or more curves share,
one line per scheme. Where the range is so wide that the close lines would fall together, a panel comes twice: the
whole range on a log axis, and a close-up on a linear one.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alibi_lm.files import write_text
from alibi_lm.results.curves import Curve, View, baselines, curves, views
from alibi_lm.results.rows import ResultRow, read_rows
from alibi_lm.results.statistics import wilson_interval
from alibi_lm.study.analysis import TERM_NAMES, TITLES, Analysis, Series, read_analysis
from alibi_lm.study.fairness import Difference, differences
from alibi_lm.study.paper import paper_curves
from alibi_lm.study.plots import SOFT, Line, Panel, build, dress, fits, grid, save, say
from alibi_lm.study.records import find_records, recipes
from alibi_lm.study.style import look
from alibi_lm.study.tables import analysis_markdown, markdown, provenance

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CLOSE_UP_FROM = 2.0
"""Highest over lowest perplexity in a panel from which a close-up may be drawn beside it."""
COMPANY = 1.5
"""A close-up shows the curves whose best value up to the training length is at most this factor above the best."""
TERM_COLORS = {"early_tokens": "#56B4E9", "positions_beyond": "#CC79A7", "keys_beyond": "#E69F00"}


def draw(folder: str | os.PathLike[str], with_paper: bool = False, strict: bool = False) -> list[Path]:
    """Draw every figure of a folder of results and write its Markdown table.

    The first view (validation, nonoverlapping, where present) is `extrapolation.png` and `.svg`; each further
    one has its view in the name. `table.md` has them all.

    Args:
        folder: holds `results.jsonl`.
        with_paper: draw the paper's curves dotted where it has the same scheme and training length.
        strict: refuse to draw runs that differ in more than the scheme.

    Returns:
        The files written.

    Raises:
        ValueError: no rows, damaged rows, or `strict` and an unfair comparison.
    """
    folder = Path(folder)
    rows = read_rows(folder / "results.jsonl")
    found = views(rows)
    if not found:
        raise ValueError(f"{folder / 'results.jsonl'} holds no row of a run; evaluate at least one run first")
    unfair = differences(rows, folder)
    if strict and any(item.matters for item in unfair):
        lines = "\n".join(f"  {item.sentence}" for item in unfair if item.matters)
        raise ValueError(f"strict = true, and the runs differ in more than the scheme:\n{lines}")
    words = recipes(rows, find_records(rows, folder))
    written = []
    for index, view in enumerate(found):
        name = "extrapolation" if index == 0 else f"extrapolation_{view.slug}"
        figure = curve_figure(rows, view, words, unfair, with_paper)
        for suffix in ("png", "svg"):
            written.append(folder / f"{name}.{suffix}")
            save(figure, written[-1])
    table = folder / "table.md"
    write_text(table, markdown(rows, words, unfair))
    return [*written, table]


def curve_figure(
    rows: Sequence[ResultRow],
    view: View,
    words: Mapping[str, str] | None = None,
    unfair: Sequence[Difference] = (),
    with_paper: bool = False,
) -> Figure:
    """The figure of one view.

    Args:
        rows: of one experiment.
        view: which of them.
        words: recipes of the runs, see `alibi_lm.study.records.recipes`.
        unfair: differences to mark.
        with_paper: add the paper's curves, dotted.
    """
    found = curves(rows, view, words)
    base = baselines(rows, view)
    cells: list[list[Panel | None]] = []
    for train_length, members in split_into_panels(found):
        dotted = paper_curves(members, view) if with_paper else []
        cells.append(curve_panels(members, train_length, base, dotted))
    few = max((len(line.x) for pair in cells for p in pair if p for line in p.lines), default=0) <= 2
    if len(cells) == 1:
        layout: list[list[Any]] = [[cell for cell in cells[0] if cell is not None]]
    else:
        layout = []
        for start in range(0, len(cells), 3):
            part = cells[start : start + 3]
            layout += [list(row) for row in zip(*part, strict=True) if any(row)]
    marks = [f"NOT A FAIR COMPARISON: {item.sentence}" for item in unfair if item.matters]
    remarks = missing(found)
    if any(line.ring for pair in cells for p in pair if p for line in p.lines):
        remarks.append("Ring: the length that a curve was trained at.")
    shown = {name for pair in cells for panel in pair if panel for name in panel.levels}
    remarks += [
        f"Out of range: {name} baseline, {value:.4g}." for name, value in base.items() if name not in shown
    ]
    what = "Perplexity" if view.metric == "perplexity" else f"{view.metric.capitalize()} of {view.task}"
    origin = f"{view.title}; {provenance(rows, view)}"
    size = (2.4 if few else 3.6, 3.1)
    return build(f"{what} by inference length", layout, origin, remarks, marks, size)


def split_into_panels(found: Sequence[Curve]) -> list[tuple[int | None, list[Curve]]]:
    """Training lengths that two or more curves share have a panel each: (training length, its curves).

    Any other curve is drawn with the nearest longer training length (ALiBi trained at L/2 beside the schemes
    trained at L), else with the longest. Where no length is shared, all curves have one panel.
    """
    shared, homes = homes_of([curve.train_length for curve in found])
    if not shared:
        lengths = {curve.train_length for curve in found}
        return [(lengths.pop() if len(lengths) == 1 else None, list(found))]
    return [(s, [c for c, home in zip(found, homes, strict=True) if home == s]) for s in shared]


def homes_of(train_lengths: Sequence[int]) -> tuple[list[int], list[int]]:
    """Training lengths that occur twice or more, and for each given one that of them which it is drawn with."""
    shared = sorted({n for n in train_lengths if train_lengths.count(n) > 1})
    homes = [min((s for s in shared if s >= n), default=shared[-1]) for n in train_lengths] if shared else []
    return shared, homes


def curve_panels(
    found: Sequence[Curve], train_length: int | None, base: Mapping[str, float], dotted: Sequence[Curve] = ()
) -> list[Panel | None]:
    """The whole range of these curves and, where it helps, a close-up beside it."""
    drawn = [curve for curve in found if curve.lengths]
    metric = found[0].metric if found else "perplexity"
    every = {n for curve in drawn for n in curve.lengths}
    lines = [_line(curve, train_length, every) for curve in drawn]
    trained = f"trained at {train_length}" if train_length is not None else "several training lengths"
    close = close_up(drawn)
    y_label = "perplexity per token" if metric == "perplexity" else metric
    published = [_line(curve, train_length, every) for curve in dotted]
    panel = functools.partial(Panel, lines, trained=train_length, y_label=y_label, dotted=published)
    if metric == "accuracy":
        return [panel(trained, limits=(-0.03, 1.03), levels=dict(base)), None]
    log_y = _range(drawn) > CLOSE_UP_FROM and metric == "perplexity"
    whole = panel(trained + (", whole range" if close else ""), log_y=log_y)
    whole = replace(whole, levels={name: value for name, value in base.items() if fits(whole, value)})
    if close is None:
        return [whole, None]
    above = [line.name for line in lines if min(line.y) > close[1]]
    words = f"; above it: {', '.join(above) if len(above) <= 3 else f'{len(above)} curves'}" if above else ""
    return [whole, panel(f"{trained}, close-up{words}", limits=close)]


def close_up(found: Sequence[Curve]) -> tuple[float, float] | None:
    """The y axis of a close-up: what the good curves do up to their training length, and how low they get.

    None where one axis shows that as well: the whole range is small, or the close-up would span most of it.
    """
    if not found or found[0].metric != "perplexity" or _range(found) <= CLOSE_UP_FROM:
        return None
    near = {
        id(c): [c.value(n) for n in c.lengths if n <= c.train_length] or [c.value(c.lengths[0])] for c in found
    }
    best = min(min(values) for values in near.values())
    company = [curve for curve in found if min(near[id(curve)]) <= COMPANY * best]
    low = min(_singles(company))
    high = max(v for curve in company for v in near[id(curve)] if v <= COMPANY * best) * 1.06
    values = [curve.value(n) for curve in found for n in curve.lengths]
    if math.log(high / low) > 0.6 * math.log(max(values) / min(values)):
        return None
    room = 0.06 * (high - low)
    return low - room, high + room


def missing(found: Sequence[Curve]) -> list[str]:
    """Why points are not drawn, a line for each reason: no value, or no measurement at that length."""
    reasons: dict[str, list[tuple[Curve, int]]] = {}
    for curve in found:
        for length, reason in sorted(curve.refused.items()):
            reasons.setdefault(reason, []).append((curve, length))
    several = len({curve.train_length for curve in found}) > 1
    lines = []
    for reason, points in reasons.items():
        names = list(dict.fromkeys(_name(curve, several) for curve, _ in points))
        who = ", ".join(names) if len(names) <= 3 else f"{len(names)} curves"
        lengths = sorted({length for _, length in points})
        at = f"from {lengths[0]} on" if len(lengths) > 2 else "at " + " and ".join(map(str, lengths))
        partly = any(length in curve.losses for curve, length in points)
        lines.append(f"{'A run is missing' if partly else 'Not drawn'}: {who} {at}: {reason}.")
    return lines


def _line(curve: Curve, train_length: int | None, every: set[int]) -> Line:
    x = curve.lengths
    y = [curve.value(n) for n in x]
    guest = train_length is not None and curve.train_length != train_length
    ends = any(n > x[-1] for n in curve.refused if n in every)
    notes = [curve.variant] if curve.variant else []
    notes += [f"ends at {x[-1]}"] if ends else []
    if len(every) <= 2:  # too few points for a shape, so the numbers are there
        notes.append(" to ".join(f"{value:.4g}" for value in y))
    several = max(len(runs) for runs in curve.losses.values()) > 1
    low, high = [], []
    if curve.metric == "accuracy" and not several:
        ends_of = [wilson_interval(value, curve.items[n]) for n, value in zip(x, y, strict=True)]
        low, high = [a for a, _ in ends_of], [b for _, b in ends_of]
    elsewhere = curve.train_length in curve.losses and curve.train_length != train_length
    return Line(
        curve.position,
        _name(curve, guest or train_length is None, False),
        [float(n) for n in x],
        y,
        "; ".join(notes),
        low,
        high,
        [(n, curve.shown(v)) for n in x for v in curve.losses[n].values()] if several else [],
        guest or bool(curve.variant),
        (curve.train_length, curve.value(curve.train_length)) if elsewhere else None,
        ends,
    )


def _name(curve: Curve, with_length: bool, with_variant: bool = True) -> str:
    name = look(curve.position).name + (f" L={curve.train_length}" if with_length else "")
    return f"{name} ({curve.variant})" if with_variant and curve.variant else name


def _singles(found: Sequence[Curve]) -> list[float]:
    return [curve.shown(v) for curve in found for runs in curve.losses.values() for v in runs.values()]


def _range(found: Sequence[Curve]) -> float:
    values = [curve.value(n) for curve in found for n in curve.lengths]
    return max(values) / min(values) if values and min(values) > 0 else 1.0


def draw_analysis(path: str | Path) -> list[Path]:
    """Draw the figure of `<view>.json` and write its table beside it.

    Returns:
        The files written: `<view>.png`, `<view>.svg` and `<view>.md`.

    Raises:
        ValueError: no such file, or not one of ours.
    """
    path = Path(path)
    found = read_analysis(path)
    figure = analysis_figure(found)
    written = [path.with_suffix(suffix) for suffix in (".png", ".svg")]
    for target in written:
        save(figure, target)
    table = path.with_suffix(".md")
    write_text(table, analysis_markdown(found))
    return [*written, table]


def analysis_figure(found: Analysis) -> Figure:
    """The figure of one view."""
    marks = [] if found.same_text else ["NOT THE SAME TEXT: levels cannot be compared between curves"]
    remarks: list[str] = []
    size = (3.6, 3.1)
    if found.view in ("documents", "decomposition"):
        # What has nothing to show is told in words.
        shown = [s for s in found.series if any(not p.get("reason") for p in s.points[-1:])] or found.series
        panel = decomposition_panel if found.view == "decomposition" else documents_panel
        cells: list[Any] = [functools.partial(panel, series=series) for series in shown]
        size = (2.7, 2.3)
        if found.view == "decomposition":
            remarks.append(
                "Bars from left to right: early tokens (blue), positions beyond L (pink), keys further than L "
                "(orange); diamond: their total. Left: nats per token, right: factor of perplexity; each panel "
                "has its own scale."
            )
    elif found.view == "position":
        cells = list(position_panels(found))
        size = (2.9, 2.3)
        remarks.append("Each panel has one curve with its intervals; the grey lines are the others.")
    else:
        cells = list(view_panels(found))
        if found.view != "offset":
            remarks.append("An interval that leaves its panel is in the table.")
    reasons: dict[str, list[str]] = {}
    for series in found.series:
        for reason in {str(p["reason"]) for p in series.points if p.get("reason")}:
            reasons.setdefault(reason, []).append(series.name)
    remarks += [
        f"Without a value at some lengths: {', '.join(who)}: {why}." for why, who in sorted(reasons.items())
    ]
    return build(
        TITLES[found.view], grid(cells, min(len(cells), _columns(cells))), found.provenance, remarks, marks, size
    )


def _columns(cells: Sequence[Any]) -> int:
    return 2 if len(cells) in (2, 4) else 3


def view_panels(found: Analysis) -> list[Panel]:
    """A panel for each training length that curves share, twice where the close lines would fall together."""
    shared, homes = homes_of([s.train_length for s in found.series])
    if not shared:
        shared = [max(s.train_length for s in found.series)]
        homes = shared * len(found.series)
    panels = []
    for length in shared:
        members = [s for s, home in zip(found.series, homes, strict=True) if home == length]
        lines = [line for s in members for line in VIEW_LINES[found.view](s, s.train_length != length)]
        lines = [line for line in lines if line.x]
        panel = functools.partial(
            Panel, lines=lines, trained=length, x_label=_X_NAMES.get(found.view, Panel.x_label)
        )
        title = f"trained at {length}"
        if found.view == "offset":
            y_label = "change of the mean loss, nats per token"
            panels.append(panel(title=title, y_label=y_label, symlog=True, zero=True))
            continue
        values = [v for line in lines for v in line.y]
        wide = bool(values) and max(values) / min(values) > CLOSE_UP_FROM
        panels.append(panel(title=title, log_y=bool(values) and max(values) / min(values) > 1.5))
        close = close_lines(lines, length) if wide else []
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
            markers=False,
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
        look(series.position).name + (f" L={series.train_length}" if guest else ""),
        [float(p[at]) for p in points],
        [unit(p["nats"]) for p in points],
        series.variant,
        [low for low, _ in ends] if known else [],
        [high for _, high in ends] if known else [],
        stray=guest or bool(series.variant),
    )


def _interval(point: Mapping[str, Any]) -> tuple[float, float]:
    """Interval of the difference from the trained length, around the point; nothing where there is none."""
    known = point.get("difference", point if "offset" in point else None)
    if known is None or known["low"] is None:
        return point["nats"], point["nats"]
    return point["nats"] + known["low"] - known["nats"], point["nats"] + known["high"] - known["nats"]


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))


def _perplexity_lines(series: Series, guest: bool) -> list[Line]:
    lines = []
    for mode in ("nonoverlapping", "sliding"):
        line = _view_line(series, guest, "length", [p for p in series.points if p["mode"] == mode], _exp)
        if line.x and mode == "sliding":
            line = replace(line, note="; ".join(filter(None, [line.note, "sliding"])), stray=True)
        lines.append(line)
    return lines


VIEW_LINES: dict[str, Callable[[Series, bool], list[Line]]] = {
    "perplexity": _perplexity_lines,
    "last": lambda s, guest: [_view_line(s, guest, "length", s.points, _exp)],
    "fixed": lambda s, guest: [_view_line(s, guest, "context", s.points, _exp)],
    "offset": lambda s, guest: [_view_line(s, guest, "offset", s.points, float)],
}
_X_NAMES = {
    "position": "position in the window = tokens of context, log axis",
    "fixed": "tokens of context of every target, log axis",
    "offset": "position of the first token",
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
        say(axis, next((p["reason"] for p in series.points if p.get("reason")), "no length beyond L"))
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
    factor.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"x{math.exp(min(v, 700)):.3g}"))
    factor.tick_params(labelsize=7, length=2, colors=SOFT)
    factor.spines["right"].set_visible(False)


def documents_panel(axis: Axes, series: Series) -> None:
    """Each document's mean loss at the longest length against that at the trained length."""
    dress(axis, f"{series.name}, L = {series.train_length}", look(series.position).color)
    known = [p for p in series.points if p["nats"] is not None]
    base = next((p for p in known if p["length"] == series.train_length), None)
    far = max(known, key=lambda p: p["length"], default=None)
    if base is None or far is None or far is base:
        refused = [p["reason"] for p in series.points if p.get("reason")]
        say(axis, refused[0] if refused else "no value at the trained length and beyond")
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
