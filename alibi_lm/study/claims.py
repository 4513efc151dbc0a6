"""The paper's claims against results: HOLDS, FAILS, NOT SETTLED or NOT RUN, with the numbers."""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from alibi_lm.results.curves import View, curves, point_of, view_of
from alibi_lm.results.documents import DocumentSums, read_documents
from alibi_lm.results.rows import ResultRow, RowKey, read_rows
from alibi_lm.study.analysis import Analysis, read_analysis
from alibi_lm.study.compare import Measured, Verdict, judge, measure, overall, power_note
from alibi_lm.study.fairness import Difference, differences
from alibi_lm.study.paper_claims import CLAIMS, Claim, Side
from alibi_lm.study.records import RunRecord, find_records, recipes
from alibi_lm.study.tables import Table, escape

NUMBERS_NOTE = (
    "Numbers: perplexity of the first side over that of the second, with its 95% interval (widened where a claim "
    "asks about several lengths). One seed says nothing about another training run: a comparison of two schemes "
    "is then not settled, and a scheme compared with itself is judged for that seed alone. How many seeds would "
    "settle a claim is an estimate from the few that there are."
)


@dataclass(frozen=True)
class Evidence:
    """All that claims are judged by; `read_evidence` gathers it, the same for every command."""

    rows: Sequence[ResultRow]
    records: Mapping[str, RunRecord] = field(default_factory=dict)
    documents: Mapping[RowKey, DocumentSums] = field(default_factory=dict)
    bench: Sequence[Mapping[str, Any]] = ()
    """Rows of the benchmark."""
    decomposition: Analysis | None = None

    @functools.cached_property
    def words(self) -> dict[str, str]:
        """Recipes of the runs."""
        return recipes(self.rows, self.records) if self.records else {}

    @functools.cached_property
    def unfair(self) -> list[Difference]:
        """Differences between the runs other than the scheme."""
        return differences(self.rows, self.records)

    def setting(self, run: str, key: str) -> Any:
        """A setting of a run by dotted name; None where it is unknown."""
        return self.records[run].config.get(key) if run in self.records else None


def read_evidence(folder: Path, bench: Path | None = None) -> Evidence:
    """Everything at hand about the results of a folder: sums per document, run folders and analyses too.

    Args:
        folder: holds `results.jsonl`.
        bench: rows of the benchmark; None: those published with the results, else the last ones measured here.

    Raises:
        ValueError: no results, or a damaged file.
    """
    rows = read_rows(folder / "results.jsonl")
    published = folder / "bench.jsonl"
    last = Path("outputs") / "bench" / "results.jsonl"
    chosen = bench or (published if published.is_file() else last)
    # Published results hold their analyses; those of an experiment lie beside its results.
    analyses = [parent / "analysis" / "decomposition.json" for parent in (folder, folder.parent)]
    return Evidence(
        rows,
        find_records(rows, folder),
        read_documents(folder),
        read_bench(chosen),
        next((read_analysis(path) for path in analyses if path.is_file()), None),
    )


@dataclass(frozen=True)
class Instance:
    """A claim at one training length and one pair of inference lengths."""

    what: str
    verdict: Verdict
    numbers: str


@dataclass(frozen=True)
class Judged:
    """A claim and what the results say about it."""

    claim: Claim
    verdict: Verdict
    instances: list[Instance]
    note: str
    """What was not run, and why; empty otherwise."""

    @property
    def line(self) -> str:
        """For a terminal."""
        numbers = "; ".join(f"{i.what}: {i.numbers}" for i in self.instances[:4])
        more = f"; and {len(self.instances) - 4} more" if len(self.instances) > 4 else ""
        tail = " -- ".join(part for part in (numbers + more, self.note) if part)
        return f"{self.verdict:<11}  {self.claim.statement} {tail}"


Pair = tuple[str, list[ResultRow], list[ResultRow]]
"""What is compared, in words, and the rows of both sides, one per run."""


def judge_claims(evidence: Evidence, min_seeds: int | None = None) -> dict[str, list[Judged]]:
    """Judge every claim of the paper: title of a group -> its claims.

    `min_seeds` overrides what each claim asks for; with 1, comparisons of single runs get a verdict, which is then
    about these runs and not about the schemes.
    """
    return {title: [judge_claim(claim, evidence, min_seeds) for claim in group] for title, group in CLAIMS.items()}


