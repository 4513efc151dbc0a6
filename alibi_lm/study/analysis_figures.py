"""Figures of the views that look inside an extrapolation curve, drawn from `<view>.json` alone."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alibi_lm.files import write_text
from alibi_lm.study.analysis_data import TITLES, Analysis, Series, read_analysis
from alibi_lm.study.analysis_lines import LINES, Line
from alibi_lm.study.analysis_panels import decomposition_key, decomposition_panel, documents_panel
from alibi_lm.study.analysis_tables import markdown
from alibi_lm.study.axes import GRID, SOFT, Label, length_ticks, write_labels
from alibi_lm.study.figures import RC, save
from alibi_lm.study.style import look

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CLOSE_UP_FROM = 1.0  # nats between the worst and the best value from which a close-up is drawn beside it


def draw_analysis(path: str | Path) -> list[Path]:
    """Draw the figure of `<view>.json` and write its table beside it.

    Returns:
        The files written: `<view>.png`, `<view>.svg` and `<view>.md`.

    Raises:
        ValueError: no such file, or not one of ours.
    """
    path = Path(path)
    found = read_analysis(path)
    figure = build_analysis_figure(found)
    written = [path.with_suffix(suffix) for suffix in (".png", ".svg")]
    for target in written:
        save(figure, target)
    table = path.with_suffix(".md")
    write_text(table, markdown(path))
    return [*written, table]


def build_analysis_figure(found: Analysis) -> Figure:
    """The figure of one view."""
    import matplotlib

    with matplotlib.rc_context(RC):
        if found.view in ("documents", "decomposition"):
            return _small_multiples(found)
        return _charts(found)


def _figure(
    found: Analysis, columns: int, rows: int, size: tuple[float, float], right: float, key: float = 0.0
) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    width = 0.75 + columns * (size[0] + right)
    words = textwrap.wrap(found.provenance, int(width * 16.5))
    marks = [] if found.same_text else ["NOT THE SAME TEXT: levels cannot be compared between curves"]
    head = 0.62 + 0.15 * (len(words) + len(marks)) + key
    height = head + rows * size[1] + 0.1
    figure = Figure(figsize=(width, height))
    axes = figure.subplots(rows, columns, squeeze=False)
    figure.subplots_adjust(
        left=0.72 / width,
        right=1 - right / width,
        top=1 - (head + 0.1) / height,
        bottom=0.58 / height,
        wspace=right / size[0],
        hspace=0.62 / (size[1] - 0.62) if rows > 1 else 0,
    )
    left = 0.16 / width
    figure.text(left, 1 - 0.12 / height, TITLES[found.view], va="top", fontsize=12, fontweight="bold")
    figure.text(left, 1 - 0.37 / height, "\n".join(words), va="top", fontsize=8, color="#555555")
    below = 1 - (0.37 + 0.15 * len(words)) / height
    figure.text(left, below, "\n".join(marks), va="top", fontsize=8, color="#B00020")
    return figure, axes.ravel()


def _charts(found: Analysis) -> Figure:
    """A panel a training length, twice where the close lines would fall together."""
    shared = _panel_lengths(found.series)
    cells: list[tuple[int | None, list[Line], bool]] = []
    for length in shared:
        members = [s for s in found.series if _home(s, shared) == length]
        trained = length if len(shared) > 1 or any(s.train_length == length for s in members) else None
        lines = [line for s in members for line in LINES[found.view](s, s.train_length != trained)]
        lines = [line for line in lines if line.x]
        cells.append((trained, lines, False))
        values = [_nats(found.view, v) for line in lines for v in line.y]
        if values and max(values) - min(values) > CLOSE_UP_FROM and found.view != "offset":
            cells.append((trained, lines, True))
    columns = min(len(cells), 2)
    longest = max((len(line.name) for _, lines, _ in cells for line in lines), default=0)
    figure, axes = _figure(found, columns, math.ceil(len(cells) / columns), (4.1, 3.7), 1.0 + 0.066 * longest)
    for axis, cell in zip(axes, cells, strict=False):
        _chart(axis, found.view, *cell)
    for axis in axes[len(cells) :]:
        axis.set_axis_off()
    return figure


def _panel_lengths(series: Sequence[Series]) -> list[int]:
    lengths = sorted({s.train_length for s in series})
    return [n for n in lengths if sum(s.train_length == n for s in series) > 1] or lengths[-1:]


def _home(series: Series, shared: Sequence[int]) -> int:
    """The panel of a curve: its own training length's, else that of the next longer one."""
    return min((n for n in shared if n >= series.train_length), default=shared[-1])


def _nats(view: str, value: float) -> float:
    return value if view in ("position", "offset") else math.log(value)


