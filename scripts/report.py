"""One self-contained HTML file of an experiment's results: python scripts/report.py experiment=quick."""

from alibi_lm.cli import command
from alibi_lm.study.commands import StudyConfig, report


@command(StudyConfig)
def main(config: StudyConfig) -> None:
    report(config)


if __name__ == "__main__":
    main()
