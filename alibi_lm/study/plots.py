"""Drawing charts: lines in panels, names at their ends, whiskers for intervals, one layout for all figures."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alibi_lm.files import whole_file
from alibi_lm.study.labels import Label, note_lines, write_labels
from alibi_lm.study.style import look, room_for_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GRID, SOFT, RED = "#E4E4E4", "#777777", "#B00020"
DOTS = 160
"""Resolution of PNG files, in dots per inch."""
PAPER_DASHES = (1.0, 1.6)
MOST_WHISKERS = 12
"""With more lines than this in a panel, whiskers would hide them."""
COINCIDE = 0.012
"""Lines closer than this share of a panel's height hide each other, so the lower one is drawn wider."""
RC: dict[Any, Any] = {
    "svg.hashsalt": "alibi_lm",  # ids in the SVG would otherwise be random
    "svg.fonttype": "path",  # the same picture on machines without the font
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "axes.linewidth": 0.7,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
}
"""Settings of matplotlib for every figure."""


@dataclass(frozen=True)
class Line:
    """One line of a panel, in the units drawn."""

    position: str
    """Scheme, which determines colour, marker and dashes."""
    name: str
    x: list[float]
    y: list[float]
    note: str = ""
    """Small text under the name."""
    low: list[float] = field(default_factory=list)
    """Lower ends of the intervals, one per point; or empty."""
    high: list[float] = field(default_factory=list)
    dots: list[tuple[float, float]] = field(default_factory=list)
    """Single runs behind the line."""
    stray: bool = False
    """Drawn thin with hollow markers: trained at another length than the panel's, or with other settings."""
    ring: tuple[float, float] | None = None
    """The point at its training length, if that is not the panel's."""
    ends: bool = False
    """Whether the scheme has no value beyond its last point."""
    apart: list[tuple[float, float]] = field(default_factory=list)
    """Points of another kind, drawn separately from the line."""


@dataclass(frozen=True)
class Panel:
    """One chart."""

    lines: list[Line]
    title: str = ""
    x_label: str = "inference length in tokens, log axis"
    y_label: str = "perplexity per token"
    trained: int | None = None
    """Training length, marked by a vertical line; None if the lines have several, each marked by a ring."""
    log_y: bool = False
    limits: tuple[float, float] | None = None
    """Limits of the y axis; None: all lines and dots, and whiskers as far as the lines stay readable."""
    band: bool = False
    """Fill between low and high, without markers; for a panel with one line that has them."""
    levels: dict[str, float] = field(default_factory=dict)
    """Horizontal lines by name, such as `unigram` or `unigram (name of its text)`."""
    dotted: list[Line] = field(default_factory=list)
    """Published curves."""
    behind: list[Line] = field(default_factory=list)
    """Other lines, thin and grey."""
    tick_points: bool = False
    """Put ticks of the x axis at the points instead of powers of two."""
    zero: bool = False
    """Changes relative to x = 0: both axes have a 0, and that of y is marked."""

    @property
    def crowded(self) -> bool:
        """Whether too many lines have intervals for these to be drawn."""
        return sum(bool(line.low) for line in self.lines) > MOST_WHISKERS


def draw_panel(axis: Axes, panel: Panel) -> None:
    """Draw one chart into empty axes."""
    lines = [replace(line, low=[], high=[]) if panel.crowded else line for line in panel.lines if line.x]
    if not lines:
        say(axis, "no scheme here has a value")
        return
    dress(axis, panel.title)
    _x_axis(axis, panel, lines)
    axis.set_ylim(*(panel.limits or limits_of(panel, lines)))
    if panel.log_y:
        axis.set_yscale("log")
    labels: list[Label] = []
    ordered = sorted(lines, key=lambda line: line.position == "alibi")  # ALiBi on top of the others
    spans = [line for line in ordered if line.low and not panel.band]
    apart = beside(len(spans))
    for grey in panel.behind:
        axis.plot(grey.x, grey.y, color="#BBBBBB", linewidth=0.7, zorder=1)
    under = hidden_under(ordered, axis.get_ylim(), panel.log_y)
    step = min(1.0, 2 / max([*under, 1]))  # if many lines coincide, the lowest does not get too wide
    for line, wider in zip(ordered, (count * step for count in under), strict=True):
        shift = (spans.index(line) - (len(spans) - 1) / 2) * apart if line in spans else 0.0
        _draw(axis, panel, line, wider, 0.0 if panel.zero else shift)
        if line.name and axis.get_ylim()[0] <= line.y[-1] <= axis.get_ylim()[1]:
            labels.append(Label(line.x[-1], line.y[-1], line.name, look(line.position).color, line.note))
    for line in panel.dotted:
        axis.plot(line.x, line.y, color=look(line.position).color, linewidth=1.2, dashes=PAPER_DASHES, zorder=2)
    if panel.zero:
        axis.axhline(0, color="#999999", linewidth=0.9, zorder=1)
    _levels(axis, panel, labels)
    _y_ticks(axis, panel.log_y)
    write_labels(axis, labels)
    axis.set_ylabel(panel.y_label + (", log axis" if panel.log_y else ""), fontsize=8.5)
    axis.set_xlabel(panel.x_label, fontsize=8.5, labelpad=1)


