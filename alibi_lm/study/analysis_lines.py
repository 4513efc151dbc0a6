"""From a view's points to the lines of a chart, in the units drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from alibi_lm.study.analysis_data import Series


@dataclass(frozen=True)
class Line:
    """One line of a chart, in the units drawn."""

    name: str
    position: str
    hollow: bool
    x: list[float]
    y: list[float]
    low: list[float]
    high: list[float]
    dashed: bool = False
    near: list[float] = field(default_factory=list)
    """Values that a close-up must show."""


def _name(series: Series, hollow: bool) -> str:
    return series.name + (f" L={series.train_length}" if hollow else "")


def _line(
    series: Series,
    hollow: bool,
    at: str,
    points: Sequence[dict[str, Any]],
    unit: Callable[[float], float],
    **more: Any,
) -> Line:
    points = [p for p in points if p["nats"] is not None]
    ends = [tuple(unit(v) for v in _band(p)) for p in points]
    return Line(
        _name(series, hollow) + more.pop("suffix", ""),
        series.position,
        hollow,
        [float(p[at]) for p in points],
        [unit(p["nats"]) for p in points],
        [low for low, _ in ends],
        [high for _, high in ends],
        near=[unit(p["nats"]) for p in points if p[at] <= series.train_length],
        **more,
    )


def _band(point: dict[str, Any]) -> tuple[float, float]:
    """Interval of the difference from the trained length, around the point; nothing where there is none."""
    known = point.get("difference", point if "offset" in point else None)
    if known is None or known["low"] is None:
        return point["nats"], point["nats"]
    return point["nats"] + known["low"] - known["nats"], point["nats"] + known["high"] - known["nats"]


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))


def _perplexity_lines(series: Series, hollow: bool) -> list[Line]:
    parts = {mode: [p for p in series.points if p["mode"] == mode] for mode in ("nonoverlapping", "sliding")}
    lines = [_line(series, hollow, "length", parts["nonoverlapping"], _exp)]
    if parts["sliding"]:
        lines.append(_line(series, hollow, "length", parts["sliding"], _exp, dashed=True, suffix=", sliding"))
    return lines


def _position_lines(series: Series, hollow: bool) -> list[Line]:
    """One line: each part of the window from the shortest windows that reach it, where most targets are."""
    bins: list[tuple[int, int, float, float, float]] = []
    for point in sorted((p for p in series.points if p["nats"] is not None), key=lambda p: p["length"]):
        curve = point["curve"]
        reached = bins[-1][1] if bins else 0
        for first, last, nats, low, high in zip(*(curve[k] for k in _CURVE), strict=True):
            if last > reached:
                bins.append((first, last, nats, nats if low is None else low, nats if high is None else high))
    if not bins:
        return []
    near = [nats for _, last, nats, _, _ in bins if last <= series.train_length]
    x = [math.sqrt(first * last) for first, last, *_ in bins]
    y, low, high = ([values[k] for values in bins] for k in (2, 3, 4))
    return [Line(_name(series, hollow), series.position, hollow, x, y, low, high, near=near[len(near) // 3 :])]


_CURVE = ("first", "last", "nats", "low", "high")
LINES: dict[str, Callable[[Series, bool], list[Line]]] = {
    "perplexity": _perplexity_lines,
    "position": _position_lines,
    "last": lambda s, hollow: [_line(s, hollow, "length", s.points, _exp)],
    "fixed": lambda s, hollow: [_line(s, hollow, "context", s.points, _exp)],
    "offset": lambda s, hollow: [_line(s, hollow, "offset", s.points, float)],
}
