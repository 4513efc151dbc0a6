"""Extrapolation by stage of training: the checkpoints of a run, each against itself at the training length."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from alibi_lm.results.curves import CHECKPOINT, VALIDATION, curves, step_of, view_of
from alibi_lm.results.rows import ResultRow
from alibi_lm.study.records import RunRecord

FEWEST = 3
"""Stages of a curve that is worth drawing, its end included."""


@dataclass(frozen=True)
class Stage:
    """One scheme at one multiple of its training length, over the stages of its training."""

    position: str
    train_length: int
    variant: str
    factor: int
    """Inference length over training length."""
    ratios: dict[int, list[float]]
    """Step, rising -> perplexity over that at the training length, of each seed."""

    def mean(self, step: int) -> float:
        """Geometric mean over the seeds."""
        values = [math.log(value) for value in self.ratios[step]]
        return math.exp(math.fsum(values) / len(values))


def stages_of(
    rows: Sequence[ResultRow], records: Mapping[str, RunRecord], words: Mapping[str, str] | None = None
) -> list[Stage]:
    """Every curve that was tested at three or more stages, at each power-of-two multiple of its training length.

    Args:
        rows: of one experiment; those of kept checkpoints have `checkpoint` among their changes.
        records: of its runs, which say at which step training ended.
        words: recipes of the runs.
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
    found: dict[tuple[str, int, str, int], dict[int, list[float]]] = {}
    for step, of_step in sorted(by_step.items()):
        for curve in curves({row.key: row for row in of_step}.values(), VALIDATION, words):
            own = curve.losses.get(curve.train_length, {})
            for factor, length in curve.doublings():
                if both := [run for run in curve.losses[length] if run in own]:
                    ratios = found.setdefault((curve.position, curve.train_length, curve.variant, factor), {})
                    ratios[step] = [math.exp(curve.losses[length][run] - own[run]) for run in both]
    return [Stage(*key, ratios) for key, ratios in sorted(found.items()) if len(ratios) >= FEWEST]