def beside(count: int) -> float:
    """How far lines with whiskers are shifted from each other, in octaves: all of them by 0.3 at most."""
    return min(0.05, 0.3 / max(count, 1))


def limits_of(panel: Panel, lines: Sequence[Line]) -> tuple[float, float]:
    """The ends of the y axis: all values, and whiskers as long as they at most triple the height."""
    to, back = (math.log, math.exp) if panel.log_y else (float, float)
    values = [to(v) for line in lines for v in [*line.y, *(y for _, y in [*line.dots, *line.apart])]]
    low, high = min(values), max(values)
    ends = [
        (to(a), to(b))
        for line in lines
        for a, b in zip(line.low, line.high, strict=True)
        if a > 0 or not panel.log_y
    ]
    widths = sorted(b - a for a, b in ends)
    room = math.inf if panel.zero else max(high - low, widths[len(widths) // 2] if widths else 0.0)
    low = max(min([low, *(a for a, _ in ends)]), low - room)
    high = min(max([high, *(b for _, b in ends)]), high + room)
    edge = 0.06 * (high - low) or abs(0.05 * high) or 1e-3
    if panel.zero:  # keep rounding errors small in the panel
        low, high = min(low, -1e-3), max(high, 1e-3)
    return back(low - edge), back(high + edge)


def hidden_under(lines: Sequence[Line], limits: tuple[float, float], log_y: bool) -> list[int]:
    """How many later lines of other schemes cover each line over its whole length.

    Such a line is drawn wider, so that it can be seen on both sides of the lines that cover it.
    """
    to = math.log if log_y else float
    span = to(limits[1]) - to(limits[0])

    def covers(upper: Line, lower: Line) -> bool:
        at = dict(zip(upper.x, upper.y, strict=True))
        return upper.position != lower.position and all(
            x in at and abs(to(at[x]) - to(y)) < COINCIDE * span for x, y in zip(lower.x, lower.y, strict=True)
        )

    return [sum(covers(upper, lower) for upper in lines[i + 1 :]) for i, lower in enumerate(lines)]


def _draw(axis: Axes, panel: Panel, line: Line, wider: float, shift: float) -> None:
    style = look(line.position)
    x = [v * 2**shift for v in line.x]
    faint = line.stray
    dashes: dict[str, Any] = {"dashes": style.dashes} if style.dashes and not wider else {}
    axis.plot(
        x,
        line.y,
        color=style.color,
        linewidth=(1.2 if faint else 1.9) + 3 * wider,
        alpha=0.55 if wider else 1,
        marker="" if panel.band else style.marker,
        markevery=spaced(line.x) if not panel.zero else None,
        markersize=(6.4 if style.marker in "XP*" else 5.2) + 4 * wider,
        markeredgewidth=1.1 if faint else 0.6,
        markerfacecolor="white" if faint else style.color,
        markeredgecolor=style.color if faint else "white",
        zorder=4 - 0.1 * wider,
        **dashes,
    )
    if line.dots:
        dots = [(v * 2**shift, y) for v, y in line.dots]
        axis.plot(*zip(*dots, strict=True), ".", color=style.color, markersize=3, alpha=0.45, zorder=3)
    if panel.band:
        axis.fill_between(x, line.low, line.high, color=style.color, alpha=0.16, linewidth=0, zorder=2)
    elif line.low:
        pairs = zip(line.low, line.high, line.y, strict=True)
        lengths = [(y - low, high - y) for low, high, y in pairs]
        below, above = ([max(0.0, pair[k]) for pair in lengths] for k in (0, 1))
        axis.errorbar(
            x, line.y, [below, above], fmt="none", ecolor=style.color, elinewidth=0.9, capsize=2, zorder=3
        )
    if line.ring is not None:
        axis.plot(*([v] for v in line.ring), "o", markersize=10, mfc="none", mec=style.color, mew=0.9, zorder=5)
    if line.apart:
        axis.plot(*zip(*line.apart, strict=True), "*", color=style.color, markersize=10, mec="white", zorder=5)
    if line.ends:
        axis.plot(x[-1:], line.y[-1:], "|", color=style.color, markersize=13, markeredgewidth=1.6, zorder=5)


def dress(axis: Axes, title: str, color: str = "#333333") -> None:
    """Grid, small ticks, two spines and the title of a panel."""
    axis.set_title(title, fontsize=9, loc="left", color=color)
    axis.grid(True, color=GRID, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=8, length=3)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def say(axis: Axes, words: str) -> None:
    """Write words instead of a chart."""
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_visible(False)
    text = textwrap.fill(words, 34)
    axis.text(0.5, 0.5, text, transform=axis.transAxes, ha="center", va="center", fontsize=8, color=SOFT)


def _x_axis(axis: Axes, panel: Panel, lines: Sequence[Line]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    places = sorted({x for line in [*lines, *panel.behind] for x in line.x})
    trained, apart = panel.trained, sorted({x for line in lines for x, _ in line.apart})
    if panel.zero:
        axis.set_xscale("symlog", base=2, linthresh=places[1] if len(places) > 1 else 1)
        ticks = places
    else:
        axis.set_xscale("log", base=2)
        count = 0 if panel.band else sum(bool(line.low) for line in lines)
        pad = 2 ** (max(0.03 * math.log2(places[-1] / places[0]), 0.06) + count * beside(count) / 2)
        axis.set_xlim(places[0] / pad, max([places[-1], *apart]) * pad)
        # Lengths are whole; keys held are means, which need rounder ticks.
        anchor = trained or (places[0] if places[0] == int(places[0]) else 1)
        ticks = places if panel.tick_points else length_ticks(places[0], places[-1], anchor)
        ticks = [*ticks, *apart]
    axis.xaxis.set_major_locator(FixedLocator(ticks))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}" + ("\n(trained)" if v == trained else "")))
    if trained is not None and (panel.zero or axis.get_xlim()[0] <= trained <= axis.get_xlim()[1]):
        axis.axvline(trained, color="#999999", linewidth=0.9, dashes=(3, 2), zorder=1)


def _y_ticks(axis: Axes, log_y: bool) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

    low, high = axis.get_ylim()
    if not log_y:
        axis.yaxis.set_major_locator(MaxNLocator(7))
    elif high / low < 8:  # powers of ten would leave one tick or none
        axis.yaxis.set_major_locator(FixedLocator([v for v in MaxNLocator(7).tick_values(low, high) if v > 0]))
    else:
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1e4 else (1,), numticks=12))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(
        FuncFormatter(lambda v, _: f"{v:g}" if v < 1e5 else f"{v:.0e}".replace("e+0", "e"))
    )


