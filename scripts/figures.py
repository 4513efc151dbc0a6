"""Redraw figures and tables from result files alone: python scripts/figures.py experiment=quick."""

from alibi_lm.cli import command
from alibi_lm.study.commands import StudyConfig, figures


@command(StudyConfig)
def main(config: StudyConfig) -> None:
    figures(config)


if __name__ == "__main__":
    main()
