"""Our results beside the paper's numbers: python scripts/compare_paper.py experiment=quick."""

from alibi_lm.cli import command
from alibi_lm.study.commands import StudyConfig, compare_paper


@command(StudyConfig)
def main(config: StudyConfig) -> None:
    compare_paper(config)


if __name__ == "__main__":
    main()
