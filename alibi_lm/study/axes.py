"""One panel of a figure: the lines of its curves, their labels, the training length and the baselines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from alibi_lm.results.curves import Curve
from alibi_lm.study.style import look

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GRID = "#E4E4E4"
SOFT = "#777777"
PAPER_DASHES = (1.0, 1.6)


@dataclass(frozen=True)
class Label:
    """A name beside the end of a line; `x`, `y` are that end in data units."""

    x: float
    y: float
    text: str
    color: str
    note: str = ""
    """A second line, small."""


def draw_panel(
    axis: Axes,
    curves: Sequence[Curve],
    train_length: int | None,
    baselines: Mapping[str, float],
    close_up: bool,
    has_twin: bool,
    dotted: Sequence[Curve] = (),
) -> None:
    """Draw the curves of one training length into `axis`.

    Args:
        axis: empty.
        curves: at least one.
        train_length: marked by a vertical line; None where the curves have several, each ringed.
        baselines: perplexity of each baseline; drawn where it falls near the curves, else named in words.
        close_up: linear axis around the values up to the training length; lines leave it at the top.
        has_twin: whether the whole range is drawn elsewhere (it then has a log axis).
        dotted: published curves of the same schemes.
    """
    drawn = [curve for curve in curves if curve.lengths]
    if not drawn:
        axis.set_axis_off()
        axis.text(0.5, 0.5, "no scheme here has a value", transform=axis.transAxes, ha="center", color=SOFT)
        return
    low, high = _limits(drawn, close_up)
    if has_twin and not close_up:
        axis.set_yscale("log")
    _frame(axis, drawn, train_length)
    axis.set_ylim(low, high)
    labels: list[Label] = []
    for curve in sorted(drawn, key=lambda c: c.position == "alibi"):  # ALiBi on top of the others
        labels += _draw_curve(axis, curve, train_length, high if close_up else math.inf)
    for curve in dotted:
        _draw_published(axis, curve)
    if not close_up:
        _draw_baselines(axis, baselines, labels)
    write_labels(axis, labels)
    title = "close-up" if close_up else ("whole range" if has_twin else "")
    trained = f"trained at {train_length}" if train_length is not None else "rings: training length"
    axis.set_title(", ".join(part for part in (trained, title) if part), fontsize=9, loc="left", color="#333333")
    scale = ", log axis" if has_twin and not close_up else ""
    if not close_up:
        _name_hidden_baselines(axis, baselines)
    axis.set_ylabel(f"perplexity per token{scale}", fontsize=8.5)
    axis.set_xlabel("inference length in tokens, log axis", fontsize=8.5, labelpad=1)


def _limits(curves: Sequence[Curve], close_up: bool) -> tuple[float, float]:
    values = [curve.perplexity(n) for curve in curves for n in curve.lengths]
    single = [math.exp(loss) for c in curves for runs in c.losses.values() for loss in runs.values()]
    low, high = min(single), max(single)
    if close_up:
        near = [c.perplexity(n) for c in curves for n in c.lengths if n <= c.train_length] or values
        high = min(high, max(near) * 1.06)
        room = 0.06 * (high - low) or 0.05 * high
        return low - room, high + room
    room = max(0.05 * math.log(high / low), 0.02)
    return low * math.exp(-room), high * math.exp(room)


def _frame(axis: Axes, curves: Sequence[Curve], train_length: int | None) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

    lengths = sorted({n for curve in curves for n in [*curve.lengths, *curve.refused]})
    anchor = train_length or min(curve.train_length for curve in curves)
    first, last = lengths[0], lengths[-1]
    axis.set_xscale("log", base=2)
    pad = 2 ** max(0.03 * math.log2(last / first), 0.02)
    axis.set_xlim(first / pad, last * pad)
    axis.xaxis.set_major_locator(FixedLocator(length_ticks(first, last, anchor)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value, train_length)))
    axis.xaxis.set_minor_locator(NullLocator())
    if axis.get_yscale() == "log":
        values = [curve.perplexity(n) for curve in curves for n in curve.lengths]
        few = max(values) / min(values) < 30
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 6) if few else (1, 2, 5), numticks=30))
        axis.yaxis.set_minor_locator(NullLocator())
    else:
        axis.yaxis.set_major_locator(MaxNLocator(7))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.grid(True, color=GRID, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=8, length=3)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    if train_length is not None:
        axis.axvline(train_length, color="#999999", linewidth=0.9, dashes=(3, 2), zorder=1)


def _tick(value: float, train_length: int | None) -> str:
    return f"{value:g}\n(trained)" if value == train_length else f"{value:g}"


def length_ticks(first: float, last: float, anchor: int) -> list[float]:
    """Tick positions: the anchor times powers of two, thinned to at most nine."""
    low = math.ceil(math.log2(first / anchor) - 1e-9)
    high = math.floor(math.log2(last / anchor) + 1e-9)
    if high <= low:  # less than an octave: the two ends say more than one power of two
        return sorted({float(first), float(last)})
    step = math.ceil((high - low + 1) / 9)
    return [anchor * 2.0**k for k in range(low, high + 1) if k % step == 0]


def _draw_curve(axis: Axes, curve: Curve, train_length: int | None, ceiling: float) -> list[Label]:
    style = look(curve.position)
    guest = train_length is not None and curve.train_length != train_length
    x = curve.lengths
    y = [curve.perplexity(n) for n in x]
    stray = guest or bool(curve.variant)
    line: dict[str, Any] = dict(color=style.color, linewidth=1.3 if stray else 1.9, zorder=4)
    if style.dashes:
        line["dashes"] = style.dashes
    axis.plot(
        x,
        y,
        marker=style.marker,
        markevery=_spaced(x),
        markersize=6.4 if style.marker in "XP*" else 5.2,
        markeredgewidth=1.1 if stray else 0.6,
        markerfacecolor="white" if stray else style.color,
        markeredgecolor=style.color if stray else "white",
        **line,
    )
    if max(len(runs) for runs in curve.losses.values()) > 1:
        points = [(n, math.exp(loss)) for n in x for loss in curve.losses[n].values()]
        axis.plot(*zip(*points, strict=True), ".", color=style.color, markersize=3, alpha=0.45, zorder=3)
    if curve.train_length in curve.losses and curve.train_length != train_length:
        own = curve.perplexity(curve.train_length)
        axis.plot([curve.train_length], [own], "o", markersize=10, mfc="none", mec=style.color, mew=0.9, zorder=5)
    ends = bool(curve.refused) and min(curve.refused) > x[-1]
    if ends:
        axis.plot(x[-1:], y[-1:], "|", color=style.color, markersize=13, markeredgewidth=1.6, zorder=5)
    if y[-1] > ceiling:
        return []  # it leaves through the top; the whole range has its label
    name = label_of(curve, with_length=guest or train_length is None)
    notes = [_short(curve.variant)] if curve.variant else []
    notes += [f"ends at {x[-1]}"] if ends else []
    return [Label(x[-1], y[-1], name, style.color, ", ".join(notes))]


def label_of(curve: Curve, with_length: bool) -> str:
    """Name of a curve beside its line."""
    name = look(curve.position).name
    return f"{name} L={curve.train_length}" if with_length else name


def _short(variant: str) -> str:
    return variant if len(variant) <= 18 else variant[:15] + "..."


def _draw_published(axis: Axes, curve: Curve) -> None:
    style = look(curve.position)
    y = [curve.perplexity(n) for n in curve.lengths]
    axis.plot(curve.lengths, y, color=style.color, linewidth=1.2, dashes=PAPER_DASHES, zorder=2)


def _draw_baselines(axis: Axes, baselines: Mapping[str, float], labels: list[Label]) -> None:
    low, high = axis.get_ylim()
    for name, value in sorted(baselines.items()):
        # A baseline far above the curves would squash them, so it is drawn only where it costs little room.
        if axis.get_yscale() == "log" and high < value <= high * (high / low) ** 0.35:
            axis.set_ylim(low, value * 1.08)
        if low <= value <= axis.get_ylim()[1]:
            axis.axhline(value, color="#AAAAAA", linewidth=0.9, zorder=1)
            labels.append(Label(axis.get_xlim()[1], value, f"{name} baseline", SOFT))


def _name_hidden_baselines(axis: Axes, baselines: Mapping[str, float]) -> None:
    low, high = axis.get_ylim()
    hidden = [
        f"{name} baseline {value:.4g}, {'above' if value > high else 'below'}"
        for name, value in sorted(baselines.items())
        if not low <= value <= high
    ]
    # Inside, at the left: curves rise to the right, and beside the title there may be no room.
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}  # hides the grid and the trained length's line
    note = "\n".join(hidden)
    axis.text(0.02, 0.98, note, fontsize=7.5, color=SOFT, va="top", transform=axis.transAxes, bbox=box, zorder=3)


def _spaced(lengths: Sequence[int]) -> list[int]:
    """Indices of points far enough apart for a marker each (a dozen to the axis)."""
    span = math.log(lengths[-1] / lengths[0]) or 1.0
    kept = [0]
    for index in range(1, len(lengths)):
        if math.log(lengths[index] / lengths[kept[-1]]) >= span / 12:
            kept.append(index)
    return kept


def write_labels(axis: Axes, labels: Sequence[Label]) -> None:
    """Write the names at the right edge, moved apart where they would touch, each tied to its line's end."""
    figure = axis.get_figure(root=True)
    assert figure is not None  # panels are drawn into a figure
    height = axis.get_position().height * figure.get_size_inches()[1] * 72  # points
    to_fraction = axis.transData + axis.transAxes.inverted()
    slots: list[tuple[float, Label, bool]] = []  # height wanted, label, whether this is its second line
    for label in sorted(labels, key=lambda item: (item.y, item.text)):
        end = float(to_fraction.transform((label.x, label.y))[1])
        slots += [(end, label, True)] if label.note else []
        slots.append((end, label, False))
    places = spread([end for end, _, _ in slots], gap=10.0 / height)
    for (end, label, second), place in zip(slots, places, strict=True):
        text = label.note if second else label.text
        style: dict[str, Any] = dict(fontsize=7 if second else 8.2, color=label.color)
        if text.startswith("ALiBi"):
            style["fontweight"] = "bold"
        axis.text(1.05, place, text, transform=axis.transAxes, va="center", **style)
        if second:
            continue
        x = float(to_fraction.transform((label.x, label.y))[0])
        leader: dict[str, Any] = dict(color=label.color, clip_on=False, zorder=2, transform=axis.transAxes)
        if x > 0.9:
            axis.plot([min(x + 0.014, 1.0), 1.04], [end, place], linewidth=0.6, alpha=0.6, **leader)
        else:  # a long way: so faint that nobody takes it for data
            axis.plot([x + 0.02, 1.0, 1.04], [end, end, place], linewidth=0.7, alpha=0.6, dashes=(1, 5), **leader)


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Places at least `gap` apart, in the same order, as near as can be to the wanted ones (rising).

    Groups that touch are centred on the mean of what their members wanted, as in isotonic regression.
    """
    groups: list[list[float]] = []  # mean of (wanted - index * gap), size
    for index, value in enumerate(wanted):
        groups.append([value - index * gap, 1.0])
        while len(groups) > 1 and groups[-2][0] >= groups[-1][0]:
            mean, size = groups.pop()
            groups[-1] = [
                (groups[-1][0] * groups[-1][1] + mean * size) / (groups[-1][1] + size),
                groups[-1][1] + size,
            ]
    flat = [mean for mean, size in groups for _ in range(int(size))]
    return [mean + index * gap for index, mean in enumerate(flat)]
