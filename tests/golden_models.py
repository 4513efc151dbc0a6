"""The models among the authors' results; see docs/golden.md."""

import os
from pathlib import Path


def golden_models() -> list[Path]:
    """Folders of ALIBI_LM_GOLDEN_DIR that hold a model's checkpoint."""
    folder = os.environ.get("ALIBI_LM_GOLDEN_DIR")
    return sorted(path.parent for path in Path(folder).glob("*/checkpoint_best.pt")) if folder else []
