"""The paper's published perplexities beside our results: levels where we measured the same, else only shapes.

Source: Press, Smith and Lewis, "Train Short, Test Long", ICLR 2022 (arXiv 2108.12409v2), Tables 2-15, one
file per table in `paper_tables/`. Perplexities on WikiText-103 are per word, on other texts per token.
"""

from __future__ import annotations

import csv
import functools
import importlib.resources
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from alibi_lm.results.curves import VALIDATION, Curve, View, curves, views
from alibi_lm.results.rows import ResultRow, perplexity_of
from alibi_lm.study.evidence import Evidence
from alibi_lm.study.pages import Block, Table, number
from alibi_lm.study.records import RunRecord, show
from alibi_lm.study.style import label

TOKENS = {"validation": 217_646, "test": 245_569}
"""Scored words of WikiText-103's splits, line ends included."""
STEPS = 286_000
GPUS = 8
SETTINGS: dict[str, Any] = {
    "model.num_layers": 16,
    "model.model_dim": 1024,
    "model.num_heads": 8,
    "model.ffn_dim": 4096,
    "model.activation": "relu",
    "model.dropout": 0.3,
    "model.attention_dropout": 0.1,
    "model.activation_dropout": 0.1,
    "model.final_norm": False,
    "model.adaptive_cutoffs": [20000, 60000],
    "model.adaptive_factor": 4.0,
    "model.adaptive_dropout": 0.2,
    "model.initialisation": "fairseq",
    "data.name": "wikitext103",
    "tokenizer.name": "word",
    "optimizer.name": "nag",
    "schedule.name": "fairseq_cosine",
    "clip_norm": 0.1,
    "steps": STEPS,
}
"""The paper's settings of the WikiText-103 models, by our names."""
PAPER_LENGTH = 512
"""Training length of the paper's curves (Table 2): the one at which it has all four schemes."""
NEAR = 0.15
"""The paper tested at 512 + 100 and so on, not at powers of two; a length this close stands for a multiple."""
FLAT = 0.01
"""A change of perplexity of less than this share counts as none."""


@dataclass(frozen=True)
class PaperValue:
    """One published number."""

    table: int
    model: str
    position: str
    """Position scheme; empty for systems of other papers, which have no scheme, length or mode here."""
    train_length: int | None
    inference_length: int | None
    mode: str
    stride: int | None
    split: str
    corpus: str
    """`wikitext103`, `bookcorpus` or `cc100_roberta`."""
    perplexity: float | None
    """Perplexity; None if the paper has none (out of memory)."""
    note: str


@dataclass(frozen=True)
class Comparison:
    """Our value beside the paper's for one scheme and inference length."""

    view: View
    curve: Curve
    """Ours."""
    inference_length: int
    values: list[PaperValue]
    """The paper's values, one per table that has it; from a length near ours in shapes and if `near` allows it."""
    base: float | None
    """The paper's perplexity at its training length."""

    @property
    def ours(self) -> float:
        """Our perplexity: exp of the mean loss over seeds."""
        return self.curve.value(self.inference_length)

    @property
    def our_ratio(self) -> float | None:
        """Our perplexity over that at our training length."""
        return self.curve.ratio(self.inference_length)

    @property
    def paper(self) -> float:
        """The paper's perplexity."""
        assert self.values[0].perplexity is not None
        return self.values[0].perplexity

    @property
    def paper_ratio(self) -> float | None:
        """The paper's perplexity over that at its training length."""
        return self.paper / self.base if self.base else None


@functools.cache
def paper_values() -> tuple[PaperValue, ...]:
    """Every published number, by table."""
    found = []
    tables = importlib.resources.files("alibi_lm.study") / "paper_tables"
    for file in sorted(tables.iterdir(), key=lambda entry: entry.name):
        if match := re.fullmatch(r"table_(\d+)\.csv", file.name):
            for row in csv.DictReader(file.read_text(encoding="utf-8").splitlines()):
                values: dict[str, Any] = dict(row)
                for name in ("train_length", "inference_length", "stride"):
                    values[name] = int(row[name]) if row[name] else None
                values["perplexity"] = float(row["perplexity"]) if row["perplexity"] else None
                found.append(PaperValue(table=int(match[1]), **values))
    return tuple(found)


