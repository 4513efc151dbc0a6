"""Is A better than B? python scripts/compare_runs.py a='alibi_L64_s*' b='sinusoidal_L64_s*' 'lengths=[64,512]'."""

import sys

from alibi_lm.results.curves import View
from alibi_lm.results.rows import read_rows
from alibi_lm.study.claims import read_summaries_if_any
from alibi_lm.study.command import FOLDER, Settings, main, parse, study_folder
from alibi_lm.study.compare import common_lengths, compare_runs, select, title
from alibi_lm.study.fairness import differences


def task(arguments: list[str]) -> None:
    """Print an answer a length; strict=true refuses runs that differ in more than the scheme."""
    own: Settings = {"a": None, "b": None, "lengths": [], "split": "validation", "strict": False}
    own |= {"mode": None, "stride": 0}
    settings = parse(arguments, FOLDER | own, {"lengths": "whole numbers such as '[64,128]'"})
    for name in ("a", "b"):
        if not settings[name]:
            raise ValueError(
                f"{name} is missing; give the run's name or a glob of its seeds: {name}='alibi_L64_s*'"
            )
    if not all(type(n) is int and n > 0 for n in settings["lengths"]):
        raise ValueError(f"lengths = {settings['lengths']}; it must be whole numbers such as '[64,128]'")
    folder = study_folder(settings)
    rows = read_rows(folder / "results.jsonl")
    mode = settings["mode"] or ("sliding" if settings["stride"] else "nonoverlapping")
    view = View(settings["split"], mode, settings["stride"] or None)
    a, b = (select(rows, settings[name], view, name) for name in ("a", "b"))
    lengths = settings["lengths"] or common_lengths(a, b)
    unfair = [item for item in differences([*a, *b], folder) if item.matters]
    if unfair and settings["strict"]:
        raise ValueError("strict = true, and the runs differ in: " + "; ".join(item.sentence for item in unfair))
    print(
        f"A: {title(a)}\nB: {title(b)}\nIs A better than B? {view.title}; A minus B, all lengths at 95% together"
    )
    for answer in compare_runs(a, b, read_summaries_if_any(folder), lengths):
        print(answer.line)
    for item in unfair:
        print(f"NOT A FAIR COMPARISON: {item.sentence}")


if __name__ == "__main__":
    sys.exit(main(task))
