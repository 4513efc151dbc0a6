"""The paper's claims against results: HOLDS, FAILS, NOT SETTLED or NOT RUN, with the numbers."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from alibi_lm.results.curves import CHECKPOINT, View, curves, point_of, view_of, views
from alibi_lm.results.rows import ResultRow
from alibi_lm.results.speeds import PAIRS
from alibi_lm.study.analysis import VIEWS, Series
from alibi_lm.study.compare import (
    VERDICTS,
    Measured,
    Sample,
    Speed,
    Verdict,
    judge,
    measure,
    measure_speeds,
    overall,
    power_note,
    sample,
)
from alibi_lm.study.evidence import Evidence
from alibi_lm.study.pages import Block, Table
from alibi_lm.study.paper_claims import NEAR, Claim, Side, paper_claims
from alibi_lm.study.tables import provenance

NUMBERS_NOTE = (
    "Numbers: perplexity of the first side over that of the second, with its 95% interval (widened where a claim "
    "asks about several lengths). A verdict is about this text and models of this size, not about the paper's. "
    "One seed says nothing about another training run: a comparison of two schemes is then not settled, and a "
    "scheme compared with itself is judged for that seed alone. Accuracies: left minus right, or the value of one "
    "side, over all seeds and the items. Numbers of views: the mean over seeds, or the ratio of two lengths, with "
    "the interval over seeds. How many seeds would settle a claim is an estimate from few seeds that assumes the "
    "same mean and scatter."
)


@dataclass(frozen=True)
class Instance:
    """A claim at one training length and one pair of inference lengths."""

    what: str
    verdict: Verdict
    numbers: str


@dataclass(frozen=True)
class Judged:
    """A claim and its verdict."""

    claim: Claim
    verdict: Verdict
    instances: list[Instance]
    note: str
    """What was not run, and why; empty otherwise."""

    @property
    def line(self) -> str:
        """The verdict as one line for a terminal."""
        numbers = "; ".join(f"{i.what}: {i.numbers}" for i in self.instances[:4])
        more = f"; and {len(self.instances) - 4} more" if len(self.instances) > 4 else ""
        tail = " -- ".join(part for part in (numbers + more, self.note) if part)
        return f"{self.verdict:<11}  {self.claim.statement} {tail}"


Found = tuple[str, Sample | Measured, Sample | None]
"""One case of a claim: its words, and what both sides measured (or the finished interval)."""


def judge_claims(evidence: Evidence) -> dict[str, list[Judged]]:
    """Judge every claim of the paper: title of a group -> its claims."""
    return {title: [judge_claim(claim, evidence) for claim in group] for title, group in paper_claims().items()}


def judge_claim(claim: Claim, evidence: Evidence) -> Judged:
    """Judge one claim."""
    if claim.measure is not None:
        return _judge_speed(claim, evidence.bench)
    if claim.equal_time:
        return _judge_equal_time(claim, evidence)
    parts = claim.parts or (claim,)
    found = {part.id: _find(part, evidence) for part in parts}
    count = sum(len(ones) for ones, _ in found.values())
    instances, given = [], []
    for part in parts:
        for what, left, right in found[part.id][0]:
            name = f"{part.id}, {what}" if claim.parts else what
            instances.append(_instance(part, (name, left, right), count))
            given += [part.id] if part.given and instances[-1].verdict != "HOLDS" else []
    verdict = overall([one.verdict for one in instances])
    if claim.parts:
        gone = [f"{name} ({why})" for name, (ones, why) in found.items() if not ones]
        note = f"not run: {_some(gone)}" if gone else ""
        if len(parts) - len(gone) < (claim.min_parts or len(parts)):
            return Judged(claim, "NOT RUN", [], note)
        if given:
            return Judged(claim, "NOT SETTLED", instances, f"says nothing, as this is not so: {given[0]}")
        return Judged(claim, verdict, instances, note)
    missing = found[claim.id][1]
    if not instances:
        return Judged(claim, verdict, [], missing)
    # A claim about certain lengths, or about all, is not confirmed if some of them were left out.
    note = f"not run: {missing}" if missing and claim.train_lengths else ""
    note = note or _lost(claim, evidence)
    if len({one.what.partition(",")[0] for one in instances}) < claim.min_lengths:
        note = f"{claim.min_lengths} training lengths needed"
    return Judged(claim, "NOT SETTLED" if note and verdict == "HOLDS" else verdict, instances, note)


def _find(claim: Claim, evidence: Evidence) -> tuple[list[Found], str]:
    """All cases of a claim, or why there is none."""
    assert claim.left is not None
    if claim.left.view:
        return _of_view(claim, evidence, claim.left.view)
    found, missing = _pairs(claim, evidence)
    if not found and claim.left.stride == 1:
        found, others = _of_view(claim, evidence, "fixed")
        missing = others or missing
    return found, missing


def _lost(claim: Claim, evidence: Evidence) -> str:
    """A length beyond L without a value, such as an infinite loss, where a claim is about every such length."""
    for side in (claim.left, claim.right):
        if side is None or side.which != "every beyond" or side.view:
            continue
        for length in sorted({round(row.train_length / side.train) for row in evidence.rows if row.train_length}):
            rows, _ = _runs(side, length, evidence)
            meant = set(side.lengths(length, [row.inference_length or 0 for row in rows]))
            for row in rows:
                if row.inference_length in meant - set(_at(side, length, rows)):
                    return f"not measured: L={length}, at {row.inference_length}: {row.reason}"
    return ""


def _instance(claim: Claim, found: Found, comparisons: int, needed: int | None = None) -> Instance:
    what, left, right = found
    needed = claim.seeds_needed if needed is None else needed
    measured = left if isinstance(left, Measured) else measure(left, right, comparisons)
    verdict = judge(measured, claim.relation, claim.bound, needed)
    numbers = f"{measured.ratio} ({measured.over})" if measured.over else measured.ratio
    if measured.seeds < needed:
        numbers += f", {needed} {measured.counted} needed"
    elif verdict == "NOT SETTLED":
        numbers += f", {power_note(measured, claim.relation, claim.bound)}"
    return Instance(what, verdict, numbers)


def claims_page(judged: Mapping[str, Sequence[Judged]], evidence: Evidence) -> list[Block]:
    """`claims.md`: a table for each group, with verdict, claim, numbers and source."""
    counts = Counter(item.verdict for group in judged.values() for item in group)
    page: list[Block] = ["# The paper's claims and these results"]
    page += [f"Judged on {provenance(evidence.rows, view)}." for view in views(evidence.rows)[:1]]
    page.append(", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS) + ".")
    if serious := [item.sentence for item in evidence.unfair if item.matters]:
        page.append("**The runs differ in more than the scheme**, so no verdict below is about schemes alone:")
        page.append(serious)
    for group, results in judged.items():
        body = []
        for item in results:
            numbers = [f"{i.what}: {i.numbers}, {i.verdict}" for i in item.instances]
            cell = "\n".join(filter(None, [*numbers, item.note]))
            body.append([item.verdict, item.claim.statement, cell, item.claim.source])
        page += [f"## {group}", Table(["verdict", "claim", "numbers", "source"], body, words=4)]
    return [*page, NUMBERS_NOTE]


# --- what each kind of claim is measured by --------------------------------------------------------


def _pairs(claim: Claim, evidence: Evidence) -> tuple[list[Found], str]:
    """The cases of a claim about result rows, or why there are none."""
    assert claim.left is not None
    sides = [side for side in (claim.left, claim.right) if side is not None]
    found: list[Found] = []
    reasons = []
    # A claim may speak of L/2 only, so L need not be a training length itself.
    trained = {row.train_length for row in evidence.rows if row.train_length is not None}
    known = sorted({round(n / side.train) for side in sides for n in trained})
    for length in claim.train_lengths or known:
        rows, missing = zip(*(_runs(side, length, evidence) for side in sides), strict=True)
        if any(missing):
            reasons += [text for text in missing if text]
            continue
        at = [_at(side, length, own) for side, own in zip(sides, rows, strict=True)]
        reasons += [
            f"L={length}: not evaluated at {side.words}" for side, n in zip(sides, at, strict=True) if not n
        ][:1]
        same = len({(side.at, side.which) for side in sides}) == 1
        for each in itertools.product(*at):
            if same and len(set(each)) > 1:
                continue
            pairs = [_of_length(own, n) for own, n in zip(rows, each, strict=True)]
            of_L = [_of_length(own, own[0].train_length) for own in rows] if claim.from_L else []
            unknown = [side.words for side, own in zip(sides, of_L, strict=False) if not _has_values(own)]
            refused = [row.reason for row in itertools.chain(*pairs) if point_of(row) is None]
            if refused:
                reasons.append(f"L={length}: {refused[0]}")
            elif unknown:
                reasons.append(f"L={length}: no value at L, which {unknown[0]} is compared with")
            elif len({(row.corpus, row.tokens) for row in itertools.chain(*pairs)}) > 1:
                reasons.append(f"L={length}: the two sides were evaluated on different texts")
            else:
                samples = [sample(own, evidence.documents) for own in pairs]
                if claim.from_L:
                    samples = [
                        one.minus(sample(own, evidence.documents)) for one, own in zip(samples, of_L, strict=True)
                    ]
                over = f" over {each[1]}" if len(set(each)) > 1 else ""
                found.append((f"L={length}, at {each[0]}{over}", samples[0], samples[1] if samples[1:] else None))
    return found, _some(reasons) or ("" if found else "no such runs")


def _some(reasons: Sequence[str]) -> str:
    reasons = list(dict.fromkeys(reasons))
    return "; ".join(reasons[:2]) + (f"; and {len(reasons) - 2} more" if len(reasons) > 2 else "")


def _of_length(rows: Sequence[ResultRow], length: int | None) -> list[ResultRow]:
    return [row for row in rows if row.inference_length == length]


def _has_values(rows: Sequence[ResultRow]) -> bool:
    return bool(rows) and all(point_of(row) is not None for row in rows)


def _at(side: Side, length: int, rows: Sequence[ResultRow]) -> list[int]:
    """The inference lengths of a side: those with values, else those that were refused."""
    usable = [row.inference_length or 0 for row in rows if point_of(row) is not None]
    return side.lengths(length, usable) or side.lengths(length, [row.inference_length or 0 for row in rows])


def _runs(side: Side, length: int, evidence: Evidence) -> tuple[list[ResultRow], str]:
    """Rows of the runs that a side means if L is `length`; none, and why, if that is not a single set of runs."""
    train = side.train * length
    mode = "items" if side.task != "text" else "nonoverlapping" if side.stride is None else "sliding"
    view = View(side.split, mode, side.stride, side.task, side.metric)
    rows = [
        row
        for row in (evidence.rows if not side.beyond else filter(None, map(_beyond, evidence.rows)))
        if row.run is not None
        and row.position == side.position
        and math.isclose(row.train_length or 0, train)
        and view_of(row) == view
        and {k: v for k, v in row.changes.items() if k != CHECKPOINT} == side.changes
        and abs(evidence.stage(row) - side.stage) < NEAR
        and all(evidence.setting(row.run, key) == value for key, value in side.where.items())
    ]
    what = f"runs of {side.position} trained at {train:g}"
    if not rows:
        settings = "".join(f", {key}={value}" for key, value in {**side.where, **side.changes}.items())
        settings += "" if side.stage == 1 else f", after {side.stage:.0%} of its training"
        return [], f"no {what}{settings}, {view.title}"
    found = curves(rows, view, evidence.words)
    if len(found) > 1:
        # Runs with the experiment's own settings are meant. If the claim names others, there are none such here.
        variants = ", ".join(sorted(curve.variant or "as in the experiment" for curve in found))
        own = {run for curve in found if evidence.is_own(curve) for run in curve.seeds}
        rows = [row for row in rows if row.run in own]
        if not rows:
            return [], f"several variants of {what}: {variants}"
    return rows, ""


def _beyond(row: ResultRow) -> ResultRow | None:
    """The row of only those answers that the last L tokens do not give, if there are any."""
    if (share := row.extra.get("beyond")) is None:
        return None
    items = row.extra["items_beyond"]
    return replace(row, value=share, n=items, extra=row.extra | ({"items": items} if "items" in row.extra else {}))


def _of_view(claim: Claim, evidence: Evidence, view: str) -> tuple[list[Found], str]:
    """The cases of a claim about a view, at the lengths (contexts, distances) that the left side means."""
    assert claim.left is not None
    found: list[Found] = []
    reasons = []
    analysis = evidence.analyses.get(view)
    for series in analysis.series if analysis and analysis.split == "validation" else ():
        # Variants stand beside the experiment's own settings only where both were analysed.
        if series.position != claim.left.position or series.variant or series.changes:
            continue
        points = {int(point[VIEWS[view].at]): point for point in series.points}
        values = {n: value for n, p in points.items() if (value := _value(claim, series, p, view)) is not None}
        at = claim.left.lengths(series.train_length, values)
        own = values.get(series.train_length)
        if not at or (claim.right is not None and own is None):
            reasons.append(
                f"L={series.train_length}: view={view} has no value at {claim.left.words}, or none at L"
            )
            continue
        for n in at:
            value = values[n]
            if claim.left.number and claim.right is not None:
                assert isinstance(value, Sample) and isinstance(own, Sample)
                logs = [
                    replace(one, values={k: math.log(v) for k, v in one.values.items()}) for one in (value, own)
                ]
                value = replace(logs[0].minus(logs[1]), metric="ratio", why="")
            words = _WORDS.get(view, "at {n}").format(n=n, L=series.train_length) + _alone(claim, series, n, view)
            found.append((f"L={series.train_length}, {words}", value, None))
    return found, _some(reasons) or ("" if found else f"needs analyse.py view={view} of such runs")


def _alone(claim: Claim, series: Series, n: int, view: str) -> str:
    """What the bias alone gives, in words; empty where that was not measured."""
    assert claim.left is not None
    known = {int(p[VIEWS[view].at]): (p.get("bias_alone") or {}).get(claim.left.number) for p in series.points}
    value, own = known.get(n), known.get(series.train_length)
    if value is None or (claim.right is not None and not own):
        return ""
    return f" (bias alone: {value / own if claim.right is not None and own else value:.3f})"


_WORDS = {
    "decomposition": "from L to {n}",
    "fixed": "with {n} tokens of context over {L}",
    "repeat": "at a distance of {n}",
    "effective_context": "all contexts",
}
"""How the points of a view are described."""


def _value(claim: Claim, series: Series, point: Mapping[str, Any], view: str) -> Sample | Measured | None:
    """The value of a point for a claim: a change of the loss, or a number by run; None if it has none."""
    assert claim.left is not None
    name, _, per_length = claim.left.number.partition("/")
    if view == "fixed":
        return _change(series, point["difference"]) if point.get("difference") else None
    if view == "decomposition":
        return _change(series, point[name]) if point.get(name) else None  # else refused there
    by_run = point.get("by_run") if name == "nats" else (point.get("numbers") or {}).get(name)
    if not by_run or None in by_run.values():
        return None
    unit = series.train_length if per_length else 1
    return Sample({run: value / unit for run, value in by_run.items()}, metric="number")


def _change(series: Series, change: Mapping[str, Any]) -> Sample | Measured:
    """A change of the loss of an analysis, by seed and document; from earlier versions only the interval."""
    if own := change.get("by_document"):
        nats, tokens = np.array(own["nats"]), np.array(own["tokens"])
        means = dict(zip(series.runs, (nats.sum(1) / tokens.sum()).tolist(), strict=True))
        several = np.count_nonzero(tokens) > 1
        return Sample(means, nats, tokens) if several else Sample(means, why="the text is one document")
    seeds = len(series.runs)
    over = f"{seeds} seeds and {series.documents} documents" if seeds > 1 else "one seed"
    return Measured(change["nats"], change["low"], change["high"], seeds, over)


def _judge_equal_time(claim: Claim, evidence: Evidence) -> Judged:
    """Left against right after equal training time, as in Table 11 of the paper; equal updates are Table 12.

    The benchmark says how many times as fast left trains. Left wins if it is better with no more time than right
    had, and loses if right is better with no more time than left had; each side is represented by the end of its
    training or by the last checkpoint within the other's time. Otherwise nothing is settled.
    """
    left, right = claim.left, claim.right
    assert left is not None and right is not None
    rate = "train_tokens_per_second"
    speeds = _speeds(evidence.bench, rate).values()
    trained = {row.train_length for row in evidence.rows if row.train_length is not None}
    instances, reasons = [], []
    for length in sorted(n for n in trained if n * left.train in trained):
        sides = (left.position, n := round(length * left.train)), (right.position, length)
        faster = next((of[sides[0]][rate] / of[sides[1]][rate] for of in speeds if set(sides) <= set(of)), None)
        if faster is None:
            reasons.append(f"L={length}: no benchmark of {left.position} at {n} and {right.position} at {length}")
            continue
        answers: dict[str, Instance] = {}
        for wanted, limits in (("HOLDS", (faster, 1.0)), ("FAILS", (1.0, 1 / faster))):
            stages = [evidence.last_stage(*side, limit) for side, limit in zip(sides, limits, strict=True)]
            two = [replace(side, stage=stage) for side, stage in zip((left, right), stages, strict=True)]
            found, missing = _pairs(replace(claim, left=two[0], right=two[1], train_lengths=(length,)), evidence)
            reasons += [missing] if missing else []
            for what, one, other in found:
                at = ["" if stage == 1 else f" after {stage:.0%} of its training" for stage in stages]
                words = f"{left.position} at L/2{at[0]}, {faster:.3f} times as fast, {right.position}{at[1]}"
                answers[wanted] = _instance(claim, (f"{what}, {words}", one, other), 1)
        settled = [one for wanted, one in answers.items() if one.verdict == wanted]
        instances += settled[:1] or [replace(one, verdict="NOT SETTLED") for one in list(answers.values())[:1]]
    return Judged(claim, overall([i.verdict for i in instances]), instances, "" if instances else _some(reasons))


def _speeds(
    bench: Sequence[Mapping[str, Any]], name: str
) -> dict[tuple[Any, ...], dict[tuple[Any, Any], Mapping[str, Any]]]:
    """Our own code's rows with this value: device, dtype, backend, compiled -> scheme and length -> row."""
    found: dict[tuple[Any, ...], dict[tuple[Any, Any], Mapping[str, Any]]] = {}
    for row in bench:
        value = row.get(name)
        if row.get("implementation", "ours") == "ours" and isinstance(value, int | float) and value > 0:
            way = tuple(row.get(k) for k in ("device", "dtype", "backend", "compiled"))
            found.setdefault(way, {})[row.get("position"), row.get("length")] = row
    return found


def _judge_speed(claim: Claim, bench: Sequence[Mapping[str, Any]]) -> Judged:
    """Speeds at equal length, device, dtype and backend: medians over pairs of steps with the same third model."""
    assert claim.left is not None and claim.right is not None and claim.measure is not None
    name = claim.measure
    pairs = [
        (f"length {length}, {way[2]}, {way[0]}", left, right)
        for way, speeds in _speeds(bench, name).items()
        for length in dict.fromkeys(length for _, length in speeds)
        if (left := speeds.get((claim.left.position, length)))
        if (right := speeds.get((claim.right.position, length)))
    ]

    def speed(row: Mapping[str, Any]) -> Speed:
        return Speed(row[name], row.get(f"{name}_quartiles"), row.get("pairs", 0))

    instances = []
    for what, left, right in pairs:
        measured = measure_speeds(speed(left), speed(right), len(pairs))
        instances.append(_instance(claim, (what, measured, None), len(pairs), PAIRS))
    note = "" if instances else "no benchmark of both at the same length; make bench measures them"
    return Judged(claim, overall([i.verdict for i in instances]), instances, note)
