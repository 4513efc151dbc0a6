"""Latency and memory of decoding against the context: python scripts/bench_decoding.py 'contexts=[1024,16384]'."""

import sys
from pathlib import Path

from alibi_lm.cli import command

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the benchmark is not part of the package

from benchmarks.decoding import DecodingConfig, measure_decoding


@command(DecodingConfig)
def main(config: DecodingConfig) -> None:
    measure_decoding(config)


if __name__ == "__main__":
    main()