def find(
    position: str, train_length: int, inference_length: int, view: View, near: float = 0.0
) -> list[PaperValue]:
    """The paper's WikiText-103 values for one measurement, one for each table that has it.

    If the exact inference length is missing, `near` accepts the nearest one within this share (0.02: 2%); the
    paper's values change by about 0.05 from one length to the next.
    """
    same = _of_curve(position, train_length, view)
    off = {length: abs(length / inference_length - 1) for length in same}
    best = min(off, key=lambda length: (off[length], length), default=None)
    return [] if best is None or off[best] > near else same[best]


def _of_curve(position: str, train_length: int, view: View) -> dict[int, list[PaperValue]]:
    """The paper's perplexities on WikiText-103 by inference length."""
    wanted = (position, train_length, view.mode, view.stride, view.split, "wikitext103")
    found: dict[int, list[PaperValue]] = {}
    for v in paper_values():
        if (v.position, v.train_length, v.mode, v.stride, v.split, v.corpus) == wanted:
            if v.inference_length is not None and v.perplexity is not None:
                found.setdefault(v.inference_length, []).append(v)
    return found


def paper_curves(ours: Iterable[Curve], view: View) -> list[Curve]:
    """The paper's curves of the same schemes and training lengths, if they have two points or more."""
    found = []
    for position, train_length in sorted({(c.position, c.train_length) for c in ours}):
        values = _of_curve(position, train_length, view)
        losses = {n: {"paper": math.log(v[-1].perplexity or math.nan)} for n, v in values.items()}
        if len(losses) > 1:
            found.append(Curve(position, train_length, "paper", losses))
    return found


def compare(
    rows: Sequence[ResultRow], words: Mapping[str, str] | None = None, near: float = 0.0
) -> list[Comparison]:
    """Our values beside the paper's, where it has one (`near`: see `find`); per word with any tokenizer."""
    per_word = [counted for row in rows if row.task == "text" and (counted := _per_word(row)) is not None]
    found = []
    for view in views(per_word):
        for curve in curves(per_word, view, words):
            own = find(curve.position, curve.train_length, curve.train_length, view)
            for length in curve.lengths:
                if values := find(curve.position, curve.train_length, length, view, near):
                    found.append(Comparison(view, curve, length, values, own[0].perplexity if own else None))
    return found


def _per_word(row: ResultRow) -> ResultRow | None:
    """The same row counted in words, so that its perplexity is per word like the paper's; None if it has none."""
    if row.nats is None or not row.words:
        return row
    value, _ = perplexity_of(row.nats, row.words)
    return None if value is None else replace(row, tokens=row.words, n=row.words, perplexity=value, value=value)


def caveats(rows: Sequence[ResultRow], records: Mapping[str, RunRecord]) -> list[str]:
    """How these runs differ from the paper's in model, data and budget; empty if no difference is known."""
    found = []
    texts = [row for row in rows if row.run is not None and row.task == "text"]
    for split in sorted({row.split for row in texts}):
        words = {row.words for row in texts if row.split == split}
        expected = TOKENS.get(split)
        if words != {expected}:
            counts = ", ".join("unknown" if n is None else f"{n:,}" for n in sorted(words, key=lambda n: n or 0))
            found.append(f"text: {split} has {counts} words, the paper's {expected or 0:,}")
    if any(row.words is not None and row.words != row.tokens for row in texts):
        found.append("text: tokens are not words; our perplexities below are per word nevertheless")
    trained_on = {str(record.train_split.get("identity")) for record in records.values()}
    found += [f"training text: {text}" for text in sorted(trained_on) if text.startswith("not ")]
    known = [record for record in records.values() if record.config]
    if len(known) < len(records):
        found.append(f"unknown: {len(records) - len(known)} runs have no config.yaml at hand")
    for key, expected in SETTINGS.items():
        values = {show(r.config[key]) for r in known if key in r.config and r.config[key] != expected}
        if values:
            found.append(f"{key} = {' and '.join(sorted(values))}, the paper's {show(expected)}")
    shares = sorted({share for record in known if (share := _budget(record)) is not None})
    if shares and (min(shares) < 0.99 or max(shares) > 1.01):
        span = f"{shares[0]:.2%}" if len(shares) == 1 else f"{shares[0]:.2%} to {shares[-1]:.2%}"
        found.append(f"budget: {span} of the paper's training tokens")
    elif any(_budget(record) is None for record in known):
        found.append("budget: tokens seen in training are not recorded for every run")
    return found


