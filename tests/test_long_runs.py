"""Memory and file descriptors stay flat over thousands of steps and many evaluations."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import alibi_lm.train
from alibi_lm.distributed import World
from alibi_lm.evaluate.config import EvaluateConfig
from alibi_lm.evaluate.sweep import evaluate
from alibi_lm.experiment import compose
from alibi_lm.tracking import JsonlConfig
from alibi_lm.train import Run, train

pytestmark = pytest.mark.slow

STEPS, LENGTHS = 2000, list(range(8, 58))
GROWTH_BYTES = 8 * 2**20
"""Allowed from a quarter of the way to the end: 5 KiB a step, where a step's graph alone is hundreds of KiB."""
TINY = [
    "experiment=smoke", "data=wikitext2", "tokenizer=word", "tracking=jsonl", "device=cpu", "threads=1",
    "train_length=8", f"steps={STEPS}", "tokens_per_step=32", "log_every=10", "validate_every=100",
    "checkpoint_every=50", "keep_last=2", "model.model_dim=16", "model.ffn_dim=16", "model.dropout=0.1",
    "position=alibi",
]  # fmt: skip


class Usage:
    """What this process holds, now and then."""

    def __init__(self) -> None:
        self.process = psutil.Process()
        self.memory: list[int] = []
        """Resident bytes."""
        self.files: list[int] = []
        """Open descriptors."""
        self.threads: list[int] = []

    def note(self) -> None:
        gc.collect()
        self.memory.append(self.process.memory_info().rss)
        self.files.append(self.process.num_fds())
        self.threads.append(self.process.num_threads())

    def assert_flat(self) -> None:
        """From a quarter of the way on: caches and pools have then been filled."""
        start = len(self.memory) // 4
        assert len(self.memory) >= 16
        # The smallest of the last quarter against the largest of the second: no single spike decides.
        second, last = self.memory[start : 2 * start], self.memory[-start:]
        assert min(last) - max(second) <= GROWTH_BYTES, [m >> 10 for m in self.memory]
        assert sum(last) / len(last) - sum(second) / len(second) <= GROWTH_BYTES, [m >> 10 for m in self.memory]
        assert max(self.files[start:]) <= self.files[start] + 1, self.files
        assert max(self.threads[start:]) <= self.threads[start] + 1, self.threads


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, write_text: Callable[[Path], Path]) -> Path:
    folder = tmp_path_factory.mktemp("long")
    write_text(folder / "text")
    return folder


@pytest.fixture(scope="module")
def usage(place: Path) -> Usage:
    """Of a training run in `run`."""
    usage = Usage()
    step = alibi_lm.train.step

    def noted(run: Run, number: int) -> Any:
        if number % 50 == 25:
            usage.note()
        return step(run, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(alibi_lm.train, "step", noted)
        where = [f"data.path={place / 'text'}", f"data.cache_dir={place / 'cache'}"]
        train(compose([*TINY, *where]), place / "run")
    return usage


def test_training_is_flat(usage: Usage, place: Path) -> None:
    assert len(usage.memory) == STEPS // 50
    usage.assert_flat()
    rows = [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum("train/loss" in row for row in rows) == STEPS // 10
    # The disk too: two checkpoints and the best one.
    assert len(list((place / "run" / "checkpoints").glob("step-*"))) <= 3


def test_an_evaluation_of_many_lengths_is_flat_and_can_be_watched(usage: Usage, place: Path) -> None:
    config = EvaluateConfig(
        runs=str(place / "run"), lengths=LENGTHS, output_dir=str(place / "out"), device="cpu", threads=1,
        tokens_per_forward=256, tracking=JsonlConfig(),
    )  # fmt: skip
    seen = Usage()
    for number, _ in enumerate(evaluate(config, World()), start=1):
        # Each row is on the disk as soon as it is known.
        assert len((place / "out" / "results.jsonl").read_text().splitlines()) == number
        seen.note()
    assert number == len(LENGTHS) + 1
    seen.assert_flat()


def test_a_leak_would_be_seen() -> None:
    """The bounds notice a graph that is kept, 20 KiB a step, and a file that is not closed."""
    leak, kept = Usage(), []
    for _ in range(40):
        leak.note()
        kept.append(torch.ones(50 * 20 * 2**10 // 4))
    with pytest.raises(AssertionError):
        leak.assert_flat()
    steady = Usage()
    for _ in range(20):
        steady.note()
    steady.assert_flat()
    steady.files[-1] += 2
    with pytest.raises(AssertionError):
        steady.assert_flat()
