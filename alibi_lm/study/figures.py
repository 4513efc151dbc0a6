"""Figures of results by inference length, from result rows only; the same rows always give the same bytes.

One figure per view (split, mode, stride, task), one panel for each training length that two or more curves share,
one line per scheme. If the range is so wide that close lines would coincide, a panel is drawn twice: the whole
range on a log axis, and a close-up on a linear one.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from alibi_lm.files import write_text
from alibi_lm.results.curves import (
    CACHE_SETTINGS,
    VALIDATION,
    Curve,
    View,
    baselines,
    by_byte,
    curves,
    variant_of,
    view_of,
    views,
)
from alibi_lm.results.rows import ResultRow
from alibi_lm.results.statistics import accuracy_interval
from alibi_lm.study.evidence import read_results
from alibi_lm.study.fairness import Difference, refuse
from alibi_lm.study.pages import markdown
from alibi_lm.study.paper import paper_curves
from alibi_lm.study.plots import Cell, Line, Panel, build, dress, fits, grid, save_both
from alibi_lm.study.stages import stages_of
from alibi_lm.study.style import label, look
from alibi_lm.study.tables import provenance, results_page

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CLOSE_UP_FROM = 2.0
"""A close-up may be drawn if the highest perplexity in a panel is at least this times the lowest."""
MOST_NUMBERS = 15
"""A heat map with more depths than these has no numbers in its cells: they would overlap."""
KEYS = "keys_held"
"""Where a row of a stream says how many keys a head held at its end, on average."""
COMPANY = 1.5
"""A close-up shows the curves whose best value up to the training length is at most this factor above the best."""


def draw(folder: str | os.PathLike[str], with_paper: bool = False, strict: bool = False) -> list[Path]:
    """Draw every figure of a folder of results and write its Markdown table.

    The first view (validation, nonoverlapping, where present) is `extrapolation.png` and `.svg`; each further
    one has its view in the name. `table.md` has them all. If models with different tokenizers read one text,
    `bits_per_byte.png` and `.svg` show them on one axis. If several models were streamed through caches that let
    keys go, `memory.png` and `.svg` show perplexity against the keys held.

    Args:
        folder: holds `results.jsonl`.
        with_paper: draw the paper's curves dotted, if it has the same scheme and training length.
        strict: refuse to draw runs that differ in more than the scheme.

    Raises:
        ValueError: no rows, damaged ones, or `strict` and an unfair comparison.
    """
    folder = Path(folder)
    evidence = read_results(folder)
    rows, words, unfair = evidence.rows, evidence.words, evidence.unfair
    found = views(rows)
    if not found:
        raise ValueError(f"{folder / 'results.jsonl'} holds no row of a run; evaluate at least one run first")
    if strict:
        refuse(unfair)
    written: list[Path] = []
    # Streamed results belong in the figure of the other windows, if there is one.
    for index, view in enumerate([view for view in found if view.mode != "stream"] or found):
        name = "extrapolation" if index == 0 else f"extrapolation_{view.slug}"
        figure = curve_figure(rows, view, words, unfair, with_paper)
        written += save_both(figure, folder, name)
        if in_bytes := by_byte(rows, view):
            by_tokenizer = (f"{view.split} text (hash)", f"{view.split} tokens scored")
            left = [item for item in unfair if item.what not in by_tokenizer]
            figure = curve_figure(in_bytes, replace(view, metric="bits_per_byte"), words, left)
            written += save_both(figure, folder, name.replace("extrapolation", "bits_per_byte"))
    written += draw_tasks(folder, rows, words)
    if memory := memory_figure(rows, words):
        written += save_both(memory, folder, "memory")
    if stages := stages_of(rows, evidence.records, words):
        written += save_both(stage_figure(stages, provenance(rows, VALIDATION)), folder, "stages")
    table = folder / "table.md"
    write_text(table, markdown(results_page(evidence)))
    return [*written, table]


def stage_figure(stages: Sequence[tuple[int, Curve]], origin: str) -> Figure:
    """How far schemes extrapolate at each stage of training: a panel for each multiple of L."""
    panels: list[Any] = []
    several = len({curve.train_length for _, curve in stages}) > 1
    for factor in sorted({factor for factor, _ in stages}):
        lines = []
        for curve in (curve for own, curve in stages if own == factor):
            steps = curve.lengths
            name = label(curve.position, length=curve.train_length if several else None)
            dots = [(float(n), curve.shown(v)) for n in steps for v in curve.losses[n].values()]
            line = Line(curve.position, name, [float(n) for n in steps], [curve.value(n) for n in steps])
            dots = dots if len(dots) > len(steps) else []
            lines.append(replace(line, note=curve.variant, dots=dots, stray=bool(curve.variant)))
        ratio = f"perplexity at {factor} L over that at L"
        log_y = _range([curve for own, curve in stages if own == factor]) > CLOSE_UP_FROM
        x_label = "training steps done, log axis"
        panels.append(Panel(lines, f"tested at {factor} L", x_label, ratio, log_y=log_y, tick_points=True))
    remarks = ["Above 1: worse beyond the training length than at it. Dots: single seeds."]
    return build("Extrapolation by stage of training", grid(panels, 2), origin, remarks)


def memory_figure(rows: Sequence[ResultRow], words: Mapping[str, str]) -> Figure | None:
    """Perplexity of a whole split as one window against the keys held: a line per model, a point per cache.

    None unless two models or more were streamed, and some cache let keys go.
    """
    view = next((view for view in views(rows) if view.mode == "stream"), None)
    own = [row for row in rows if row.run and view_of(row) == view and row.loss is not None and KEYS in row.extra]
    models: dict[tuple[str, int, str], dict[str, list[tuple[float, float]]]] = {}
    for row in own:
        cache = ", ".join(f"{k}={v}" for k, v in row.changes.items() if k in CACHE_SETTINGS) or "cache=full"
        tested = {k: v for k, v in row.changes.items() if k not in CACHE_SETTINGS}
        model = row.position, row.train_length or 0, variant_of(replace(row, changes=tested), words)
        models.setdefault(model, {}).setdefault(cache, []).append((row.extra[KEYS], row.loss or 0.0))
    if view is None or len(models) < 2 or all(row.extra[KEYS] >= row.tokens for row in own):
        return None
    lines: list[Line] = []
    keys_held: dict[str, float] = {}
    several = len({length for _, length, _ in models}) > 1
    for (position, length, variant), by_cache in models.items():
        means = {cache: np.mean(runs, axis=0) for cache, runs in by_cache.items()}
        keys_held |= {cache: keys for cache, (keys, _) in means.items()}
        x, y = zip(*sorted((float(keys), math.exp(loss)) for keys, loss in means.values()), strict=True)
        name = label(position, length=length if several else None)
        lines.append(Line(position, name, list(x), list(y), variant, stray=bool(variant)))
    order = ", ".join(sorted(keys_held, key=lambda cache: keys_held[cache]))
    panel = Panel(lines, x_label="keys held per head, log axis")
    origin = f"{view.title}; {provenance(rows, view)}"
    return build("Memory against perplexity", [[panel]], origin, [f"Each line, from left to right: {order}."])


def curve_figure(
    rows: Sequence[ResultRow],
    view: View,
    words: Mapping[str, str] | None = None,
    unfair: Sequence[Difference] = (),
    with_paper: bool = False,
) -> Figure:
    """The figure of one view; `words` are the recipes of the runs, `unfair` the differences to mark."""
    found = curves(rows, view, words)
    base = baselines(rows, view)
    cells: list[list[Panel | None]] = []
    for train_length, members in split_into_panels(found):
        dotted = paper_curves(members, view) if with_paper else []
        cells.append(curve_panels(members, train_length, base, dotted))
    layout: list[list[Any]] = [[cell for cell in cells[0] if cell]] if len(cells) == 1 else []
    for start in range(0, len(cells), 3) if len(cells) > 1 else ():
        layout += [list(row) for row in zip(*cells[start : start + 3], strict=True) if any(row)]
    panels = [panel for pair in cells for panel in pair if panel]
    marks = [f"NOT A FAIR COMPARISON: {item.sentence}" for item in unfair if item.matters]
    remarks = missing(found)
    if any(line.ring for panel in panels for line in panel.lines):
        remarks.append("Ring: the length that a curve was trained at.")
    if any(line.apart for panel in panels for line in panel.lines):
        remarks.append("Star: the whole split as one window, each token with all before it.")
    if view.metric == "accuracy":
        remarks += of_accuracies(panels)
    shown = {name for panel in panels for name in panel.levels}
    remarks += [
        f"Out of range: {name} baseline, {value:.4g}." for name, value in base.items() if name not in shown
    ]
    what = view.metric.replace("_", " ").capitalize() + ("" if view.task == "text" else f" of {view.task}")
    origin = f"{view.title}; {provenance(rows, view)}"
    size = (3.6 if any(len(line.x) > 2 for panel in panels for line in panel.lines) else 2.4, 3.1)
    return build(f"{what} by inference length", layout, origin, remarks, marks, size)


def split_into_panels(found: Sequence[Curve]) -> list[tuple[int | None, list[Curve]]]:
    """Training lengths that two or more curves share have a panel each: (training length, its curves).

    Any other curve is drawn with the nearest longer training length (ALiBi trained at L/2 beside the schemes
    trained at L), else with the longest. Where no length is shared, all curves have one panel.
    """
    shared, homes = homes_of([curve.train_length for curve in found])
    if not shared:
        lengths = {curve.train_length for curve in found}
        return [(lengths.pop() if len(lengths) == 1 else None, list(found))]
    return [(s, [c for c, home in zip(found, homes, strict=True) if home == s]) for s in shared]


def homes_of(train_lengths: Sequence[int]) -> tuple[list[int], list[int]]:
    """Training lengths that occur twice or more, and for each given length the one of them to draw it with."""
    shared = sorted({n for n in train_lengths if train_lengths.count(n) > 1})
    homes = [min((s for s in shared if s >= n), default=shared[-1]) for n in train_lengths] if shared else []
    return shared, homes


def curve_panels(
    found: Sequence[Curve], train_length: int | None, base: Mapping[str, float], dotted: Sequence[Curve] = ()
) -> list[Panel | None]:
    """The whole range of these curves and, if it helps, a close-up beside it."""
    drawn = [curve for curve in found if curve.lengths]
    metric = found[0].metric
    every = {n for curve in drawn for n in curve.lengths}
    lines = [_line(curve, train_length, every) for curve in drawn]
    trained = f"trained at {train_length}" if train_length is not None else "several training lengths"
    close = close_up(drawn)
    y_label = "perplexity per token" if metric == "perplexity" else metric.replace("_", " ")
    published = [_line(curve, train_length, every) for curve in dotted]
    panel = functools.partial(Panel, lines, trained=train_length, y_label=y_label, dotted=published)
    if metric == "accuracy":
        x_label = "length in the task's own measure, log axis"
        # Tasks are asked at few lengths, which need not be powers of two apart.
        ticks = len(every) <= 9
        readers = [{c.train_length: 1.0} | c.in_reach for c in drawn if c.in_reach]
        behind = [Line("", "", [float(n) for n in known], list(known.values())) for known in readers[:1]]
        panel = functools.partial(panel, x_label=x_label, tick_points=ticks, behind=behind)
        return [panel(trained, limits=(-0.03, 1.03), levels=dict(base)), None]
    log_y = _range(drawn) > CLOSE_UP_FROM and metric == "perplexity"
    whole = panel(trained + (", whole range" if close else ""), log_y=log_y)
    whole = replace(whole, levels={name: value for name, value in base.items() if fits(whole, value)})
    if close is None:
        return [whole, None]
    above = [line.name for line in lines if min(line.y) > close[1]]
    words = f"; above it: {', '.join(above) if len(above) <= 3 else f'{len(above)} curves'}" if above else ""
    return [whole, panel(f"{trained}, close-up{words}", limits=close)]


def close_up(found: Sequence[Curve]) -> tuple[float, float] | None:
    """The y axis of a close-up: the range of the good curves up to their training length, and how low they get.

    None if one axis is enough: the whole range is small, or the close-up would span most of it.
    """
    if not found or found[0].metric != "perplexity" or _range(found) <= CLOSE_UP_FROM:
        return None
    near = {
        id(c): [c.value(n) for n in c.lengths if n <= c.train_length] or [c.value(c.lengths[0])] for c in found
    }
    best = min(min(values) for values in near.values())
    company = [curve for curve in found if min(near[id(curve)]) <= COMPANY * best]
    low = min(c.shown(v) for c in company for runs in c.losses.values() for v in runs.values())
    high = max(v for curve in company for v in near[id(curve)] if v <= COMPANY * best) * 1.06
    values = [curve.value(n) for curve in found for n in curve.lengths]
    if math.log(high / low) > 0.6 * math.log(max(values) / min(values)):
        return None
    room = 0.06 * (high - low)
    return low - room, high + room


def missing(found: Sequence[Curve]) -> list[str]:
    """Why points are not drawn, one line per reason: no value, or no measurement at that length."""
    reasons: dict[str, list[tuple[Curve, int]]] = {}
    for curve in found:
        for length, reason in sorted(curve.refused.items()):
            reasons.setdefault(reason, []).append((curve, length))
    several = len({curve.train_length for curve in found}) > 1
    lines = []
    for reason, points in reasons.items():
        names = list(
            dict.fromkeys(label(c.position, c.variant, c.train_length if several else None) for c, _ in points)
        )
        who = ", ".join(names) if len(names) <= 3 else f"{len(names)} curves"
        lengths = sorted({length for _, length in points})
        at = f"from {lengths[0]} on" if len(lengths) > 2 else "at " + " and ".join(map(str, lengths))
        partly = any(length in curve.losses for curve, length in points)
        lines.append(f"{'A run is missing' if partly else 'Not drawn'}: {who} {at}: {reason}.")
    return lines


def _line(curve: Curve, train_length: int | None, every: set[int]) -> Line:
    x = curve.lengths
    y = [curve.value(n) for n in x]
    guest = train_length is not None and curve.train_length != train_length
    ends = any(n > x[-1] for n in curve.refused if n in every)
    notes = [curve.variant] if curve.variant else []
    notes += [f"ends at {x[-1]}"] if ends else []
    if len(every) <= 2:  # too few points for a shape, so the numbers are there
        notes.append(" to ".join(f"{value:.4g}" for value in y))
    several = max(len(runs) for runs in curve.losses.values()) > 1
    low, high = [], []
    if curve.metric == "accuracy":
        ends_of = [accuracy_interval(list(curve.losses[n].values()), curve.items[n]) for n in x]
        low, high = [a for a, _ in ends_of], [b for _, b in ends_of]
    elsewhere = curve.train_length in curve.losses and curve.train_length != train_length
    return Line(
        curve.position,
        label(curve.position, length=curve.train_length if guest or train_length is None else None),
        [float(n) for n in x],
        y,
        "; ".join(notes),
        low,
        high,
        [(n, curve.shown(v)) for n in x for v in curve.losses[n].values()] if several else [],
        guest or bool(curve.variant),
        (curve.train_length, curve.value(curve.train_length)) if elsewhere else None,
        ends,
        [(n, math.exp(math.fsum(v.values()) / len(v))) for n, v in sorted(curve.streamed.items())],
    )


def _range(found: Sequence[Curve]) -> float:
    values = [curve.value(n) for curve in found for n in curve.lengths]
    return max(values) / min(values) if values and min(values) > 0 else 1.0


# --- accuracies of tasks -------------------------------------------------------------------------


def draw_tasks(folder: Path, rows: Sequence[ResultRow], words: Mapping[str, str]) -> list[Path]:
    """Draw `tasks.png` and `.svg` if there are several tasks, `depths.png` and `.svg` if items have depths."""
    found = [view for view in views(rows) if view.metric == "accuracy"]
    drawn: list[Path] = []
    if len(found) > 1:
        panels = []
        for view in found:
            own = curves(rows, view, words)
            length = own[0].train_length if len({c.train_length for c in own}) == 1 else None
            panel = curve_panels(own, length, baselines(rows, view))[0]
            assert panel is not None
            panels.append(replace(panel, title=f"{view.task.replace('_', ' ')}, {panel.title}"))
        title, origin, remarks = "Accuracy by length, all tasks", _counts(rows, found), of_accuracies(panels)
        drawn += save_both(build(title, grid(panels, 2), origin, remarks, [], (3.6, 2.9)), folder, "tasks")
    if depths := _depth_panels(rows, found, words):
        origin = "items that are right in per cent, mean over seeds; " + _counts(rows, found)
        remark = "Dark: none, yellow: all. Above the white line the answer needs more than the last L tokens."
        cells = grid(depths, min(len(depths), 4))
        drawn += save_both(
            build("Accuracy by depth and length", cells, origin, [remark], [], (2.4, 2.0)), folder, "depths"
        )
    return drawn


def of_accuracies(panels: Sequence[Panel]) -> list[str]:
    """What is drawn beside the means, in words."""
    words = "Whiskers: 95% intervals over seeds and items; dots: single seeds. All seeds count."
    if all(panel.crowded for panel in panels):
        words = "Dots: single seeds; 95% intervals over seeds and items are in table.md. All seeds count."
    grey = ["Grey: a perfect reader of only the last L tokens."] if any(panel.behind for panel in panels) else []
    return [words, *grey]


def depth_panel(axis: Axes, curve: Curve, shares: Mapping[int, Mapping[str, float]]) -> None:
    """A heat map: lengths across, depths down (0: at the beginning)."""
    dress(axis, label(curve.position, curve.variant), look(curve.position).color)
    axis.grid(visible=False)
    lengths = sorted(shares)
    depths = sorted({depth for found in shares.values() for depth in found}, key=float)
    values = [[shares[n].get(depth, float("nan")) for n in lengths] for depth in depths]
    axis.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axis.set_xticks(range(len(lengths)), [str(n) for n in lengths])
    step = -(-len(depths) // 6)
    axis.set_yticks(range(0, len(depths), step), depths[::step])
    for x, length in enumerate(lengths):
        if length in curve.in_reach:
            border = (1 - curve.in_reach[length]) * len(depths) - 0.5
            axis.plot([x - 0.5, x + 0.5], [border] * 2, color="white", linewidth=1.2)
    for y, row in enumerate(values if len(values) <= MOST_NUMBERS else []):
        for x, value in enumerate(row):
            color = "white" if value < 0.6 else "black"
            axis.text(x, y, f"{100 * value:.0f}", ha="center", va="center", fontsize=6, color=color)
    axis.set_xlabel(f"length in tokens (trained at {curve.train_length})", fontsize=8, labelpad=1)
    axis.set_ylabel("depth", fontsize=8, labelpad=2)


def _depth_panels(rows: Sequence[ResultRow], found: Sequence[View], words: Mapping[str, str]) -> list[Cell]:
    """A panel for each curve whose rows have depths: length -> depth -> mean share over the runs."""
    cells: list[Cell] = []
    for view in found:
        parts = [row for row in rows if view_of(row) == view and "by_part" in row.extra]
        for curve in curves(rows, view, words):
            shares: dict[int, dict[str, float]] = {}
            for n in curve.lengths:
                own = [r.extra["by_part"] for r in parts if r.inference_length == n and r.run in curve.losses[n]]
                if own:
                    common = [depth for depth in own[0] if all(depth in one for one in own)]
                    shares[n] = {depth: sum(one[depth] for one in own) / len(own) for depth in common}
            if shares:
                cells.append(functools.partial(depth_panel, curve=curve, shares=shares))
    return cells


def _counts(rows: Sequence[ResultRow], found: Sequence[View]) -> str:
    own = [row for row in rows if row.run is not None and row.metric == "accuracy"]
    seeds = {row.seed for row in own if row.seed is not None}
    items = {row.n for row in own if row.n is not None}
    commits = sorted({(row.commit or "unknown")[:10] for row in own})
    most = f"{min(items):,} to {max(items):,}" if len(items) > 1 else f"{max(items, default=0):,}"
    tasks = f"{len(found)} task{'s' if len(found) > 1 else ''}"
    return f"{tasks}; {most} answers at each length; {len(seeds)} seeds; commit {' or '.join(commits)}"
