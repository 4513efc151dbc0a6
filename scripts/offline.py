"""Run a study on a machine without a network: python scripts/offline.py do=pack experiment=quick folder=kit."""

import sys
from pathlib import Path

from alibi_lm.cli import command
from alibi_lm.experiment import planned_runs, prepare_corpus

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the benchmark is not part of the package

from benchmarks.offline import OfflineConfig, collect, pack, work


@command(OfflineConfig)
def main(config: OfflineConfig) -> int | None:
    if config.do == "work":
        return work(config)
    pack(config, planned_runs, prepare_corpus) if config.do == "pack" else collect(config)
    return None


if __name__ == "__main__":
    main()
