"""Copies an experiment's results for committing: small, and enough for every figure, table and interval."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path, PurePath

import yaml

from alibi_lm.results.documents import DOCUMENTS_FILE
from alibi_lm.results.rows import read_rows, write_csv, write_rows
from alibi_lm.study.analysis import analysis_files
from alibi_lm.study.figures import draw
from alibi_lm.study.records import RUN_FILES, find_records
from alibi_lm.study.view_figures import draw_analysis

RESULT_FILES = (DOCUMENTS_FILE, "claims.md", "paper.md", "cards.json")
FIGURES = ("extrapolation*", "bits_per_byte*", "tasks", "depths", "memory", "stages")
"""Names of all pictures that `draw` may have written for earlier results."""
LARGEST = 16 * 2**20
"""Size in bytes of the largest file that may be published."""


def publish(folder: Path, target: Path, bench: Path | None = None) -> list[Path]:
    """Copy results, analyses and the records of each run, and draw figures and tables there.

    Weights, checkpoints and per-token results are not copied. Of absolute paths only the last part is published,
    because the rest describes somebody's machine.

    Args:
        folder: the folder of an experiment's `results.jsonl`; analyses are looked for beside it and in it.
        target: replaced as a whole; files that no publication wrote, such as a README, are kept.
        bench: result rows of a benchmark that belong to the results, published as `bench.jsonl`.

    Raises:
        ValueError: no or damaged results, a run without its folder, a file above 16 MiB, or a target that holds
            something else.
    """
    rows = read_rows(folder / "results.jsonl")
    records = find_records(rows, folder)
    if target.exists() and any(target.iterdir()) and not (target / "results.jsonl").is_file():
        raise ValueError(f"target = {target} holds something other than published results. Name another folder.")
    sources = {Path(name): folder / name for name in RESULT_FILES}
    for path in analysis_files(folder):
        sources[Path("analysis") / path.name] = path
    for record in records.values():
        if record.folder is None:
            raise ValueError(f"run {record.name} is in {folder / 'results.jsonl'}, but its folder was not found.")
        for part in (*RUN_FILES, "metrics.jsonl"):
            sources[Path("runs") / record.folder.name / part] = record.folder / part
    if bench is not None and bench.is_file():
        sources[Path("bench.jsonl")] = bench
    sources = {name: path for name, path in sources.items() if path.is_file()}
    for path in sources.values():
        if path.stat().st_size > LARGEST:
            raise ValueError(f"{path} has {path.stat().st_size:,} bytes, more than {LARGEST:,}: not published.")
    for record in records.values():
        if record.environment.get("dirty"):
            print(f"note: {record.name} was trained by uncommitted code", file=sys.stderr)

    # First beside the target, so that a publication is whole or absent.
    beside = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    try:
        for name, path in sources.items():
            (beside / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, beside / name)
            if path.name in ("config.yaml", "corpus.json"):
                (beside / name).write_text(_without_folders(path.read_text(encoding="utf-8")), encoding="utf-8")
        # Rows in the present format, also if an earlier version wrote them; folders by their names only.
        named = [replace(row, folder=row.folder and PurePath(row.folder).name) for row in rows]
        write_csv(beside / "results.csv", write_rows(beside / "results.jsonl", named))
        draw(beside)
        for path in sorted((beside / "analysis").glob("*.json")):
            draw_analysis(path)
            path.with_suffix(".svg").unlink()  # the PNG is enough
        for part in ("runs", "analysis"):
            shutil.rmtree(target / part, ignore_errors=True)
        for figure in FIGURES:
            for old in target.glob(f"{figure}.*g"):
                old.unlink()
        written = sorted(path.relative_to(beside) for path in beside.rglob("*") if path.is_file())
        for name in written:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(beside / name, target / name)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return [target / name for name in written]


def _without_folders(text: str) -> str:
    """YAML or JSON with each absolute path cut to its last part."""
    found: list[str] = []
    values = [yaml.safe_load(text)]
    while values:
        value = values.pop()
        if isinstance(value, dict | list):
            values += value.values() if isinstance(value, dict) else value
        elif isinstance(value, str) and PurePath(value).is_absolute():
            found.append(value)
    for value in sorted(found, key=len, reverse=True):
        text = text.replace(value, PurePath(value).name)
    return text