def judge_claim(claim: Claim, evidence: Evidence, min_seeds: int | None = None) -> Judged:
    """Judge one claim; arguments as in `judge_claims`."""
    if claim.left is None:
        return Judged(claim, "NOT RUN", [], claim.not_measured)
    if claim.measure is not None:
        return _judge_speed(claim, evidence.bench)
    needed = claim.seeds_needed if min_seeds is None else min_seeds
    if claim.part is not None:
        return _judge_part(claim, evidence.decomposition, needed)
    found, missing = _pairs(claim, evidence)
    instances = []
    for what, a, b in found:
        measured = measure(a, b, evidence.documents, len(found))
        instance = _instance(what, measured, claim, needed)
        if measured.seeds >= needed and instance.verdict == "NOT SETTLED":
            note = power_note(measured, claim.relation, claim.factor)
            instance = replace(instance, numbers=f"{instance.numbers}, {note}")
        instances.append(instance)
    verdict = overall([instance.verdict for instance in instances])
    if not instances:
        return Judged(claim, verdict, [], missing)
    # A claim about certain lengths, or about all, is not confirmed at those that were left out.
    note = f"not run: {missing}" if missing and claim.train_lengths else ""
    lengths = {what.partition(",")[0] for what, _, _ in found}
    if len(lengths) < claim.min_lengths:
        note = f"{claim.min_lengths} training lengths needed"
    return Judged(claim, "NOT SETTLED" if note and verdict == "HOLDS" else verdict, instances, note)


def _instance(what: str, measured: Measured, claim: Claim, needed: int) -> Instance:
    numbers = f"{measured.ratio} ({measured.over})" if measured.over else measured.ratio
    numbers += f", {needed} seeds needed" if measured.seeds < needed else ""
    return Instance(what, judge(measured, claim.relation, claim.factor, needed), numbers)


def claims_tables(judged: Mapping[str, Sequence[Judged]]) -> dict[str, Table]:
    """Title of a group -> its table: verdict, claim, numbers, source."""
    tables = {}
    for group, results in judged.items():
        body = []
        for item in results:
            numbers = [f"{i.what}: {i.numbers}, {i.verdict}" for i in item.instances]
            cell = "\n".join(text for text in [*numbers, item.note] if text)
            body.append([item.verdict, item.claim.statement, cell, item.claim.source])
        tables[group] = Table(["verdict", "claim", "numbers", "source"], body, words=4)
    return tables


def claims_markdown(judged: Mapping[str, Sequence[Judged]], unfair: Sequence[Difference]) -> str:
    """`claims.md`."""
    parts = ["# The paper's claims and these results\n"]
    serious = [item for item in unfair if item.matters]
    if serious:
        parts.append("**The runs differ in more than the scheme**, so no verdict below is about schemes alone:\n")
        parts.append("".join(f"- {escape(item.sentence)}\n" for item in serious))
    for group, table in claims_tables(judged).items():
        parts += [f"## {escape(group)}\n", table.markdown()]
    return "\n".join([*parts, NUMBERS_NOTE + "\n"])


