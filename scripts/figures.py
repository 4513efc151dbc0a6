"""Redraw figures and tables from result files alone: python scripts/figures.py experiment=quick [paper=true]."""

from alibi_lm.cli import command
from alibi_lm.study.commands import FiguresConfig, figures


@command(FiguresConfig)
def main(config: FiguresConfig) -> None:
    figures(config)


if __name__ == "__main__":
    main()
