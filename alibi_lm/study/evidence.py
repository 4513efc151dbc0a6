"""Everything that claims, atlas and report are based on: rows, run folders, document sums, views, benchmark."""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from alibi_lm.results.curves import Curve, step_of
from alibi_lm.results.documents import DocumentSums, read_documents
from alibi_lm.results.rows import ResultRow, RowKey, read_rows
from alibi_lm.study.analysis import Analysis, analysis_files, read_analysis
from alibi_lm.study.fairness import Difference, differences
from alibi_lm.study.records import RunRecord, find_records, recipes

ANALYSES = ("decomposition", "fixed", "attention", "repeat", "effective_context")
"""Views that decide claims."""


@dataclass(frozen=True)
class Evidence:
    """Everything that claims are judged by; `read_evidence` gathers it in the same way for every command."""

    rows: Sequence[ResultRow]
    records: Mapping[str, RunRecord] = field(default_factory=dict)
    documents: Mapping[RowKey, DocumentSums] = field(default_factory=dict)
    bench: Sequence[Mapping[str, Any]] = ()
    """Rows of the benchmark."""
    analyses: Mapping[str, Analysis] = field(default_factory=dict)
    """Analyses by view."""

    @functools.cached_property
    def words(self) -> dict[str, str]:
        """Recipes of the runs, see `recipes`."""
        return recipes(self.rows, self.records) if self.records else {}

    @functools.cached_property
    def unfair(self) -> list[Difference]:
        """Differences between the runs other than the scheme."""
        return differences(self.rows, self.records)

    def setting(self, run: str, key: str) -> Any:
        """A setting of a run by dotted name; None if it is unknown."""
        return self.records[run].config.get(key) if run in self.records else None

    def stage(self, row: ResultRow) -> float:
        """The share of its training after which a run was tested; 1 for its end, NaN if it is not known."""
        step, steps = step_of(row), self.setting(str(row.run), "steps")
        return 1.0 if step is None else step / steps if isinstance(steps, int) else math.nan

    def last_stage(self, position: str, train_length: int, limit: float) -> float:
        """The latest stage at which a scheme was tested, up to `limit` (or 1% above it)."""
        own = [row for row in self.rows if (row.position, row.train_length) == (position, train_length)]
        return max((s for row in own if (s := self.stage(row)) <= limit * 1.01), default=0.0)

    def is_own(self, curve: Curve) -> bool:
        """Whether a curve has the experiment's own settings; changes for the test do not matter."""
        return all(not self.words.get(run, curve.variant) for run in curve.seeds)


def read_results(folder: Path) -> Evidence:
    """The rows of a folder and the records of their runs: enough for figures and tables.

    Raises:
        ValueError: no results, or a damaged file.
    """
    rows = read_rows(folder / "results.jsonl")
    return Evidence(rows, find_records(rows, folder))


def read_evidence(folder: Path) -> Evidence:
    """Everything available about the results of a folder, including sums per document, run folders and analyses.

    Rows of the benchmark are those published with the results, else the last ones measured here.

    Raises:
        ValueError: no results, or a damaged file.
    """
    results = read_results(folder)
    published = folder / "bench.jsonl"
    bench = published if published.is_file() else Path("outputs") / "bench" / "results.jsonl"
    # Published results contain their analyses; those of an experiment are beside its results.
    analyses = {path.stem: read_analysis(path) for path in analysis_files(folder) if path.stem in ANALYSES}
    return replace(results, documents=read_documents(folder), bench=read_bench(bench), analyses=analyses)


def read_bench(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Benchmark rows; none if there is no such file.

    Raises:
        ValueError: a line that is not a JSON object.
    """
    file = Path(path)
    rows = []
    for number, line in enumerate(
        file.read_text(encoding="utf-8").splitlines() if file.is_file() else [], start=1
    ):
        try:
            if line.strip():
                rows.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file}, line {number} is not a JSON object: {error}") from None
    return rows
