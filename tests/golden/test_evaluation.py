"""Every row of the authors' evaluation, nonoverlapping and sliding, to a millionth of a bit."""

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alibi_lm import load_run
from alibi_lm.data.tokenizers import Tokenizer
from alibi_lm.evaluate.score import score_tokens


def rows() -> list[Any]:
    """One parameter a row; those of a few seconds are not marked slow."""
    folder = os.environ.get("ALIBI_LM_GOLDEN_DIR")
    path = Path(folder or "") / "alibi4" / "eval.json"
    if not folder or not path.is_file():
        return [pytest.param(None, id="without-golden-data")]
    parameters = []
    for row in json.loads(path.read_text())["results"]:
        windows = math.ceil(row["tokens_counted"] / row["stride"])
        marks = [pytest.mark.slow] if windows * row["L"] > 30_000 else []
        name = f"L{row['L']}-s{row['stride']}-{row['tokens_counted']}"
        parameters.append(pytest.param(row, id=name, marks=marks))
    return parameters


@pytest.fixture(scope="module")
def stream(golden_run: Path, text_dir: Path) -> np.ndarray:
    tokenizer = Tokenizer.load(golden_run / "tokenizer.json")
    text = (text_dir / "wiki.valid.tokens").read_text(encoding="utf-8")
    tokens = tokenizer.encode(text)
    assert len(tokens) == 217_646
    assert int((tokens == 3).sum()) == 21_288
    return tokens


@pytest.mark.parametrize("row", rows())
def test_bits_per_token(golden_run: Path, stream: np.ndarray, row: dict[str, Any]) -> None:
    tokens = stream[: row["tokens_counted"]]
    stride = row["stride"] if row["context_window"] else None
    assert row["stride"] == row["L"] - row["context_window"]
    nats = score_tokens(load_run(golden_run, inference_length=row["L"]), tokens, 2, row["L"], stride)
    assert len(nats) == row["tokens_counted"]
    bits = float(nats.sum(dtype=np.float64)) / len(nats) / math.log(2)
    assert bits == pytest.approx(row["loss_base2_f64"], rel=0, abs=1e-6)
    assert 2**bits == pytest.approx(row["perplexity_f64"], rel=1e-6)
