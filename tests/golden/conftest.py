"""Results of the ALiBi authors' own code, where they are at hand; see docs/golden.md.

Every folder with a checkpoint is a model that the tests run on. Its sizes and settings are read from its files.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_models import golden_models

from alibi_lm.interop.fairseq import ImportConfig, import_fairseq


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """The folder of dict.txt and of models such as alibi4/, named by ALIBI_LM_GOLDEN_DIR."""
    folder = os.environ.get("ALIBI_LM_GOLDEN_DIR")
    if not folder:
        pytest.skip("ALIBI_LM_GOLDEN_DIR is not set: NOT compared with the authors' full golden data")
    assert (Path(folder) / "dict.txt").is_file(), f"ALIBI_LM_GOLDEN_DIR = {folder} holds no dict.txt"
    return Path(folder)


@pytest.fixture(scope="session")
def text_dir() -> Path:
    """The folder of WikiText-103's wiki.valid.tokens and wiki.test.tokens, at or below ALIBI_LM_DATA_DIR."""
    folder = os.environ.get("ALIBI_LM_DATA_DIR")
    if not folder:
        pytest.skip("ALIBI_LM_DATA_DIR is not set: NOT compared with the authors' results on whole splits")
    for candidate in (Path(folder), Path(folder) / "wikitext-103"):
        if (candidate / "wiki.valid.tokens").is_file():
            return candidate
    raise AssertionError(f"ALIBI_LM_DATA_DIR = {folder} holds no wiki.valid.tokens")


@pytest.fixture(
    scope="session", params=golden_models() or [None], ids=lambda path: path.name if path else "no-model"
)
def golden_model(request: pytest.FixtureRequest, golden_dir: Path) -> Path:
    """The folder of one model."""
    assert request.param, f"ALIBI_LM_GOLDEN_DIR = {golden_dir} holds no <model>/checkpoint_best.pt"
    return request.param


@pytest.fixture(scope="session")
def golden(golden_model: Path) -> dict[str, np.ndarray]:
    """Per-token arrays."""
    with np.load(golden_model / "golden.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="session")
def train_golden(golden_model: Path) -> dict[str, Any]:
    """Gradients and some optimizer steps."""
    path = golden_model / "train_golden.json"
    if not path.is_file():
        pytest.skip(f"{path} is missing: training is NOT compared with the authors' code for this model")
    return json.loads(path.read_text())


@pytest.fixture(scope="session")
def golden_run(
    golden_model: Path, golden: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The authors' checkpoint as a run folder of ours."""
    folder = tmp_path_factory.mktemp("golden") / "run"
    checkpoint, dictionary = golden_model / "checkpoint_best.pt", golden_model.parent / "dict.txt"
    position = "alibi" if "slopes" in golden else "sinusoidal"  # the checkpoint itself does not say
    return import_fairseq(ImportConfig(str(checkpoint), str(dictionary), position, str(folder)))
