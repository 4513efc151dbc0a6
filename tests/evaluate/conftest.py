"""Two really trained runs on a small text of many documents."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

TRAIN_LENGTH = 8


def _text(lines: int, seed: int) -> str:
    """Articles of a few lines each, as WikiText has them."""
    draw = np.random.default_rng(seed)
    text = []
    for line in range(lines):
        if line % 4 == 0:
            text += [" ", f" = Title {line} = ", " "]
        start, step = draw.integers(0, 30), draw.integers(1, 3)
        text.append(" " + " ".join(f"w{(start + step * k) % 30}" for k in range(10)) + " ")
    return "\n".join(text) + "\n"


@pytest.fixture(scope="session")
def trained_runs(tmp_path_factory) -> Path:
    """A folder with outputs/smoke/runs of alibi (two seeds) and learned, each a few steps long.

    outputs/other/runs has one of rotary.
    """
    from alibi_lm.experiment import compose
    from alibi_lm.train import train

    place = tmp_path_factory.mktemp("runs")
    for split, lines, seed in (("train", 200, 0), ("valid", 24, 1), ("test", 12, 2)):
        (place / f"wiki.{split}.tokens").write_text(_text(lines, seed))
    for position, seed, experiment in (
        ("alibi", 1, "smoke"),
        ("alibi", 2, "smoke"),
        ("learned", 1, "smoke"),
        ("rotary", 1, "other"),
    ):
        config = compose(
            [
                "experiment=smoke", f"position={position}", f"seed={seed}", f"train_length={TRAIN_LENGTH}",
                "steps=4", "tokens_per_step=64", "data=wikitext2", f"data.path={place}",
                f"data.cache_dir={place / 'data'}", "tokenizer=word", "model.model_dim=16", "model.ffn_dim=16",
                "evaluation.lengths=[4,8,16,24]", "device=cpu", "threads=1",
            ]
        )  # fmt: skip
        train(config, place / "outputs" / experiment / "runs" / f"{position}_L{TRAIN_LENGTH}_s{seed}")
    return place


@pytest.fixture
def place(trained_runs, tmp_path, monkeypatch) -> Path:
    """A copy of outputs/, in the current folder: the folder of the experiment smoke with its finished runs."""
    shutil.copytree(trained_runs / "outputs", tmp_path / "outputs")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "outputs" / "smoke"
