"""Stream a million tokens in constant memory: python scripts/stream.py run=outputs/quick/runs/alibi_L64_s1."""

from alibi_lm.cli import command
from alibi_lm.evaluate.stream import LongStreamConfig, print_long_stream


@command(LongStreamConfig)
def main(config: LongStreamConfig) -> None:
    print_long_stream(config)


if __name__ == "__main__":
    main()
