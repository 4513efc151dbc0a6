"""Figures and tables of the views of context: where heads look, and what a second reading gains."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from alibi_lm.study.analysis import Analysis, Series, context_words
from alibi_lm.study.plots import Line, Panel, dress, say
from alibi_lm.study.style import look
from alibi_lm.study.tables import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ATTENTION_NOTE = (
    "Mean weight of a key by distance, a row for each head (layer.head), a column for each range of distances, "
    "queries of the second half of each window. Right: the same as lines, dashed at the training length."
)


def known(series: Series) -> list[dict[str, Any]]:
    """The points of an attention view that were measured."""
    return [point for point in series.points if "heads" in point]


def attention_cells(found: Analysis) -> list[list[Any]]:
    """For each curve: a heat map at the training length, one at the longest length, and lines of both."""
    rows: list[list[Any]] = []
    for series in found.series:
        points = known(series)
        if not points:
            rows.append([functools.partial(_refused, series=series), None, None])
            continue
        own = next((p for p in points if p["length"] == series.train_length), points[0])
        far = points[-1]
        maps = [functools.partial(heat_map, series=series, point=point) for point in (own, far)]
        rows.append([maps[0], maps[1] if far is not own else None, functools.partial(curves, series=series)])
    return rows


def heat_map(axis: Axes, series: Series, point: Mapping[str, Any]) -> None:
    """Heads down, distances across, the mean weight of a key there as colour, on a log scale."""
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import FuncFormatter

    dress(axis, f"{series.name} at {point['length']}", look(series.position).color)
    axis.grid(visible=False)
    values = [[max(weight, 1e-6) for weight in head["weights"]] for head in point["heads"]]
    shown = axis.imshow(values, norm=LogNorm(1e-5, 1), cmap="viridis", aspect="auto", interpolation="nearest")
    nearest = point["nearest"]
    ticks = range(0, len(nearest), max(1, len(nearest) // 6))
    axis.set_xticks(list(ticks), [str(nearest[k]) for k in ticks])
    heads = point["heads"]
    rows = range(0, len(heads), max(1, len(heads) // 8))
    axis.set_yticks(list(rows), [f"{heads[k]['layer'] + 1}.{heads[k]['head'] + 1}" for k in rows])
    axis.set_xlabel("distance in tokens", fontsize=8, labelpad=1)
    bar = axis.figure.colorbar(shown, ax=axis, fraction=0.05, pad=0.02, format=FuncFormatter(_number))
    bar.ax.tick_params(labelsize=6)


def curves(axis: Axes, series: Series) -> None:
    """The same as a line for each head, at the longest length and (dashed) at the training length."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    dress(axis, f"{series.name}, all heads", look(series.position).color)
    points = known(series)
    for point in points:
        if point["length"] not in (series.train_length, points[-1]["length"]):
            continue
        dashes = "--" if point["length"] == series.train_length else "-"
        x = [(near + far) / 2 + 1 for near, far in zip(point["nearest"], point["farthest"], strict=True)]
        for head in point["heads"]:
            color = f"C{head['layer'] % 10}"
            axis.plot(x, [max(w, 1e-6) for w in head["weights"]], dashes, color=color, linewidth=0.8, alpha=0.7)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_ylim(1e-6, 1.5)
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_formatter(FuncFormatter(_number))
        side.set_minor_formatter(NullFormatter())
    axis.axvline(series.train_length, color="#999999", linewidth=0.8, linestyle=":")
    axis.set_xlabel("distance + 1, log axis (colour: layer)", fontsize=8, labelpad=1)
    axis.set_ylabel("mean weight of a key", fontsize=8, labelpad=1)


def _number(value: float, _: object) -> str:
    """A tick in plain text: mathematical markup is switched off in all figures."""
    return f"{value:g}"


def _refused(axis: Axes, series: Series) -> None:
    dress(axis, series.name)
    say(axis, series.reason or "no length")


def attention_table(found: Analysis) -> Table:
    """A row for each curve and length: how far heads look, how widely, and how many rest on the first token."""
    body = []
    for series in found.series:
        for point in series.points:
            row = [series.name, str(series.train_length), str(point["length"])]
            if "heads" not in point:
                body.append([*row, "-", "-", "-", str(point.get("reason", ""))])
                continue
            distance, entropy, first = (_range(point["heads"], key) for key in ("distance", "entropy", "first"))
            body.append([*row, distance, entropy, first, f"{point['sink_rate']:.2f}"])
    header = [
        "scheme",
        "trained at",
        "length",
        "mean distance",
        "entropy in nats",
        "weight of first token",
        "sink rate",
    ]
    note = (
        "Least, median and greatest of the heads of the first seed. Sink rate: heads, of all seeds, that give the "
        "first token more than 0.3 of their weight. Queries of the second half of each window."
    )
    return Table(header, body, 1, [note])


def _range(heads: Sequence[Mapping[str, float]], key: str) -> str:
    values = [head[key] for head in heads]
    return f"{min(values):.3g}, {median(values):.3g}, {max(values):.3g}"


def repeat_panel(found: Analysis, lines: list[Line], length: int) -> Panel:
    """What a second reading gains, by distance."""
    width = next(point["width"] for series in found.series for point in series.points)
    ends = [v for line in lines for v in [*line.y, *line.low, *line.high]] + [0.0]
    room = 0.08 * (max(ends) - min(ends)) or 0.1
    return Panel(
        lines,
        f"trained at {length}, segments of {width} tokens",
        x_label="tokens between the readings, log axis",
        y_label="gain, nats per token",
        trained=length,
        limits=(min(ends) - room, max(ends) + room),
        levels={"no gain": 0.0},
    )


def effective_note(series: Series) -> str:
    """Small print of a curve of the effective context."""
    return next((context_words(point) for point in series.points if point["effective"] is not None), "")
