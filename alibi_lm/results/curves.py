"""Result rows as curves: one line a scheme and training length, its seeds together.

A view is what one figure or table may show together: one split, one mode, one stride.
A curve is what one line may show: one scheme, one training length, one variant of the settings.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath

from alibi_lm.results.rows import ResultRow

_RUN_NAME = re.compile(r"(?P<position>.+)_L(?P<length>\d+)_s(?P<seed>\d+)(?:_(?P<suffix>.+))?")


@dataclass(frozen=True, order=True)
class View:
    """Rows that are comparable at all: same split, mode and stride."""

    split: str
    mode: str
    stride: int | None = None

    @property
    def title(self) -> str:
        """For people: `validation, sliding window with stride 32`."""
        if self.mode == "nonoverlapping":
            return f"{self.split}, nonoverlapping windows"
        return f"{self.split}, sliding window with stride {self.stride}"

    @property
    def slug(self) -> str:
        """For file names: `validation_sliding32`."""
        return f"{self.split}_{self.mode}{'' if self.stride is None else self.stride}"


@dataclass(frozen=True)
class Curve:
    """Loss of one scheme and training length by inference length, for each of its runs."""

    position: str
    train_length: int
    variant: str
    """Empty for the experiment's own settings, else what tells the variant apart."""
    losses: dict[int, dict[str, float]] = field(default_factory=dict)
    """inference_length -> run -> mean nats per token."""
    refused: dict[int, str] = field(default_factory=dict)
    """inference_length -> why there is no value."""
    seeds: dict[str, int | None] = field(default_factory=dict)
    """run -> seed."""

    @property
    def lengths(self) -> list[int]:
        """Inference lengths with a value, rising."""
        return sorted(self.losses)

    def perplexity(self, length: int) -> float:
        """Perplexity of the mean loss over the runs (the geometric mean of their perplexities)."""
        values = self.losses[length].values()
        return math.exp(math.fsum(values) / len(values))

    def ratio(self, length: int) -> float | None:
        """Perplexity at `length` over that at the training length, over the runs that have both."""
        own = self.losses.get(self.train_length, {})
        both = [run for run in self.losses.get(length, {}) if run in own]
        if not both:
            return None
        return math.exp(math.fsum(self.losses[length][run] - own[run] for run in both) / len(both))


def views(rows: Iterable[ResultRow]) -> list[View]:
    """The views of these rows; validation before other splits, nonoverlapping before sliding."""
    found = {View(row.split, row.mode, row.stride) for row in rows if row.run is not None}
    return sorted(
        found, key=lambda v: (v.split != "validation", v.split, v.mode != "nonoverlapping", v.stride or 0)
    )


def curves(rows: Iterable[ResultRow], view: View) -> list[Curve]:
    """The curves of one view, by training length (longest first) and scheme."""
    found: dict[tuple[str, int, str], Curve] = {}
    for row in rows:
        if row.run is None or View(row.split, row.mode, row.stride) != view:
            continue
        assert row.train_length is not None and row.inference_length is not None  # ResultRow checks it
        key = (row.position, row.train_length, variant_of(row))
        curve = found.setdefault(key, Curve(*key))
        curve.seeds[row.run] = row.seed
        if row.loss is None:
            curve.refused[row.inference_length] = row.reason or "no value"
        else:
            curve.losses.setdefault(row.inference_length, {})[row.run] = row.loss
    return sorted(found.values(), key=lambda c: (-c.train_length, c.position, c.variant))


def baselines(rows: Iterable[ResultRow], view: View) -> dict[str, float]:
    """Perplexity of each baseline on the view's split, for example {'unigram': 700.0}.

    A baseline uses no context, so its value holds for every length and mode.
    """
    return {
        row.position: math.exp(row.loss)
        for row in rows
        if row.run is None and row.split == view.split and row.loss is not None
    }


def variant_of(row: ResultRow) -> str:
    """What tells a run's settings from the experiment's own, read from the run's name.

    Runs are seeds of each other only when their names say so; a folder that the user named
    differently is a variant of its own, because nothing vouches that its settings are the same.
    """
    assert row.run is not None
    name, plus, changes = PurePath(row.run).name.partition("+")
    match = _RUN_NAME.fullmatch(name)
    own = (row.position, str(row.train_length), str(row.seed))
    if match is None or (match["position"], match["length"], match["seed"]) != own:
        return name + plus + changes
    return (match["suffix"] or "") + plus + changes


def ordered_positions(found: Sequence[Curve]) -> list[str]:
    """Schemes of these curves by name, each once."""
    return sorted({curve.position for curve in found})
