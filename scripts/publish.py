"""Copy an experiment's results to a folder to commit, without weights: scripts/publish.py experiment=quick."""

import sys
from pathlib import Path

from alibi_lm.study.command import FOLDER, main, parse, study_folder
from alibi_lm.study.publish import publish


def task(arguments: list[str]) -> None:
    """Publish to docs/results/<experiment>, or target=<folder>; bench=<results.jsonl> adds a benchmark's rows."""
    settings = parse(arguments, FOLDER | {"target": None, "bench": None}, {})
    target = Path(settings["target"] or Path("docs") / "results" / settings["experiment"])
    bench = None if settings["bench"] is None else Path(settings["bench"])
    written = publish(study_folder(settings), target, bench)
    size = sum(path.stat().st_size for path in written)
    print(f"{target}: {len(written)} files, {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    sys.exit(main(task))
