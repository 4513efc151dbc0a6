"""Measure by simulation what the intervals cover: python scripts/coverage.py [page=docs/statistics.md]."""

import sys
from pathlib import Path

from alibi_lm.cli import command

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the simulation is not part of the package

from benchmarks.coverage import CoverageConfig, measure


@command(CoverageConfig)
def main(config: CoverageConfig) -> None:
    measure(config)


if __name__ == "__main__":
    main()
