"""Continue a prompt: python scripts/generate.py run=<run folder> prompt="def main" cache=proved."""

from alibi_lm.cli import command
from alibi_lm.generation import GenerateConfig, run_generate


@command(GenerateConfig)
def main(config: GenerateConfig) -> int:
    return run_generate(config)


if __name__ == "__main__":
    main()