def length_ticks(first: float, last: float, anchor: float) -> list[float]:
    """Tick positions: the anchor times powers of two, thinned to at most nine."""
    low = math.ceil(math.log2(first / anchor) - 1e-9)
    high = math.floor(math.log2(last / anchor) + 1e-9)
    if high <= low:  # less than an octave: the two ends say more than one power of two
        return sorted({float(first), float(last)})
    step = math.ceil((high - low + 1) / 9)
    return [anchor * 2.0**k for k in range(low, high + 1) if k % step == 0]


def spaced(lengths: Sequence[float]) -> list[int]:
    """Indices of points that are far enough apart for markers (about a dozen per axis)."""
    span = math.log(lengths[-1] / lengths[0]) or 1.0
    kept = [0]
    for index in range(1, len(lengths)):
        if math.log(lengths[index] / lengths[kept[-1]]) >= span / 12:
            kept.append(index)
    return kept


def _levels(axis: Axes, panel: Panel, labels: list[Label]) -> None:
    for name, value in sorted(panel.levels.items()):
        low, high = axis.get_ylim()
        if value > high:
            axis.set_ylim(low, value * 1.08)
        axis.axhline(value, color="#AAAAAA", linewidth=0.9, zorder=1)
        what, _, text = name.partition(" (")
        labels.append(Label(axis.get_xlim()[1], value, f"{what} baseline", SOFT, text.removesuffix(")")))


def fits(panel: Panel, value: float) -> bool:
    """Whether a horizontal line fits without squeezing the curves, as one far above them would."""
    lines = [replace(line, low=[], high=[]) if panel.crowded else line for line in panel.lines if line.x]
    if not lines:
        return False
    low, high = panel.limits or limits_of(panel, lines)
    return low <= value <= (high * (high / low) ** 0.35 if panel.log_y else high)


Cell = Panel | Callable[["Axes"], None] | None
"""A chart, a function that draws into axes, or an empty place."""


