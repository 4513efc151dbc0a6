"""Extrapolation by stage of training: each checkpoint of a run relative to itself at the training length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from alibi_lm.results.curves import CHECKPOINT, VALIDATION, Curve, curves, step_of, view_of
from alibi_lm.results.rows import ResultRow
from alibi_lm.study.records import RunRecord

FEWEST = 3
"""How many stages, including the end, a curve needs to be drawn."""


def stages_of(
    rows: Sequence[ResultRow], records: Mapping[str, RunRecord], words: Mapping[str, str] | None = None
) -> list[tuple[int, Curve]]:
    """Every curve that was tested at three or more stages, at each power-of-two multiple of its training length.

    Args:
        rows: rows of one experiment; those of kept checkpoints list `checkpoint` in their changes.
        records: records of its runs, which say at which step training ended.
        words: recipes of the runs.

    Returns:
        The multiple, and a curve over training steps, rising: the perplexity at the multiple over that at the
        training length, both after that step.
    """
    by_step: dict[int, list[ResultRow]] = {}
    for row in rows:
        if row.run is None or view_of(row) != VALIDATION:
            continue
        end = records[row.run].config.get("steps") if row.run in records else None
        step = end if (named := step_of(row)) is None else named
        if isinstance(step, int):
            changes = {key: value for key, value in row.changes.items() if key != CHECKPOINT}
            by_step.setdefault(step, []).append(replace(row, changes=changes))
    found: dict[tuple[str, int, str, int], Curve] = {}
    for step, of_step in sorted(by_step.items()):
        for curve in curves({row.key: row for row in of_step}.values(), VALIDATION, words):
            name = (curve.position, curve.train_length, curve.variant)
            own = curve.losses.get(curve.train_length, {})
            for factor, length in curve.doublings():
                if ratios := {run: loss - own[run] for run, loss in curve.losses[length].items() if run in own}:
                    found.setdefault((*name, factor), Curve(*name)).losses[step] = ratios
    return [(key[-1], curve) for key, curve in sorted(found.items()) if len(curve.losses) >= FEWEST]
