"""Charts of views other than lines: bars of the decomposition, documents, windows of heads, attention maps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from alibi_lm.study.analysis import TERM_NAMES, Series, times
from alibi_lm.study.plots import SOFT, dress, say
from alibi_lm.study.style import look

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TERM_COLORS = {"early_tokens": "#56B4E9", "positions_beyond": "#CC79A7", "keys_beyond": "#E69F00"}
SHARE_COLORS = {"2^-25": "#0072B2", "1e-3": "#E69F00", "1e-2": "#CC79A7"}
"""Colours by lost share of attention."""


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
    # Beside the bars: on the middle bar it would hide that bar's interval.
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


def _whiskers(axis: Axes, x: Sequence[float], terms: Sequence[Mapping[str, float]]) -> None:
    for place, term in zip(x, terms, strict=True):
        if term["low"] is not None:
            axis.plot([place, place], [term["low"], term["high"]], color="#333333", linewidth=0.9, zorder=4)


def documents_panel(axis: Axes, series: Series) -> None:
    """Each document's mean loss at the longest length against its loss at the trained length."""
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


def windows_panel(axis: Axes, series: Series, layer: int | None) -> None:
    """Keys that each head of a layer must keep, proved and needed, against its slope."""
    from matplotlib.ticker import FuncFormatter

    if layer is None:
        say(axis, "no scheme here has a bound")
        return
    points = sorted((p for p in series.points if p.get("layer") == layer), key=lambda p: p["slope"])
    dress(axis, f"{series.name} L={series.train_length}, layer {layer}")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    slopes = [p["slope"] for p in points]
    for share, color in SHARE_COLORS.items():
        axis.plot(slopes, [p["windows"][share] for p in points], "-o", color=color, markersize=3.5, label=share)
        if "needed" in points[0]:
            axis.plot(slopes, [p["needed"][share] for p in points], "x", color=color, markersize=5)
    if "measured_on" in points[0]:
        axis.axhline(points[0]["measured_on"], color="#999999", linewidth=0.9, dashes=(3, 2), zorder=1)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"2^{math.log2(v):g}"))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
    axis.set_xlabel("slope, log axis", fontsize=8.5, labelpad=1)
    axis.set_ylabel("keys, log axis", fontsize=8.5)
    axis.legend(title="lost share", fontsize=7, title_fontsize=7, frameon=False)


def heat_map(axis: Axes, series: Series, point: Mapping[str, Any] | None) -> None:
    """One row per head, one column per distance, the mean weight of a key there as colour on a log scale."""
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import FuncFormatter

    if point is None:
        dress(axis, series.name)
        say(axis, series.reason or "no length")
        return
    dress(axis, f"{series.name} at {point['length']}", look(series.position).color)
    axis.grid(visible=False)
    heads, nearest = point["heads"], point["nearest"]
    values = [[max(weight, 1e-6) for weight in head["weights"]] for head in heads]
    shown = axis.imshow(values, norm=LogNorm(1e-5, 1), cmap="viridis", aspect="auto", interpolation="nearest")
    ticks = range(0, len(nearest), max(1, len(nearest) // 6))
    axis.set_xticks(list(ticks), [str(nearest[k]) for k in ticks])
    rows = range(0, len(heads), max(1, len(heads) // 8))
    axis.set_yticks(list(rows), [f"{heads[k]['layer'] + 1}.{heads[k]['head'] + 1}" for k in rows])
    axis.set_xlabel("distance in tokens", fontsize=8, labelpad=1)
    beside = axis.inset_axes((1.02, 0, 0.04, 1))  # part of the panel, which is placed later
    bar = axis.figure.colorbar(shown, cax=beside, format=FuncFormatter(_plain))
    bar.ax.tick_params(labelsize=6)


def weight_lines(axis: Axes, series: Series, points: Sequence[Mapping[str, Any]]) -> None:
    """The mean weights as a line for each head, at the longest length and (dashed) at the training length."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    dress(axis, f"{series.name}, all heads", look(series.position).color)
    for point in points:
        dashes = "--" if point["length"] == series.train_length else "-"
        x = [(near + far) / 2 + 1 for near, far in zip(point["nearest"], point["farthest"], strict=True)]
        for head in point["heads"]:
            y = [max(weight, 1e-6) for weight in head["weights"]]
            axis.plot(x, y, dashes, color=f"C{head['layer'] % 10}", linewidth=0.8, alpha=0.7)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_ylim(1e-6, 1.5)
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_formatter(FuncFormatter(_plain))
        side.set_minor_formatter(NullFormatter())
    axis.axvline(series.train_length, color="#999999", linewidth=0.8, linestyle=":")
    axis.set_xlabel("distance + 1, log axis (colour: layer)", fontsize=8, labelpad=1)
    axis.set_ylabel("mean weight of a key", fontsize=8, labelpad=1)


def _plain(value: float, _: object) -> str:
    """A tick label in plain text, because mathematical markup is switched off in all figures."""
    return f"{value:g}"
