"""Figures and a table of accuracies: all tasks of an experiment together, and needles by depth and length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from alibi_lm.results.curves import Curve, View, baselines, curves, views
from alibi_lm.results.rows import ResultRow
from alibi_lm.study import figures
from alibi_lm.study.plots import build, dress, grid, save_both
from alibi_lm.study.style import label, look

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_tasks(folder: Path, rows: Sequence[ResultRow], words: Mapping[str, str]) -> list[Path]:
    """`tasks.png` and `.svg` where there are several tasks, `depths.png` and `.svg` where items have depths."""
    found = [view for view in views(rows) if view.metric == "accuracy"]
    drawn: list[Path] = []
    if len(found) > 1:
        panels = []
        for view in found:
            own = curves(rows, view, words)
            length = own[0].train_length if len({c.train_length for c in own}) == 1 else None
            panel = figures.curve_panels(own, length, baselines(rows, view))[0]
            assert panel is not None
            panels.append(figures.replace(panel, title=f"{view.task.replace('_', ' ')}, {panel.title}"))
        remark = "Whiskers: 95% intervals over seeds and items; dots: single seeds. All seeds count."
        title, origin = "Accuracy by length, all tasks", _counts(rows, found)
        drawn += save_both(build(title, grid(panels, 2), origin, [remark], [], (3.6, 2.9)), folder, "tasks")
    depths = [partial(depth_panel, curve=curve, shares=shares) for curve, shares in _by_depth(rows, found, words)]
    if depths:
        origin = "items that are right in per cent, mean over seeds; " + _counts(rows, found)
        remark = "Above the white line needles stand further from the question than the training length."
        cells = grid(depths, min(len(depths), 4))
        drawn += save_both(
            build("Accuracy by depth and length", cells, origin, [remark], [], (2.4, 2.0)), folder, "depths"
        )
    return drawn


def depth_panel(axis: Axes, curve: Curve, shares: Mapping[int, Mapping[str, float]]) -> None:
    """A heat map: lengths across, depths down (0: at the beginning)."""
    dress(axis, label(curve.position, curve.variant), look(curve.position).color)
    axis.grid(visible=False)
    lengths = sorted(shares)
    depths = sorted({depth for found in shares.values() for depth in found}, key=float)
    values = [[shares[n].get(depth, float("nan")) for n in lengths] for depth in depths]
    axis.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axis.set_xticks(range(len(lengths)), [str(n) for n in lengths])
    axis.set_yticks(range(0, len(depths), 2), depths[::2])
    for x, length in enumerate(lengths):
        if length > curve.train_length:  # a needle at depth d stands (1 - d) n before the end
            border = (1 - curve.train_length / length) * (len(depths) - 1)
            axis.plot([x - 0.5, x + 0.5], [border - 0.25] * 2, color="white", linewidth=1.2)
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            color = "white" if value < 0.6 else "black"
            axis.text(x, y, f"{100 * value:.0f}", ha="center", va="center", fontsize=6, color=color)
    axis.set_xlabel(f"length in tokens (trained at {curve.train_length})", fontsize=8, labelpad=1)
    axis.set_ylabel("depth", fontsize=8, labelpad=2)


def _by_depth(
    rows: Sequence[ResultRow], accuracies: Sequence[View], words: Mapping[str, str]
) -> list[tuple[Curve, dict[int, dict[str, float]]]]:
    """Curves whose rows tell depths apart: length -> depth -> mean share over the runs."""
    found = []
    for view in accuracies:
        for curve in curves(rows, view, words):
            shares: dict[int, dict[str, float]] = {}
            for length in curve.lengths:
                own = [
                    row.extra["by_part"]
                    for row in rows
                    if row.run in curve.losses[length]
                    and (row.task, row.inference_length) == (view.task, length)
                    and row.split == view.split
                    and "by_part" in row.extra
                ]
                if own:
                    shares[length] = {depth: sum(one[depth] for one in own) / len(own) for depth in own[0]}
            if shares:
                found.append((curve, shares))
    return found


def _counts(rows: Sequence[ResultRow], found: Sequence[View]) -> str:
    own = [row for row in rows if row.run is not None and row.metric == "accuracy"]
    seeds = {row.seed for row in own if row.seed is not None}
    items = {row.n for row in own if row.n is not None}
    commits = sorted({(row.commit or "unknown")[:10] for row in own})
    most = f"{min(items):,} to {max(items):,}" if len(items) > 1 else f"{max(items, default=0):,}"
    tasks = f"{len(found)} task{'s' if len(found) > 1 else ''}"
    return f"{tasks}; {most} answers at each length; {len(seeds)} seeds; commit {' or '.join(commits)}"
