"""Tables of results by inference length, and the line that states where the numbers come from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from alibi_lm.results.curves import Curve, View, baselines, curves, text_names, view_of, views
from alibi_lm.results.rows import ResultRow
from alibi_lm.results.statistics import accuracy_interval
from alibi_lm.study.evidence import Evidence
from alibi_lm.study.pages import Block, Table, numbered, refer
from alibi_lm.study.records import shortened
from alibi_lm.study.stages import stages_of
from alibi_lm.study.style import label

FIT = 0.99
"""Accuracy at the training length from which a run counts as having learned its task there."""
RETRIEVES = 0.85
"""Mean accuracy that a length must reach to count as an effective one (RULER, arXiv 2404.06654, has 85.6%)."""


def results_page(evidence: Evidence) -> list[Block]:
    """`table.md`: a section per view, what makes the comparison unfair (if anything), and which runs learned."""
    rows, words = evidence.rows, evidence.words
    page: list[Block] = ["# Results by inference length"]
    for view in views(rows):
        metric = "" if view.metric == "perplexity" else f": {view.metric}"
        page.append(f"## {view.title[0].upper()}{view.title[1:]}{metric}")
        page += [view_table(rows, view, words), provenance(rows, view)]
        if beyond := beyond_table(rows, view, words):
            page.append(beyond)
    if stages := stages_of(rows, evidence.records, words):
        page += ["## Extrapolation by stage of training", stage_table(stages)]
    if evidence.unfair:
        page.append("## Differences between the runs other than the scheme")
        page.append([item.sentence for item in evidence.unfair])
    if accuracies := accuracy_table(rows, words):
        page += ["## Accuracies: what was learned, and how far it reaches", accuracies]
    return page


def accuracy_table(rows: Sequence[ResultRow], words: Mapping[str, str]) -> Table | None:
    """Which seeds learned the task at the training length, and how far each scheme gets; None if no accuracies."""
    body = []
    for view in views(rows):
        for curve in curves(rows, view, words) if view.metric == "accuracy" else ():
            own = curve.losses.get(curve.train_length, {}).values()
            fit = f"{sum(value >= FIT for value in own)} of {len(own)}" if own else "not tested there"
            fails = (i for i, n in enumerate(curve.lengths) if curve.value(n) < RETRIEVES)
            reached = curve.lengths[: next(fails, None)]
            longest = reached[-1] if reached else "none"
            name = label(curve.position, curve.variant)
            body.append([view.task, name, str(curve.train_length), fit, str(longest)])
    note = (
        f"A seed fits where its accuracy at the training length is {FIT} or more; means count all seeds. Effective"
        f" length: the longest up to which the mean accuracy is {RETRIEVES} or more."
    )
    header = ["task", "scheme", "trained at", "seeds that fit", "effective length"]
    return Table(header, body, 2, [note]) if body else None


def stage_table(stages: Sequence[tuple[int, Curve]]) -> Table:
    """Schemes by training steps: perplexity over that at the training length, mean over the seeds."""
    steps = sorted({step for _, curve in stages for step in curve.losses})
    body = []
    for factor, curve in stages:
        cells = [f"{curve.value(step):.3f}" if step in curve.losses else "-" for step in steps]
        body.append([label(curve.position, curve.variant), str(curve.train_length), f"{factor} L", *cells])
    notes = ["Perplexity over that at the training length, both of the checkpoint at that step."]
    return Table(["scheme", "trained at", "tested at", *(f"step {step}" for step in steps)], body, 3, notes)


def view_table(rows: Sequence[ResultRow], view: View, words: Mapping[str, str] | None = None) -> Table:
    """Schemes by inference lengths: the values, and for perplexity the ratio to that at the training length."""
    found = curves(rows, view, words)
    lengths = sorted({n for curve in found for n in [*curve.losses, *curve.refused]})
    reasons: list[str] = []
    body = []
    for curve in found:
        head = [label(curve.position, curve.variant), str(curve.train_length), _seeds(curve)]
        body.append(head + [_cell(curve, n, reasons) for n in lengths])
    for name, value in sorted(baselines(rows, view).items()):
        body.append([f"{name} baseline", "", "", *(f"{value:.2f}" for _ in lengths)])
    known = next((curve.in_reach for curve in found if curve.in_reach), {})
    if known and len({curve.train_length for curve in found}) == 1:
        cells = [f"{known[n]:.3f}" if n in known else "" for n in lengths]
        body.append([f"a perfect reader of the last {found[0].train_length}", "", "", *cells])
    notes = numbered(reasons)
    if view.metric == "perplexity":
        notes.append("In brackets: ratio to the value at the training length (bold).")
    if view.metric == "accuracy":
        notes.append("Mean over all seeds; in brackets its 95% interval, over seeds and items.")
    return Table(["scheme", "trained at", "runs", *map(str, lengths)], body, 3, notes)


def beyond_table(rows: Sequence[ResultRow], view: View, words: Mapping[str, str]) -> Table | None:
    """Accuracies on the answers that the last L tokens do not give; None if that is not known, or all answers."""
    found = [curve for curve in curves(rows, view, words) if curve.beyond and any(curve.in_reach.values())]
    lengths = sorted({n for curve in found for n in curve.beyond})
    body = []
    for curve in found:
        cells = []
        for n in lengths:
            shares = list(curve.beyond.get(n, {}).values())
            low, high = accuracy_interval(shares, curve.items_beyond[n]) if shares else (0.0, 0.0)
            cells.append(f"{math.fsum(shares) / len(shares):.3f} ({low:.2f}-{high:.2f})" if shares else "-")
        body.append([label(curve.position, curve.variant), str(curve.train_length), _seeds(curve), *cells])
    notes = ["Only answers that a perfect reader of the last L tokens does not give, so that it has 0 here."]
    return Table(["beyond the last L", "trained at", "runs", *map(str, lengths)], body, 3, notes) if body else None


def provenance(rows: Iterable[ResultRow], view: View) -> str:
    """One line with corpus, tokens, seeds and code. If rows disagree, all their values are listed."""
    own = [row for row in rows if row.run is not None and view_of(row) == view]
    seeds = {row.seed for row in own if row.seed is not None}
    names = text_names(own).items()
    texts = [
        f"({shortened(corpus)})" if name == "text" else f"{name} ({shortened(corpus)})" for corpus, name in names
    ]
    what = "tokens scored" if view.task == "text" else f"targets of task {view.task} scored"
    parts = [
        ("corpus " if len(texts) == 1 else f"{len(texts)} texts: ") + ", ".join(sorted(texts)),
        _all(f"{row.tokens:,}" for row in own) + f" {what}",
        *sorted({str(row.extra["note"]) for row in own if row.extra.get("note")}),
        (f"{len(seeds)} seeds" + (", means of the loss" if view.metric == "perplexity" else ""))
        if len(seeds) > 1
        else "one seed",
        "commit " + _all(shortened(row.commit) for row in own),
    ]
    return "; ".join(parts)


def _cell(curve: Curve, length: int, reasons: list[str]) -> str:
    why = refer(curve.refused[length], reasons) if length in curve.refused else ""
    if length not in curve.losses:
        return f"- {why}" if why else "-"
    digits = 2 if curve.metric == "perplexity" else 3
    value = f"{curve.value(length):.{digits}f}"
    if curve.metric == "accuracy":
        low, high = accuracy_interval(list(curve.losses[length].values()), curve.items[length])
        value = f"{value} ({low:.2f}-{high:.2f})"
    ratio = curve.ratio(length)
    if length == curve.train_length and curve.metric == "perplexity":
        value = value if why else f"**{value}**"
    elif ratio is not None:
        value = f"{value} ({ratio:.2f})"
    return f"{value} {why}".strip()  # with a reason: some of the runs have no value there


def _seeds(curve: Curve) -> str:
    seeds = sorted(seed for seed in curve.seeds.values() if seed is not None)
    unknown = len(curve.seeds) - len(seeds)
    parts = [("seed " if len(seeds) == 1 else "seeds ") + ", ".join(map(str, seeds))] if seeds else []
    return " and ".join([*parts, *([f"{unknown} without a seed"] if unknown else [])])


def _all(values: Iterable[str]) -> str:
    *first, last = sorted(set(values))
    return f"{', '.join(first)} and {last}" if first else last
