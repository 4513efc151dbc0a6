"""Redraw figures and tables from result files alone: python scripts/figures.py experiment=quick [paper=true]."""

import sys

from alibi_lm.study.command import FOLDER, main, parse, study_folder
from alibi_lm.study.figures import draw


def task(arguments: list[str]) -> None:
    """Draw; with paper=true the paper's curves are dotted beside ours, with strict=true unfairness is an error."""
    settings = parse(arguments, FOLDER | {"paper": False, "strict": False}, {})
    for path in draw(study_folder(settings), settings["paper"], settings["strict"]):
        print(path)


if __name__ == "__main__":
    sys.exit(main(task))
