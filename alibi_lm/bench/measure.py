"""Paired, interleaved measurements.

A round at one length times every subject once, one after the other, each with a matrix product beside it. Ratios
are taken inside a round, so that what slows the machine for a while slows both sides; the median over rounds is
reported, with its quartiles. Where another round of all subjects would take too long, one of our own is taken.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from alibi_lm.bench.subjects import Implementation, Measurement, Task
from alibi_lm.model.transformer import ModelConfig


@dataclass
class Times:
    """Seconds of each round, for one subject at one length; None where it is not measured or failed."""

    train: list[float | None] = field(default_factory=list)
    evaluate: list[float | None] = field(default_factory=list)
    flops_per_second: list[float | None] = field(default_factory=list)
    """Of a matrix product beside the training step."""
    peak_memory_bytes: int | None = None


@dataclass
class Round:
    """All measurements at one length."""

    length: int
    batch: int
    subjects: Sequence[Implementation]
    vocab_size: int
    trains: bool
    """Whether training is measured too."""
    clock: str = "wall"
    """See `BenchConfig.clock`."""
    times: dict[str, Times] = field(default_factory=lambda: defaultdict(Times))
    seconds: list[float] = field(default_factory=list)
    """Wall time of each round."""
    seconds_of_ours: float = 0.0
    """Of those, in the first round, for our own subjects."""

    def run(self, ours_alone: bool = False) -> None:
        """Measure every subject once more, or every one of ours.

        Args:
            ours_alone: leave the peers out.
        """
        began = time.perf_counter()
        for subject in self.subjects:
            times = self.times[subject.label + subject.backend]
            subject_began = time.perf_counter()
            first = not times.evaluate
            if ours_alone and not subject.ours:
                measured = Measurement(None, None)
            else:
                task = Task(self.batch, self.length, self.vocab_size, self.trains, self.clock, first)
                measured = subject.measure(task)
            times.train.append(measured.train)
            times.evaluate.append(measured.evaluate)
            times.flops_per_second.append(measured.flops_per_second)
            if first:
                times.peak_memory_bytes = measured.peak_memory_bytes
            if subject.ours and not self.seconds:
                self.seconds_of_ours += time.perf_counter() - subject_began
        self.seconds.append(time.perf_counter() - began)

    def seconds_of(self, kind: str, *subjects: Implementation) -> list[tuple[int, tuple[float, ...]]]:
        """The rounds that count for these subjects, and their seconds in each.

        Those that measured all of them; not the first, which also warms up, where there are three or more.
        """
        columns = [getattr(self.times[s.label + s.backend], kind) for s in subjects]
        rounds = [(i, row) for i, row in enumerate(zip(*columns, strict=True)) if all(row)]
        return rounds[1:] if len(rounds) >= 3 else rounds

    def ratios(self, subject: Implementation, kind: str, of: Implementation) -> list[float]:
        """Speed of a subject over that of another in each round that counts."""
        return [theirs / mine for _, (mine, theirs) in self.seconds_of(kind, subject, of)]

    def tokens_per_second(self, subject: Implementation, kind: str) -> float | None:
        """Median over the rounds that count."""
        values = [seconds for _, (seconds,) in self.seconds_of(kind, subject)]
        return self.batch * self.length / statistics.median(values) if values else None

    def utilisation(self, subject: Implementation, sizes: ModelConfig, vocab_size: int) -> float | None:
        """FLOPs of the training step over what the machine's matrix product does beside it."""
        flops = self.batch * self.length * training_flops(sizes, vocab_size, self.length)
        speeds = self.times[subject.label + subject.backend].flops_per_second
        values = [flops / s / speed for i, (s,) in self.seconds_of("train", subject) if (speed := speeds[i])]
        return statistics.median(values) if values else None


def spread(values: list[float]) -> tuple[float, float, float] | None:
    """Median and quartiles."""
    if not values:
        return None
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


def training_flops(sizes: ModelConfig, vocab_size: int, length: int) -> float:
    """Floating-point operations of forward and backward for one token.

    6 a weight that multiplies the token (2 forward, 4 backward), and causal attention: a token meets length / 2
    keys, twice (scores, weighted sum), at 2 operations a dimension, times 3 for the backward pass.
    An adaptive vocabulary counts its first band alone, so that utilisation is a lower bound.
    """
    dim = sizes.model_dim
    words = sizes.adaptive_cutoffs[0] + len(sizes.adaptive_cutoffs) if sizes.adaptive_cutoffs else vocab_size
    weights = sizes.num_layers * (4 * dim * dim + 2 * dim * sizes.ffn_dim) + words * dim
    return 6 * weights + 6 * sizes.num_layers * dim * length


def repeat(rounds: list[Round], seconds: float, after: Callable[[Round], None]) -> None:
    """Run every round once, then again and again, so that each gets its share of the time.

    Args:
        rounds: what to measure.
        seconds: no round that would end after this time begins, other than the first of each length.
        after: called after each round.
    """
    deadline = time.perf_counter() + seconds
    for one in sorted(rounds, key=lambda r: r.length):
        one.run()
        after(one)
    while True:
        left = deadline - time.perf_counter()
        whole = [r for r in rounds if max(r.seconds) < left]
        # Lengths get equal time; a long one, whose peers no longer fit, goes on with ours alone.
        fitting = [r for r in rounds if r in whole or r.seconds_of_ours < left]
        if not fitting:
            return
        one = min(fitting, key=lambda r: (sum(r.seconds), r.length))
        one.run(ours_alone=one not in whole)
        after(one)