def _chart(axis: Axes, view: str, trained: int | None, lines: Sequence[Line], close_up: bool) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    axis.grid(True, color=GRID, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=8, length=3)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    if not lines:
        axis.set_axis_off()
        axis.text(0.5, 0.5, "no scheme here has a value", transform=axis.transAxes, ha="center", color=SOFT)
        return
    for line in sorted(lines, key=lambda item: item.position == "alibi"):
        _draw(axis, line, markers=view != "position")
    first, last = min(x for line in lines for x in line.x), max(x for line in lines for x in line.x)
    if view == "offset":
        places = sorted({x for line in lines for x in line.x})
        axis.set_xscale("symlog", base=2, linthresh=places[1] if len(places) > 1 else 1)
        axis.xaxis.set_major_locator(FixedLocator(places))
        axis.axhline(0, color="#999999", linewidth=0.9, zorder=1)
    else:
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_locator(FixedLocator(length_ticks(first, last, trained or 1)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}" + ("\n(trained)" if v == trained else "")))
    if trained is not None:
        axis.axvline(trained, color="#999999", linewidth=0.9, dashes=(3, 2), zorder=1)
    _limit(axis, lines, close_up, view)
    axis.yaxis.set_major_locator(MaxNLocator(7))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    title = f"trained at {trained}" if trained is not None else ""
    axis.set_title(title + (", close-up" if close_up else ""), fontsize=9, loc="left", color="#333333")
    axis.set_xlabel(_X_NAMES.get(view, "inference length in tokens, log axis"), fontsize=8.5, labelpad=1)
    axis.set_ylabel(_Y_NAMES.get(view, "perplexity per token"), fontsize=8.5)
    _label(axis, lines)


def _draw(axis: Axes, line: Line, markers: bool) -> None:
    style = look(line.position)
    dashes: dict[str, Any] = {"dashes": style.dashes} if style.dashes else {}
    axis.plot(
        line.x,
        line.y,
        color=style.color,
        linewidth=1.2 if line.hollow or line.dashed else 1.8,
        marker=style.marker if markers else "",
        markersize=5,
        markerfacecolor="white" if line.hollow or line.dashed else style.color,
        markeredgecolor=style.color if line.hollow or line.dashed else "white",
        markeredgewidth=1.0 if line.hollow or line.dashed else 0.6,
        alpha=0.8 if line.dashed else 1,
        zorder=4,
        **dashes,
    )
    axis.fill_between(line.x, line.low, line.high, color=style.color, alpha=0.12, linewidth=0, zorder=2)


def _limit(axis: Axes, lines: Sequence[Line], close_up: bool, view: str) -> None:
    """Room for all values, or for those that a close-up must show."""
    values = [v for line in lines for v in (line.near if close_up and line.near else line.y)]
    if view == "offset":
        most = max(map(abs, values))
        if most < 1e-3:  # rounding must not fill the panel
            axis.set_ylim(-1e-3, 1e-3)
        return
    low, high = min(values), max(values)
    if close_up:
        best = sorted(v for line in lines for v in line.y)
        high = min(high, max(best[0], low) + 2.5 * (sorted(values)[len(values) // 2] - low) + 1e-9)
    room = 0.07 * (high - low) or 0.05 * abs(high) or 1.0
    axis.set_ylim(low - room, high + room)
    if not close_up and view != "position" and low > 0 and high / low > 3:
        axis.set_yscale("log")
        axis.set_ylim(low * (low / high) ** 0.06, high * (high / low) ** 0.06)


def _label(axis: Axes, lines: Sequence[Line]) -> None:
    """Names at the right edge; a line that leaves through the top is named in the whole range."""
    ceiling = axis.get_ylim()[1]
    write_labels(
        axis,
        [
            Label(line.x[-1], line.y[-1], line.name, look(line.position).color)
            for line in lines
            if line.y[-1] <= ceiling
        ],
    )


_X_NAMES = {
    "position": "position in the window = tokens of context, log axis",
    "fixed": "tokens of context of every target, log axis",
    "offset": "position of the first token",
}
_Y_NAMES = {"position": "nats per token", "offset": "change of the mean loss in nats per token"}


def _small_multiples(found: Analysis) -> Figure:
    parts = found.view == "decomposition"
    # What has nothing to show comes last.
    ordered = sorted(found.series, key=lambda s: not any("reason" not in p for p in s.points[-1:]))
    columns = 2 if len(ordered) == 4 else min(3, len(ordered))
    rows = math.ceil(len(ordered) / columns)
    panel = decomposition_panel if parts else documents_panel
    figure, axes = _figure(found, columns, rows, (3.0, 2.9), 0.95 if parts else 0.6, 0.2 if parts else 0.0)
    for axis, series in zip(axes, ordered, strict=False):
        panel(axis, series)
    for axis in axes[len(ordered) :]:
        axis.set_axis_off()
    if parts:
        _write_key(figure, top=axes[0].get_position().y1)
    return figure


def _write_key(figure: Figure, top: float) -> None:
    """What the bars are, in a line above the panels."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D(
            [], [], linestyle="", marker=marker, color=color, markerfacecolor="white" if marker == "D" else color
        )
        for marker, color, _ in decomposition_key()
    ]
    words = [name for _, _, name in decomposition_key()]
    words[-1] = (
        "total; nats per token on the left, factor of perplexity on the right, each panel with its own scale"
    )
    width, height = figure.get_size_inches()
    figure.legend(
        handles,
        words,
        loc="lower left",
        bbox_to_anchor=(0.08 / width, top + 0.22 / height),
        ncols=len(words),
        fontsize=8,
        frameon=False,
        columnspacing=1.4,
        handletextpad=0.2,
    )
