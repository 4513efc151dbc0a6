"""Every row of the authors' evaluation, nonoverlapping and sliding, to a millionth of a bit."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_models import golden_models

from alibi_lm import load_run
from alibi_lm.data.tokenizers import Tokenizer
from alibi_lm.evaluate.score import score_tokens


def rows() -> list[Any]:
    """One parameter a row of each model; those of a few seconds are not marked slow."""
    parameters = []
    for model in golden_models():
        path = model / "eval.json"
        for row in json.loads(path.read_text())["results"] if path.is_file() else []:
            windows = math.ceil(row["tokens_counted"] / row["stride"])
            marks = [pytest.mark.slow] if windows * row["L"] > 30_000 else []
            name = f"{model.name}-L{row['L']}-s{row['stride']}-{row['tokens_counted']}"
            parameters.append(pytest.param(model, row, id=name, marks=marks))
    return parameters or [pytest.param(None, None, id="without-golden-data")]


@pytest.fixture(scope="module")
def stream(golden_run: Path, golden_dir: Path, text_dir: Path) -> np.ndarray:
    """The validation split: its words and ends of lines."""
    text = (text_dir / "wiki.valid.tokens").read_text(encoding="utf-8")
    tokens = Tokenizer.load(golden_run / "tokenizer.json").encode(text)
    words = text.split()
    assert len(tokens) == len(words) + len(text.splitlines())
    known = {line.rsplit(" ", 1)[0] for line in (golden_dir / "dict.txt").read_text(encoding="utf-8").splitlines()}
    assert int((tokens == 3).sum()) == sum(word not in known for word in words)
    return tokens


@pytest.mark.parametrize(("golden_model", "row"), rows(), indirect=["golden_model"])
def test_bits_per_token(golden_run: Path, stream: np.ndarray, row: dict[str, Any]) -> None:
    tokens = stream[: row["tokens_counted"]]
    stride = row["stride"] if row["context_window"] else None
    assert row["stride"] == row["L"] - row["context_window"]
    nats = score_tokens(load_run(golden_run, inference_length=row["L"]), tokens, 2, row["L"], stride)
    assert len(nats) == row["tokens_counted"]
    bits = float(nats.sum(dtype=np.float64)) / len(nats) / math.log(2)
    assert bits == pytest.approx(row["loss_base2_f64"], rel=0, abs=1e-6)
    assert 2**bits == pytest.approx(row["perplexity_f64"], rel=1e-6)
