"""Pairs of steps: an implementation and the reference take turns, one short step each.

Two neighbouring steps meet the machine in the same state, so other work on the machine hardly changes their ratio.
A change of its speed between the two spoils only that pair; it hardly moves the median over all pairs, and
quartiles say how much the pairs differ.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from alibi_lm.results.speeds import PAIRS
from benchmarks.subjects import CannotRun, Implementation, Kind, Task


@dataclass
class Contest:
    """One implementation beside the reference at one length.

    The reference may be the subject itself, where nothing else is measured: then each step is timed once.
    """

    reference: Implementation
    subject: Implementation
    task: Task
    pairs: list[dict[Kind, tuple[float, float]]] = field(default_factory=list)
    """Seconds of the reference's step and of the subject's next to it, for training and evaluation."""
    matmul: list[float] = field(default_factory=list)
    """FLOP/s of a large matrix product next to each pair of training steps."""
    seconds: float = 0.0
    """Wall time spent on it."""
    longest: float = 0.0
    """Wall time of the longest pair."""
    reason: str | None = None
    """Why the measurement was given up; empty if it was not."""

    def run(self, pairs: int, matmul: Callable[[], float], now: Callable[[], float] = time.perf_counter) -> None:
        """Measure more pairs; `matmul` measures the FLOP/s of a matrix product, `now` is a clock."""
        began = now()
        try:
            self._prepare()
            for _ in range(pairs):
                pair_began = now()
                self._measure_pair(matmul)
                self.longest = max(self.longest, now() - pair_began)
        except CannotRun as error:
            self.reason = str(error)
            print(f"length {self.task.length}, {error}", file=sys.stderr)
        if self.subject is not self.reference:
            self.subject.release()
        self.seconds += now() - began

    def _prepare(self) -> None:
        length = self.task.length
        for one in (self.reference, self.subject):
            if length not in one.ready:
                one.ready[length] = self._trains(one)
            if not one.ready[length]:
                self.task = replace(self.task, trains=False)

    def _trains(self, one: Implementation) -> bool:
        """Prepare it, only for evaluation if it cannot train; returns whether it trains."""
        length = self.task.length
        for task in (self.task, replace(self.task, trains=False)):
            try:
                one.peak_memory_bytes[length] = one.prepare(task)
                return task.trains
            except CannotRun as error:
                if not task.trains:
                    raise CannotRun(f"{one.label}: {error}") from None
                print(f"length {length}, training, {one.label}: {error}", file=sys.stderr)
        raise AssertionError("the second task does not train")

    def _measure_pair(self, matmul: Callable[[], float]) -> None:
        pair: dict[Kind, tuple[float, float]] = {}
        kinds: tuple[Kind, ...] = ("train", "eval") if self.task.trains else ("eval",)
        for kind in kinds:
            if self.subject is self.reference:
                pair[kind] = (self.subject.seconds(kind, self.task),) * 2
            elif len(self.pairs) % 2 == 0:
                of_reference = self.reference.seconds(kind, self.task)
                pair[kind] = of_reference, self.subject.seconds(kind, self.task)
            else:  # the other way round, so that neither is always second
                of_subject = self.subject.seconds(kind, self.task)
                pair[kind] = self.reference.seconds(kind, self.task), of_subject
            if kind == "train":
                speed = matmul()
        self.pairs.append(pair)
        if "train" in pair:
            self.matmul.append(speed)

    def steps(self, kind: Kind, of_reference: bool = False) -> list[float]:
        """Seconds of each step of the subject, or of the reference's steps next to them."""
        return [pair[kind][0 if of_reference else 1] for pair in self.pairs if kind in pair]

    def ratios(self, kind: Kind) -> list[float]:
        """Speed of the subject over the reference's, pair by pair."""
        return [a / b for a, b in zip(self.steps(kind, True), self.steps(kind), strict=True)]


@dataclass(frozen=True)
class Ratio:
    """Median of paired ratios, with their quartiles."""

    median: float
    low: float
    high: float
    settled: bool
    """Whether there are at least seven pairs with quartiles no further apart than the median is from 1."""


def ratio(values: Sequence[float]) -> Ratio | None:
    """The median of paired ratios and how far it can be trusted; None without values."""
    if not values:
        return None
    low, middle, high = (
        statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * [values[0]]
    )
    return Ratio(middle, low, high, len(values) >= PAIRS and high - low <= abs(middle - 1))


def measure(
    contests: Sequence[Contest],
    seconds: float,
    matmul: Callable[[], float],
    after: Callable[[Contest], None],
    turn: int = 1,
    now: Callable[[], float] = time.perf_counter,
) -> None:
    """Measure every contest once, then continue with the one that has had least time, those below `PAIRS` first.

    Args:
        contests: what to measure.
        seconds: no pair that would end after this time begins, other than the first of each contest.
        matmul: see `Contest.run`.
        after: called after each turn.
        turn: pairs that are measured of one contest before the next one's turn.
        now: a clock.
    """
    deadline = now() + seconds
    for contest in sorted(contests, key=lambda c: c.task.length):
        contest.run(turn, matmul, now)
        after(contest)
    while True:
        left = deadline - now()
        fitting = [c for c in contests if c.reason is None and c.longest * turn < left]
        if not fitting:
            return
        contest = min(fitting, key=lambda c: (len(c.pairs) >= PAIRS, c.seconds))
        contest.run(turn, matmul, now)
        after(contest)
