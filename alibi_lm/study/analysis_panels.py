"""Panels with one curve each: the parts of a decomposition, and the losses of single documents."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from alibi_lm.study.analysis_data import TERM_NAMES, Series
from alibi_lm.study.axes import GRID, SOFT
from alibi_lm.study.style import look

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TERM_COLORS = {"early_tokens": "#56B4E9", "positions_beyond": "#CC79A7", "keys_beyond": "#E69F00"}


def decomposition_panel(axis: Axes, series: Series) -> None:
    """Bars of the three parts at each length, and their sum as a line; every panel has its own scale."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    _dress(axis, series)
    points = [p for p in series.points if p["total"] is not None and p["total"]["nats"] is not None]
    if not points:
        _say(axis, next((p["reason"] for p in series.points if p.get("reason")), "no length beyond L"))
        return
    axis.axhline(0, color="#555555", linewidth=0.8, zorder=3)
    for index, (name, color) in enumerate(TERM_COLORS.items()):
        x = [k + (index - 1) * 0.26 for k in range(len(points))]
        values = [p[name]["nats"] for p in points]
        axis.bar(x, values, width=0.24, color=color, zorder=2)
        _whiskers(axis, x, [p[name] for p in points])
    places = [float(k) for k in range(len(points))]
    total = [p["total"]["nats"] for p in points]
    _whiskers(axis, places, [p["total"] for p in points])
    axis.plot(places, total, "D", color="#222222", markersize=4.5, markerfacecolor="white", zorder=5)
    axis.set_xticks(places, [str(p["length"]) for p in points])
    axis.set_xlim(-0.55, len(points) - 0.45)
    axis.yaxis.set_major_locator(MaxNLocator(6))
    axis.set_xlabel("inference length", fontsize=8, labelpad=1)
    factor = axis.secondary_yaxis("right")
    factor.yaxis.set_major_locator(MaxNLocator(6))
    factor.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"x{math.exp(min(v, 700)):.3g}"))
    factor.tick_params(labelsize=7, length=2, colors=SOFT)
    factor.spines["right"].set_visible(False)


def decomposition_key() -> list[tuple[str, str, str]]:
    """Marker, colour and words of everything in a panel."""
    return [("s", color, TERM_NAMES[name]) for name, color in TERM_COLORS.items()] + [("D", "#222222", "total")]


def documents_panel(axis: Axes, series: Series) -> None:
    """Each document's mean loss at the longest length against that at the trained length."""
    _dress(axis, series)
    known = [p for p in series.points if p["nats"] is not None]
    base = next((p for p in known if p["length"] == series.train_length), None)
    far = max(known, key=lambda p: p["length"], default=None)
    if base is None or far is None or far is base:
        refused = [p["reason"] for p in series.points if p.get("reason")]
        _say(axis, refused[0] if refused else "no value at the trained length and beyond")
        return
    pairs = [
        (a, b) for a, b in zip(base["documents"], far["documents"], strict=True) if a is not None and b is not None
    ]
    x, y = ([pair[k] for pair in pairs] for k in (0, 1))
    axis.scatter(x, y, s=9, color=look(series.position).color, alpha=0.55, linewidth=0, zorder=3)
    low = min(min(pair) for pair in pairs)
    high = max(max(pair) for pair in pairs)
    room = 0.05 * (high - low)
    axis.axline((low, low), slope=1, color="#888888", linewidth=0.8, zorder=2)
    axis.set_xlim(min(x) - room, max(x) + room)
    axis.set_ylim(min(min(x), min(y)) - room, max(y) + room)
    worse = sum(b > a for a, b in pairs)
    axis.text(
        0.03,
        0.97,
        f"{worse} of {len(pairs)} above the line: worse",
        transform=axis.transAxes,
        va="top",
        fontsize=7.5,
        color=SOFT,
    )
    axis.set_xlabel(f"nats per token at {series.train_length} (trained)", fontsize=8, labelpad=1)
    axis.set_ylabel(f"at {far['length']}", fontsize=8, labelpad=2)


def _whiskers(axis: Axes, x: list[float], terms: list[dict[str, float]]) -> None:
    for place, term in zip(x, terms, strict=True):
        if term["low"] is not None:
            axis.plot([place, place], [term["low"], term["high"]], color="#333333", linewidth=0.9, zorder=4)


def _dress(axis: Axes, series: Series) -> None:
    style = look(series.position)
    axis.set_title(f"{series.name}, L = {series.train_length}", fontsize=9.5, loc="left", color=style.color)
    axis.grid(True, axis="y", color=GRID, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=7.5, length=2.5)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _say(axis: Axes, words: str) -> None:
    axis.set_xticks([])
    axis.set_yticks([])
    axis.text(0.5, 0.5, words, transform=axis.transAxes, ha="center", fontsize=8, color=SOFT, wrap=True)
