"""Our results beside the paper's numbers: python scripts/compare_paper.py experiment=quick."""

from alibi_lm.cli import command
from alibi_lm.study.commands import ComparePaperConfig, compare_paper


@command(ComparePaperConfig)
def main(config: ComparePaperConfig) -> None:
    compare_paper(config)


if __name__ == "__main__":
    main()
