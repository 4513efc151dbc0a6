"""Speed and memory per scheme, backend and length: python scripts/bench.py lengths=[256,1024] peers=false."""

import sys
from pathlib import Path

from alibi_lm.cli import command

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the benchmark is not part of the package

from benchmarks.run import BenchConfig, bench


@command(BenchConfig)
def main(config: BenchConfig) -> None:
    bench(config)


if __name__ == "__main__":
    main()
