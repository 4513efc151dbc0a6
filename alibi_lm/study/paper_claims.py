"""Statements of the paper and others that results can confirm or refute; they are listed in paper_claims.yaml.

A claim compares two sides, by perplexity of the left over that of the right, at every training length L at which
both were run; for a task by accuracies, left minus right. With one side it compares a value with a bound: an
accuracy, or a number of a view. The benchmark decides claims about speed. A claim with several `parts` holds if
all of them do. Claims about a task name it in both sides.
"""

from __future__ import annotations

import functools
import importlib.resources
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

NEAR = 0.025
"""Share by which a length may differ from the wanted one: the paper has 1,012 and 2,024, not 1,024 and 2,048."""
Relation = Literal["below", "above", "within"]


@dataclass(frozen=True)
class Side:
    """Which runs, and at which inference lengths; lengths are multiples of L."""

    position: str
    at: float = 1.0
    which: Literal["at", "every beyond", "longest from"] = "at"
    """The length `at` times L itself, every longer one, or the longest one if it is at least that."""
    train: float = 1.0
    stride: int | None = None
    """Stride of sliding windows; None: nonoverlapping ones. For stride 1 analyse.py view=fixed is used too."""
    where: dict[str, Any] = field(default_factory=dict)
    """Settings of the run's config.yaml that must have these values."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Settings changed for the test, such as {"position.scaling": "yarn"}."""
    stage: float = 1.0
    """Share of the training after which the run was tested, from a kept checkpoint."""
    task: str = "text"
    """Task; for others than text, its accuracy is compared."""
    split: str = "validation"
    beyond: bool = False
    """For a task: only the answers that the last L tokens do not give."""
    view: str = ""
    """A view of scripts/analyse.py that has the `number`; empty: result rows."""
    number: str = ""
    """Name of a number in the view's points; `<name>/L`: as a share of the training length."""

    @property
    def metric(self) -> str:
        """The metric that is compared."""
        return "number" if self.number else "perplexity" if self.task == "text" else "accuracy"

    def lengths(self, train_length: int, known: Iterable[int]) -> list[int]:
        """The inference lengths that the side means, among those measured; empty if none fits.

        Args:
            train_length: the value of L.
            known: measured inference lengths.
        """
        measured, wanted = sorted(set(known)), self.at * train_length
        if self.which == "every beyond":
            return [n for n in measured if n > wanted]
        if self.which == "longest from":
            return [n for n in measured if n >= wanted * (1 - NEAR)][-1:]
        best = min(measured, key=lambda n: (abs(math.log(n / wanted)), n), default=None)
        return [best] if best is not None and abs(best / wanted - 1) <= NEAR else []

    @property
    def words(self) -> str:
        """The lengths, for messages: `2L`, `every length beyond L`."""
        times = f"{self.at:g}L" if self.at != 1 else "L"
        return {"at": times, "every beyond": f"every length beyond {times}"}.get(self.which, f"{times} or more")


@dataclass(frozen=True)
class Claim:
    """One statement and how to check it."""

    id: str
    statement: str = ""
    source: str = ""
    left: Side | None = None
    right: Side | None = None
    relation: Relation = "below"
    """Left over right is below or above `bound`, or within 1 / bound and bound."""
    bound: float = 1.0
    """Bound on the ratio; for accuracies on left minus right, and for one side on its value."""
    from_L: bool = False
    """Compare how much each side loses beyond L: its perplexity over its own at L."""
    equal_time: bool = False
    """Compare the sides after equal training time, by the benchmark's speeds and the checkpoints kept."""
    train_lengths: Sequence[int] = ()
    """Values of L; empty: all training lengths in the results."""
    min_lengths: int = 1
    """Training lengths without which a claim about all of them is not confirmed."""
    measure: Literal["train_ratio", "eval_ratio"] | None = None
    """A speed of the benchmark to compare at equal length, instead of perplexity."""
    parts: Sequence[Claim] = ()
    """Claims that it consists of, instead of sides: it holds if all of them do."""
    min_parts: int = 0
    """How many parts must have been run for a verdict; 0: all of them."""
    given: bool = False
    """For a part: a condition. If it does not hold for the runs, the claim says nothing about them."""

    @property
    def seeds_needed(self) -> int:
        """Smallest number of seeds that settles it; one is enough only if runs are compared with themselves."""
        if self.left is None or self.left.metric != "perplexity" or self.right is None:
            return 1 if self.left and self.left.view == "decomposition" else 2
        sides = [(side.position, side.train, side.where, side.stage) for side in (self.left, self.right)]
        return 1 if sides[0] == sides[1] else 2


@functools.cache
def paper_claims() -> dict[str, list[Claim]]:
    """Title of a group -> its claims."""
    file = importlib.resources.files("alibi_lm.study") / "paper_claims.yaml"
    return {title: list(map(_claim, group)) for title, group in yaml.safe_load(file.read_text("utf-8")).items()}


def _claim(values: Mapping[str, Any]) -> Claim:
    sides = {name: Side(**values[name]) for name in ("left", "right") if name in values}
    return Claim(**{**values, **sides, "parts": [_claim(part) for part in values.get("parts", ())]})
