"""A study on a machine without a network: python scripts/offline.py do=pack experiment=quick folder=kit."""

import sys
from pathlib import Path

from alibi_lm.cli import command

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the benchmark is not part of the package

from benchmarks.offline import OfflineConfig, offline


@command(OfflineConfig)
def main(config: OfflineConfig) -> int | None:
    return offline(config)


if __name__ == "__main__":
    main()
