"""Makes the hand-made rows (study_rows.py) importable: tests have no packages."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
