"""Our results beside the paper's numbers: python scripts/compare_paper.py experiment=quick [draw=true]."""

import sys

from alibi_lm.files import write_text
from alibi_lm.results.rows import read_rows
from alibi_lm.study.command import FOLDER, main, parse, study_folder
from alibi_lm.study.figures import draw
from alibi_lm.study.paper import comparison_markdown
from alibi_lm.study.records import find_records
from alibi_lm.study.shapes import shapes, shapes_markdown


def task(arguments: list[str]) -> None:
    """Print the comparison and write it as paper.md; draw=true dots the paper's curves beside ours."""
    words = {"near": "a share from 0 to 0.1, such as 0.02"}
    settings = parse(arguments, FOLDER | {"near": 0.0, "draw": False}, words)
    if not 0 <= settings["near"] <= 0.1:
        raise ValueError(f"near = {settings['near']}; it must be {words['near']}")
    folder = study_folder(settings)
    rows = read_rows(folder / "results.jsonl")
    text = comparison_markdown(rows, find_records(rows, folder), settings["near"])
    if shape := shapes_markdown(shapes(rows)):
        text += f"\n{shape}"
    write_text(folder / "paper.md", text)
    print(text)
    for path in draw(folder, with_paper=True) if settings["draw"] else []:
        print(path)


if __name__ == "__main__":
    sys.exit(main(task))