def read_bench(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Benchmark rows, or none where there is no such file.

    Raises:
        ValueError: a line that is no JSON object.
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
            raise ValueError(f"{file}, line {number} is no JSON object: {error}") from None
    return rows


def _pairs(claim: Claim, evidence: Evidence) -> tuple[list[Pair], str]:
    """The measurements that the claim is about, or why there are none."""
    left, right = claim.left, claim.right
    assert left is not None and right is not None
    found: list[Pair] = []
    reasons = []
    # A claim may speak of L/2 only, so L need not be a training length itself.
    trained = {row.train_length for row in evidence.rows if row.train_length is not None}
    known = sorted({round(n / side.train) for side in (left, right) for n in trained})
    for length in claim.train_lengths or known:
        left_rows, left_missing = _runs(left, length, evidence)
        right_rows, right_missing = _runs(right, length, evidence)
        if left_missing or right_missing:
            reasons += [text for text in (left_missing, right_missing) if text]
            continue
        left_at, right_at = _at(left, length, left_rows), _at(right, length, right_rows)
        if not left_at or not right_at:
            reasons.append(f"L={length}: not evaluated at {right.words if left_at else left.words}")
        for i, j in itertools.product(left_at, right_at):
            a = [row for row in left_rows if row.inference_length == i]
            b = [row for row in right_rows if row.inference_length == j]
            refused = [row.reason for row in (*a, *b) if point_of(row) is None]
            if refused:
                reasons.append(f"L={length}: {refused[0]}")
            elif len({(row.corpus, row.tokens) for row in (*a, *b)}) > 1:
                reasons.append(f"L={length}: the two sides were evaluated on different texts")
            else:
                found.append((f"L={length}, at {i}" + (f" over {j}" if i != j else ""), a, b))
    reasons = list(dict.fromkeys(reasons)) or ([] if found else ["no such runs"])
    return found, "; ".join(reasons[:2]) + (f"; and {len(reasons) - 2} more" if len(reasons) > 2 else "")


def _at(side: Side, length: int, rows: Sequence[ResultRow]) -> list[int]:
    """Inference lengths that a side means: those with values, else those that were refused."""
    usable = [row.inference_length or 0 for row in rows if point_of(row) is not None]
    return side.lengths(length, usable) or side.lengths(length, [row.inference_length or 0 for row in rows])


def _runs(side: Side, length: int, evidence: Evidence) -> tuple[list[ResultRow], str]:
    """Rows of the runs that a side means where L is `length`; none, and why, where it means no one set of runs."""
    train = side.train * length
    view = View("validation", "nonoverlapping" if side.stride is None else "sliding", side.stride)
    rows = [
        row
        for row in evidence.rows
        if row.run is not None
        and row.position == side.position
        and math.isclose(row.train_length or 0, train)
        and view_of(row) == view
        and all(evidence.setting(row.run, key) == value for key, value in side.where.items())
    ]
    what = f"{side.position} trained at {train:g}"
    if not rows:
        settings = "".join(f", {key}={value}" for key, value in side.where.items())
        return [], f"no {what}{settings}, {view.title}"
    found = curves(rows, view, evidence.words)
    if len(found) > 1:
        # Runs with the experiment's own settings are meant, unless the claim says which.
        own = {run for curve in found if not curve.variant for run in curve.seeds}
        rows = [row for row in rows if row.run in own and not row.changes]
        if not rows or side.where:
            variants = ", ".join(sorted(curve.variant or "as in the experiment" for curve in found))
            return [], f"several variants of {what}: {variants}"
    return rows, ""


def _judge_speed(claim: Claim, bench: Sequence[Mapping[str, Any]]) -> Judged:
    """Speeds at equal length, device, dtype and backend; ratios are medians, so there is no interval."""
    assert claim.left is not None and claim.right is not None and claim.measure is not None
    groups: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in bench:
        value = row.get(claim.measure)
        if row.get("implementation", "ours") == "ours" and isinstance(value, int | float) and value > 0:
            key = tuple(row.get(k) for k in ("device", "dtype", "backend", "compiled", "length", "batch"))
            groups.setdefault(key, {})[str(row.get("position"))] = float(value)
    instances = []
    for key, speeds in groups.items():
        if claim.left.position in speeds and claim.right.position in speeds:
            value = math.log(speeds[claim.left.position] / speeds[claim.right.position])
            verdict = judge(Measured(value, value, value, 1, ""), claim.relation, claim.factor, 1)
            instances.append(Instance(f"length {key[4]}, {key[2]}, {key[0]}", verdict, f"{math.exp(value):.3f}"))
    note = "" if instances else "no benchmark of both at the same length; make bench measures them"
    return Judged(claim, overall([i.verdict for i in instances]), instances, note)


def _judge_part(claim: Claim, decomposition: Analysis | None, needed: int) -> Judged:
    """A part of what changes the loss beyond L, at every length that was taken apart."""
    assert claim.left is not None and claim.part is not None
    side, instances = claim.left, []
    on_validation = decomposition is not None and decomposition.split == "validation"
    for series in decomposition.series if decomposition is not None and on_validation else []:
        # Variants stand beside the experiment's own settings only where both were analysed.
        if series.position != side.position or series.variant:
            continue
        points = {int(point["length"]): point.get(claim.part) for point in series.points}
        for length in side.lengths(series.train_length, points):
            part = points[length]
            if part is None:
                continue  # refused there
            seeds = len(series.runs)
            over = f"{seeds} seeds and {series.documents} documents" if seeds > 1 else "one seed"
            measured = Measured(part["nats"], part["low"], part["high"], seeds, over)
            what = f"L={series.train_length}, from L to {length}"
            instances.append(_instance(what, measured, claim, needed))
    note = "" if instances else "needs analyse.py view=decomposition of such runs"
    return Judged(claim, overall([i.verdict for i in instances]), instances, note)