def comparison_page(evidence: Evidence, near: float = 0.0) -> list[Block]:
    """`paper.md`: differences from the paper's setup, then paper | ours | difference | ratios, then shapes."""
    page: list[Block] = ["# Beside the paper's numbers"]
    if notes := caveats(evidence.rows, evidence.records):
        page += ["**These are not the paper's experiments.** What differs:", tuple(notes)]
        page.append(
            "Absolute perplexities are then not comparable; the ratios to the value at the training length "
            "say whether the shape is the same."
        )
    else:
        page.append("Model, text, recipe and budget are the paper's, as far as the run folders tell.")
    found = compare(evidence.rows, evidence.words, near)
    for view in dict.fromkeys(item.view for item in found):
        table = comparison_table([item for item in found if item.view == view])
        page += [f"## {view.title[0].upper()}{view.title[1:]}", table]
    if found:
        page.append("Ratio: to the value at the training length. Ours: mean over seeds of the loss per word.")
    else:
        page.append("The paper has no number for any of these schemes, lengths, modes and splits.")
    if of_shape := shapes(evidence.rows, evidence.words):
        page += [
            "## Shapes",
            "Perplexity over that at the training length, at multiples of it; validation, nonoverlapping windows. "
            f"Paper: Table 2. Within {FLAT:.0%} of 1 counts as flat.",
            shapes_table(of_shape),
        ]
    return page


def comparison_table(items: Sequence[Comparison]) -> Table:
    """The paper's value, ours and both ratios, one line per measurement."""
    body = []
    for item in items:
        curve = item.curve
        tested, paper_length = str(item.inference_length), item.values[0].inference_length
        if paper_length != item.inference_length:
            tested += f" (paper: {paper_length})"
        body.append(
            [
                label(curve.position, curve.variant),
                str(curve.train_length),
                tested,
                f"{item.paper:.2f}",
                ", ".join(map(str, sorted({value.table for value in item.values}))),
                f"{item.ours:.2f}",
                str(len(curve.losses[item.inference_length])),
                f"{item.ours - item.paper:+.2f}",
                number(item.paper_ratio, 3),
                number(item.our_ratio, 3),
            ]
        )
    header = "scheme,trained at,tested at,paper,table,ours,seeds,difference,paper's ratio,our ratio".split(",")
    return Table(header, body)


def direction(ratio: float) -> str:
    """`worse`, `flat` or `better`, for a ratio of perplexity to that at the training length."""
    return "flat" if abs(ratio - 1) <= FLAT else "worse" if ratio > 1 else "better"


def shapes(rows: Sequence[ResultRow], words: Mapping[str, str] | None = None) -> list[Comparison]:
    """Every power-of-two multiple that was evaluated and that the paper has at L = 512, by scheme.

    Levels of perplexity depend on text, model and budget; a smaller study can confirm only in which direction a
    scheme goes past its training length, and roughly how fast.
    """
    found = []
    for curve in curves(rows, VALIDATION, words):
        own = find(curve.position, PAPER_LENGTH, PAPER_LENGTH, VALIDATION)
        for factor, length in curve.doublings() if own and not curve.variant else []:
            values = find(curve.position, PAPER_LENGTH, factor * PAPER_LENGTH, VALIDATION, NEAR)
            if values and curve.ratio(length) is not None:
                found.append(Comparison(VALIDATION, curve, length, values, own[0].perplexity))
    return found


def shapes_table(found: Iterable[Comparison]) -> Table:
    """Ratios to the training length, the paper's and ours, and whether they go in the same direction."""
    body = []
    for shape in found:
        assert shape.paper_ratio is not None and shape.our_ratio is not None
        paper, ours = direction(shape.paper_ratio), direction(shape.our_ratio)
        length = shape.curve.train_length
        body.append(
            [
                label(shape.curve.position),
                f"{shape.inference_length // length} L",
                f"{number(shape.paper_ratio, 3)} ({shape.values[0].inference_length:,})",
                f"{number(shape.our_ratio, 3)} (L = {length})",
                f"yes: {ours}" if paper == ours else f"no: {paper}, {ours}",
            ]
        )
    return Table(["scheme", "tested at", f"paper (L = {PAPER_LENGTH}, at)", "ours", "same direction?"], body)


def _budget(record: RunRecord) -> float | None:
    """Tokens seen in training as a share of the paper's at this training length."""
    seen, length = record.finished.get("tokens_seen"), record.config.get("train_length")
    if not isinstance(seen, int | float) or not isinstance(length, int) or not 1 <= length <= 9216:
        return None
    return seen / (9216 // length * length * GPUS * STEPS)  # 9,216 tokens per GPU, cut to whole sequences
