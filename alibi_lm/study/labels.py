"""Names beside the ends of lines, moved apart where they would touch."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Label:
    """A name beside the end of a line; `x` and `y` are that end's data coordinates."""

    x: float
    y: float
    text: str
    color: str
    note: str = ""
    """Further lines in small text."""


def write_labels(axis: Axes, labels: Sequence[Label]) -> None:
    """Write the names at the right edge, moved apart where they would touch, each connected to its line's end."""
    figure = axis.get_figure(root=True)
    assert figure is not None  # panels are drawn into a figure
    height = axis.get_position().height * figure.get_size_inches()[1] * 72  # points
    to_fraction = axis.transData + axis.transAxes.inverted()
    slots: list[tuple[float, Label, str]] = []  # height wanted, label, small print or nothing
    for label in sorted(labels, key=lambda item: (item.y, item.text)):
        end = float(to_fraction.transform((label.x, label.y))[1])
        slots += [(end, label, note) for note in reversed(note_lines(label.note))]
        slots.append((end, label, ""))
    places = spread([end for end, _, _ in slots], gap=10.0 / height)
    for (end, label, note), place in zip(slots, places, strict=True):
        style: dict[str, Any] = dict(fontsize=7 if note else 8.2, color=label.color)
        if label.text.startswith("ALiBi") and not note:
            style["fontweight"] = "bold"
        axis.text(1.05, place, note or label.text, transform=axis.transAxes, va="center", **style)
        if note:
            continue
        x = float(to_fraction.transform((label.x, label.y))[0])
        leader: dict[str, Any] = dict(color=label.color, clip_on=False, zorder=2, transform=axis.transAxes)
        if x > 0.9:
            axis.plot([min(x + 0.014, 1.0), 1.04], [end, place], linewidth=0.6, alpha=0.6, **leader)
        else:  # a long connection is faint, so that it is not taken for data
            axis.plot([x + 0.02, 1.0, 1.04], [end, end, place], linewidth=0.7, alpha=0.6, dashes=(1, 5), **leader)


def note_lines(note: str) -> list[str]:
    """Small text split into lines that fit beside a panel, at most three."""
    return textwrap.wrap(note, 26, max_lines=3, placeholder=" ...") if note else []


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Places in [0, 1], at least `gap` apart and in the same order, as near as possible to the wanted ones.

    Groups that touch are centred on the mean of their wanted places. If there is too little room, places go
    beyond 1.
    """
    from scipy.optimize import isotonic_regression

    if not wanted:
        return []
    steps = isotonic_regression([value - index * gap for index, value in enumerate(wanted)]).x
    top = 1 - (len(wanted) - 1) * gap
    return [max(0.0, min(float(step), top)) + index * gap for index, step in enumerate(steps)]
