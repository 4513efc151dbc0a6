"""Measure by simulation what the intervals cover: python scripts/coverage.py [page=docs/statistics.md]."""

from alibi_lm.cli import command
from alibi_lm.results.coverage import CoverageConfig, measure


@command(CoverageConfig)
def main(config: CoverageConfig) -> None:
    measure(config)


if __name__ == "__main__":
    main()
