"""Is A better than B? python scripts/compare_runs.py a='alibi_L64_s*' b='sinusoidal_L64_s*' 'lengths=[64,512]'."""

from alibi_lm.cli import command
from alibi_lm.study.commands import CompareRunsConfig, compare_runs


@command(CompareRunsConfig)
def main(config: CompareRunsConfig) -> None:
    compare_runs(config)


if __name__ == "__main__":
    main()
