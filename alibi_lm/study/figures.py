"""Figures of perplexity against inference length, drawn from `results.jsonl` alone.

One figure a view (split, mode, stride), one panel a training length that two or more curves share, one line
a scheme. Where the range is so wide that the close lines would fall together, a panel comes twice: the whole
range on a log axis, and a close-up on a linear one. The same rows always give the same bytes.
"""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alibi_lm.files import write_text
from alibi_lm.results.curves import Curve, View, baselines, curves, views
from alibi_lm.results.rows import ResultRow, read_rows
from alibi_lm.study import axes as panels
from alibi_lm.study.fairness import Difference, differences
from alibi_lm.study.paper import paper_curves
from alibi_lm.study.tables import markdown, provenance

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLOSE_UP_FROM = 2.0  # highest over lowest perplexity in a panel from which a close-up is drawn beside it
MAX_COLUMNS = 4
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
class Panel:
    """Curves that share a picture: those of one training length, and strays drawn beside them."""

    train_length: int | None
    curves: list[Curve]


def draw(folder: str | os.PathLike[str], with_paper: bool = False, strict: bool = False) -> list[Path]:
    """Draw every figure of a study folder and write its Markdown table.

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
    written = []
    for index, view in enumerate(found):
        name = "extrapolation" if index == 0 else f"extrapolation_{view.slug}"
        figure = build_figure(rows, view, unfair, with_paper)
        for suffix in ("png", "svg"):
            path = folder / f"{name}.{suffix}"
            save(figure, path)
            written.append(path)
    table = folder / "table.md"
    write_text(table, markdown(rows, unfair))
    return [*written, table]


def build_figure(
    rows: Sequence[ResultRow],
    view: View,
    unfair: Sequence[Difference] = (),
    with_paper: bool = False,
) -> Figure:
    """The figure of one view."""
    import matplotlib
    from matplotlib.figure import Figure

    found = curves(rows, view)
    base = baselines(rows, view)
    columns = split_into_panels(found)
    tall = any(needs_close_up(panel) for panel in columns)
    marks = [item.sentence for item in unfair if item.matters]
    with matplotlib.rc_context(RC):
        if len(columns) == 1:
            grid = (1, 2 if tall else 1)
            cells = [(columns[0], close_up) for close_up in ([False, True] if tall else [False])]
        else:
            width = min(len(columns), MAX_COLUMNS)
            bands = math.ceil(len(columns) / width)
            grid = (bands * (2 if tall else 1), width)
            cells = []
            for band in range(bands):
                part = columns[band * width : (band + 1) * width]
                part += [Panel(None, [])] * (width - len(part))
                for close_up in [False, True] if tall else [False]:
                    cells += [(panel, close_up) for panel in part]
        width_inches = 0.25 + 5.0 * grid[1]
        origin = textwrap.wrap(f"{view.title}; {provenance(rows, view)}", _characters(width_inches))
        head = 0.62 + 0.16 * (len(origin) - 1) + 0.19 * min(len(marks), 4)
        size = (width_inches, head + 0.35 + 3.75 * grid[0])
        figure = Figure(figsize=size, facecolor="white")
        axes = figure.subplots(*grid, squeeze=False).ravel()
        figure.subplots_adjust(
            left=0.62 / size[0],
            right=1 - 1.2 / size[0],
            bottom=0.62 / size[1],
            top=1 - (head + 0.32) / size[1],
            wspace=1.72 / 3.3 if grid[1] > 1 else 0,
            hspace=0.34,
        )
        _write_head(figure, origin, marks)
        for axis, (panel, close_up) in zip(axes, cells, strict=True):
            if not panel.curves:
                axis.set_axis_off()
                continue
            dotted = paper_curves(panel.curves, view) if with_paper else []
            panels.draw_panel(axis, panel.curves, panel.train_length, base, close_up, tall, dotted)
    return figure


def split_into_panels(found: Sequence[Curve]) -> list[Panel]:
    """Training lengths that two or more curves share have a panel each.

    Any other curve is drawn with the nearest longer training length (ALiBi trained at L/2 beside the schemes
    trained at L), else with the longest. Where no length is shared, all curves have one panel.
    """
    lengths = sorted({curve.train_length for curve in found})
    shared = [n for n in lengths if sum(curve.train_length == n for curve in found) > 1]
    if not shared:
        return [Panel(lengths[0] if len(lengths) == 1 else None, list(found))]
    home = {n: min((s for s in shared if s >= n), default=shared[-1]) for n in lengths}
    return [Panel(s, [curve for curve in found if home[curve.train_length] == s]) for s in shared]


def needs_close_up(panel: Panel) -> bool:
    """Whether one axis cannot show both the worst value and the differences between the best."""
    values = [curve.perplexity(n) for curve in panel.curves for n in curve.lengths]
    return bool(values) and max(values) / min(values) > CLOSE_UP_FROM


def _characters(width_inches: float) -> int:
    """Characters of small print that fit into a figure's width."""
    return int((width_inches - 0.32) / 0.066)


def _write_head(figure: Figure, origin: Sequence[str], marks: Sequence[str]) -> None:
    width, height = figure.get_size_inches()
    left = 0.16 / width

    def write(inches: float, text: str, **style: Any) -> None:
        figure.text(left, 1 - inches / height, text, va="top", ha="left", **style)

    write(0.12, "Perplexity by inference length", fontsize=12, fontweight="bold")
    for index, line in enumerate(origin):
        write(0.37 + 0.16 * index, line, fontsize=8, color="#555555")
    below = 0.58 + 0.16 * (len(origin) - 1)
    shown = list(marks[:4]) if len(marks) <= 4 else [*marks[:3], f"and {len(marks) - 3} more (see table.md)"]
    for index, mark in enumerate(shown):
        text = textwrap.shorten(mark, _characters(width) - 24, placeholder=" ...")
        write(below + 0.19 * index, f"NOT A FAIR COMPARISON: {text}", fontsize=8, color="#B00020")


def save(figure: Figure, path: Path) -> None:
    """Write a PNG or SVG, by its suffix, atomically; the same figure gives the same bytes."""
    import matplotlib

    beside = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    # Dates and versions would make the same rows give different files.
    metadata = {"Date": None, "Creator": None} if path.suffix == ".svg" else {"Software": None}
    try:
        with matplotlib.rc_context(RC):
            figure.savefig(beside, format=path.suffix[1:], dpi=160, metadata=metadata)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
