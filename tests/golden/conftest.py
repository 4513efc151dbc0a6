"""Results of the ALiBi authors' own code, where they are at hand; see docs/golden.md."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alibi_lm.interop.fairseq import ImportConfig, import_fairseq


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """The folder of dict.txt and alibi4/, named by ALIBI_LM_GOLDEN_DIR."""
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


@pytest.fixture(scope="session")
def golden(golden_dir: Path) -> dict[str, np.ndarray]:
    """Per-token arrays."""
    with np.load(golden_dir / "alibi4" / "golden.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="session")
def train_golden(golden_dir: Path) -> dict[str, Any]:
    """Gradients and 16 optimizer steps."""
    return json.loads((golden_dir / "alibi4" / "train_golden.json").read_text())


@pytest.fixture(scope="session")
def golden_run(golden_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The authors' checkpoint as a run folder of ours."""
    folder = tmp_path_factory.mktemp("golden") / "run"
    checkpoint, dictionary = golden_dir / "alibi4" / "checkpoint_best.pt", golden_dir / "dict.txt"
    return import_fairseq(ImportConfig(str(checkpoint), str(dictionary), "alibi", str(folder)))