def build(
    title: str,
    rows: Sequence[Sequence[Cell]],
    origin: str,
    remarks: Sequence[str] = (),
    marks: Sequence[str] = (),
    size: tuple[float, float] = (3.6, 3.1),
) -> Figure:
    """A figure: its head, then a grid of cells.

    Args:
        title: in bold.
        rows: cells by row.
        origin: source of the numbers, in small text.
        remarks: what is not drawn and why, and explanations of symbols.
        marks: what makes the comparison unfair, in red.
        size: width and height of a chart in inches, without its labels.
    """
    import matplotlib
    from matplotlib.figure import Figure

    columns = max(len(row) for row in rows)
    panels = [cell for row in rows for cell in row if isinstance(cell, Panel)]
    names = [len(t) for panel in panels for line in panel.lines for t in (line.name, *note_lines(line.note))]
    names += [min(26, len(name) + 9) for panel in panels for name in panel.levels]
    right = 0.4 + 0.062 * max([*names, 4]) if panels else 0.75
    beside, below = 0.55, 0.95
    # A slot of ten points in height for each label and line of small text.
    slots = max(
        [sum(1 + len(note_lines(line.note)) for line in p.lines) + 3 * len(p.levels) for p in panels] or [0]
    )
    chart = (size[0], max(size[1], slots * 10.5 / 72))
    width = 0.62 + columns * (chart[0] + right) + (columns - 1) * beside
    characters = int((width - 0.32) / 0.066)
    head = [(line, "#555555") for line in textwrap.wrap(origin, characters)]
    head += [(line, SOFT) for remark in _some(remarks) for line in textwrap.wrap(remark, characters)]
    head += [(line, RED) for mark in _some(marks) for line in textwrap.wrap(mark, characters, max_lines=2)]
    top = 0.42 + 0.16 * len(head) + 0.36
    height = top + len(rows) * chart[1] + (len(rows) - 1) * below + 0.58
    with matplotlib.rc_context(RC):
        figure, placed = Figure(figsize=(width, height), facecolor="white"), []
        for r, row in enumerate(rows):
            for c, cell in ((c, cell) for c, cell in enumerate(row) if cell is not None):
                bottom = (height - top - chart[1] - r * (chart[1] + below)) / height
                axis = figure.add_axes((0, bottom, 1, chart[1] / height))
                placed.append((axis, c, bottom))
                draw_panel(axis, cell) if isinstance(cell, Panel) else cell(axis)
        room = room_for_ticks(axis for axis, *_ in placed)
        width += columns * room
        figure.set_size_inches(width, height)
        for axis, c, bottom in placed:
            left = 0.62 + room + c * (chart[0] + right + beside + room)
            axis.set_position((left / width, bottom, chart[0] / width, chart[1] / height))
        left = 0.16 / width
        figure.text(left, 1 - 0.12 / height, title, va="top", fontsize=12, fontweight="bold")
        for index, (line, color) in enumerate(head):
            figure.text(left, 1 - (0.37 + 0.16 * index) / height, line, va="top", fontsize=8, color=color)
    return figure


def grid(cells: Sequence[Cell], columns: int) -> list[list[Cell]]:
    """Cells in rows of equal length."""
    padded = [*cells, *[None] * (-len(cells) % columns)]
    return [list(padded[start : start + columns]) for start in range(0, len(padded), columns)]


def _some(lines: Sequence[str]) -> list[str]:
    return list(lines) if len(lines) <= 4 else [*lines[:3], f"and {len(lines) - 3} more (see the table)"]


def save_both(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write `<name>.png` and `<name>.svg`; returns their paths."""
    for path in (paths := [folder / f"{name}.png", folder / f"{name}.svg"]):
        save(figure, path)
    return paths


def save(figure: Figure, path: Path, colors: int | None = None) -> None:
    """Write a PNG or SVG, as its suffix says, atomically; the same figure gives the same bytes.

    Args:
        figure: from `build`.
        path: file to write.
        colors: number of colours of a PNG; 64 are enough for lines, and make its file a third as large. None: all.
    """
    import matplotlib
    from PIL import Image

    # Without dates and versions, the same rows give the same file.
    metadata = {"Date": None, "Creator": None} if path.suffix == ".svg" else {"Software": None}
    with whole_file(path) as file, matplotlib.rc_context(RC):
        if colors is None:
            figure.savefig(file, format=path.suffix[1:], dpi=DOTS, metadata=metadata)
        else:
            figure.savefig(drawn := io.BytesIO(), format="png", dpi=DOTS)
            few = Image.open(drawn).convert("RGB").quantize(colors, dither=Image.Dither.NONE)
            few.save(file, "PNG", optimize=True, dpi=(DOTS, DOTS))
