"""The figure of the view `windows`: keys that each head must keep, proved and needed, against its slope."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from alibi_lm.study.analysis import Analysis, Series
from alibi_lm.study.plots import dress, say

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = {"2^-25": "#0072B2", "1e-3": "#E69F00", "1e-2": "#CC79A7"}
"""By lost share."""


def window_panels(found: Analysis) -> Iterator[Callable[[Axes], None]]:
    """A panel for each layer of each curve with a bound; where there is none, one panel that says so."""
    some = False
    for series in found.series:
        layers = sorted({point["layer"] for point in series.points if "layer" in point})
        for layer in layers:
            some = True
            yield functools.partial(_panel, series=series, layer=layer)
    if not some:
        yield lambda axis: say(axis, "no scheme here has a bound")


def _panel(axis: Axes, series: Series, layer: int) -> None:
    from matplotlib.ticker import FuncFormatter

    points = sorted((p for p in series.points if p.get("layer") == layer), key=lambda p: p["slope"])
    dress(axis, f"{series.name} L={series.train_length}, layer {layer}")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    slopes = [p["slope"] for p in points]
    for share, color in COLORS.items():
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
