"""Simulation of the coverage of the intervals in `alibi_lm.results.statistics`; design: docs/statistics.md."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

from alibi_lm.files import write_text
from alibi_lm.results.statistics import VarianceParts, accuracy_interval, half_width, variance_parts
from alibi_lm.settings import require

DOCUMENTS = 60
MEAN_LENGTH = 3600
LENGTH_SPREAD = 0.71  # standard deviation of log length: 60 documents then weigh as much as 36 equal ones
SEED_NOISE = (0.1, 0.3, 1.0, 3.0, 6.0, 10.0)
INTERACTION = (0.1, 1.0, 5.0)
LEARNED = (0.1, 0.2, 0.35, 0.5, 0.65, 0.9)
FAMILY = 6


def draw_tokens(rng: np.random.Generator, replicates: int) -> np.ndarray:
    """Document lengths (replicates, DOCUMENTS) in tokens."""
    logs = LENGTH_SPREAD * rng.standard_normal((replicates, DOCUMENTS)) - LENGTH_SPREAD**2 / 2
    return np.maximum(1.0, np.round(MEAN_LENGTH * np.exp(logs)))


def unit_draws(rng: np.random.Generator, shape: tuple[int, ...], law: str) -> np.ndarray:
    """Draws with mean 0 and variance 1: "normal", "uniform", or "skewed" (gamma of shape 2, skewness 1.4)."""
    if law == "skewed":
        return (rng.gamma(2, size=shape) - 2) / np.sqrt(2)
    return rng.standard_normal(shape) if law == "normal" else rng.uniform(-np.sqrt(3), np.sqrt(3), shape)


def draw_errors(
    rng: np.random.Generator,
    tokens: np.ndarray,
    seeds: int,
    noise: float,
    interaction: float,
    documents: str = "normal",
    runs: str = "normal",
) -> np.ndarray:
    """Sums of nats (replicates, seeds, documents) around a true mean of 0, in units of the document effect.

    Args:
        rng: source of the draws.
        tokens: (replicates, documents), document lengths.
        seeds: number of runs that score every document.
        noise: standard deviation of the seed effect relative to that of the mean over documents.
        interaction: standard deviation of the seed x document effect relative to that of the document effect.
        documents: law of the document effects, see `unit_draws`.
        runs: law of the seed effects.
    """
    replicates = len(tokens)
    document = unit_draws(rng, (replicates, 1, DOCUMENTS), documents)
    of_mean = np.sqrt(np.exp(LENGTH_SPREAD**2) / DOCUMENTS)
    seed = noise * of_mean * unit_draws(rng, (replicates, seeds, 1), runs)
    crossed = rng.standard_normal((replicates, seeds, DOCUMENTS), dtype=np.float32)
    return (document + seed + interaction * crossed) * tokens[:, None, :]


def covered(parts: VarianceParts, seeds: int, level: float = 0.95) -> np.ndarray:
    """Which intervals contain the true mean, 0."""
    return np.abs(parts.estimate) <= half_width(parts.seed, parts.document, seeds, parts.document_df, level)


def interval_coverage(
    replicates: int, seeds: int, noise: float, interaction: float, documents: str = "normal", runs: str = "normal"
) -> float:
    """Share of 95% intervals for a mean, or a paired difference (computed alike), that contain the truth."""
    rng = np.random.default_rng([seeds, int(10 * noise), int(10 * interaction)])
    tokens = draw_tokens(rng, replicates)
    parts = variance_parts(draw_errors(rng, tokens, seeds, noise, interaction, documents, runs), tokens)
    return float(covered(parts, seeds).mean())


def unpaired_coverage(replicates: int, seeds: tuple[int, int], noise: float) -> float:
    """The same for a difference of two sets of runs that share documents but not seeds."""
    rng = np.random.default_rng([*seeds, int(10 * noise)])
    tokens = draw_tokens(rng, replicates)
    sides = [draw_errors(rng, tokens, count, noise, 0.1) for count in seeds]
    a, b = (variance_parts(side, tokens) for side in sides)
    both = variance_parts((sides[0].mean(1) - sides[1].mean(1))[:, None], tokens)
    parts = both._replace(seed=a.seed + b.seed, interaction=a.interaction + b.interaction)
    return float(covered(parts, min(seeds)).mean())


def family_false_positives(
    replicates: int, seeds: int, noise: float, interaction: float, correlation: float, documents: str = "normal"
) -> float:
    """Share of families of equal schemes in which some length gets a verdict of "yes" or "no"."""
    rng = np.random.default_rng([seeds, int(10 * noise), int(10 * interaction), int(100 * correlation)])
    wrong = 0
    for start in range(0, replicates, 1000):
        tokens = draw_tokens(rng, min(1000, replicates - start))
        shared = draw_errors(rng, tokens, seeds, noise, interaction, documents)
        found = np.zeros(len(tokens), dtype=bool)
        for _ in range(FAMILY):
            own = draw_errors(rng, tokens, seeds, noise, interaction, documents)
            parts = variance_parts(np.sqrt(correlation) * shared + np.sqrt(1 - correlation) * own, tokens)
            found |= ~covered(parts, seeds, 1 - 0.05 / FAMILY)
        wrong += int(found.sum())
    return wrong / replicates


def all_or_nothing_coverage(seeds: int, share: float, items: int = 2000) -> float:
    """Coverage of the accuracy's interval if each seed learns a task completely or not at all; exact.

    Args:
        seeds: number of runs.
        share: probability that a run learns the task, so the true mean accuracy.
        items: test items, all right or all wrong.
    """
    total = 0.0
    for learned in range(seeds + 1):
        low, high = accuracy_interval([1.0] * learned + [0.0] * (seeds - learned), items)
        total += (
            math.comb(seeds, learned) * share**learned * (1 - share) ** (seeds - learned) * (low <= share <= high)
        )
    return total


def tables(replicates: int) -> Iterator[str]:
    """The measured tables of docs/statistics.md as Markdown lines."""

    def row(name: str, values: list[float]) -> str:
        return f"| {name} | " + " | ".join(f"{100 * value:.1f}" for value in values) + " |"

    def head(first: str, columns: tuple[float, ...]) -> Iterator[str]:
        yield f"| {first} | " + " | ".join(f"{c:g}" for c in columns) + " |"
        yield "|---|" + "--:|" * len(columns)

    error = 100 * np.sqrt(0.05 * 0.95 / replicates)
    yield f"{replicates:,} replicates a cell: a true 95.0 shows a standard error of {error:.2f}.\n"
    yield "Coverage of the 95% interval in percent, by seed noise:\n"
    yield from head("seeds, documents, interaction", SEED_NOISE)
    for seeds, law, interaction in product((2, 3, 5), ("normal", "skewed"), INTERACTION):
        cells = [interval_coverage(replicates, seeds, n, interaction, law) for n in SEED_NOISE]
        yield row(f"{seeds}, {law}, {interaction:g}", cells)
    yield "\nSeed effects that are not normal (normal documents, interaction 0.1):\n"
    yield from head("seeds, seed effects", SEED_NOISE)
    for seeds, law in product((3, 5), ("uniform", "skewed")):
        cells = [interval_coverage(replicates, seeds, n, 0.1, runs=law) for n in SEED_NOISE]
        yield row(f"{seeds}, {law}", cells)
    yield "\nCoverage of the 95% interval of a difference with documents in common and seeds not:\n"
    yield from head("seeds of A and B", SEED_NOISE)
    for pair in ((2, 5), (3, 3), (3, 5)):
        yield row(f"{pair[0]} and {pair[1]}", [unpaired_coverage(replicates, pair, n) for n in SEED_NOISE])
    yield "\nCoverage of the 95% interval of an accuracy, by the share of seeds that learn the task:\n"
    yield from head("seeds", LEARNED)
    for seeds in (3, 5, 10):
        yield row(str(seeds), [all_or_nothing_coverage(seeds, share) for share in LEARNED])
    few = replicates // 4
    yield f"\nVerdicts on equal schemes at {FAMILY} lengths: families with any wrong verdict, in percent"
    yield f"({few:,} families a cell):\n"
    yield from head("seeds, documents, correlation of lengths, interaction", SEED_NOISE)
    for seeds, correlation, interaction in product((2, 3, 5), (0.0, 0.9), (0.1, 1.0)):
        cells = [family_false_positives(few, seeds, n, interaction, correlation) for n in SEED_NOISE]
        yield row(f"{seeds}, normal, {correlation:g}, {interaction:g}", cells)
    for seeds, correlation in product((3, 5), (0.0, 0.9)):
        cells = [family_false_positives(few, seeds, n, 0.1, correlation, "skewed") for n in SEED_NOISE]
        yield row(f"{seeds}, skewed, {correlation:g}, 0.1", cells)


@dataclass
class CoverageConfig:
    """Settings of `scripts/coverage.py`."""

    replicates: int = 10000
    """Simulated experiments per cell."""
    page: str | None = None
    """A page whose measured tables are replaced, such as docs/statistics.md; null: only print."""

    def __post_init__(self) -> None:
        require(self.replicates >= 40, f"replicates = {self.replicates}. Use 40 or more.")


def measure(config: CoverageConfig) -> None:
    """Print the tables, and put them into the page if one is given."""
    lines = []
    for line in tables(config.replicates):
        print(line, flush=True)
        lines.append(line)
    if config.page is not None:
        begin, end = "<!-- measured: begin -->\n", "<!-- measured: end -->\n"
        before, rest = Path(config.page).read_text(encoding="utf-8").split(begin)
        write_text(config.page, before + begin + "\n".join(lines) + "\n" + end + rest.split(end)[1])
