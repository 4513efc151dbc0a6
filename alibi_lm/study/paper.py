"""The paper's published perplexities, and our results beside them: levels where we measured the same, else shapes.

Source: Press, Smith and Lewis, "Train Short, Test Long", ICLR 2022 (arXiv 2108.12409v2), Tables 2-15, one
file per table in `paper_tables/`. WikiText-103's perplexities are per word, the others' per token of their text.
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

from alibi_lm.results.curves import Curve, View, curves, views
from alibi_lm.results.rows import ResultRow, perplexity_of
from alibi_lm.study.records import RunRecord
from alibi_lm.study.style import look
from alibi_lm.study.tables import Table

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
"""The paper's settings of the WikiText-103 models, by their names here."""


PAPER_LENGTH = 512
"""Training length of the paper's curves (Table 2): the one at which it has all four schemes."""
NEAR = 0.15
"""The paper tested at 512 + 100 and so on, not at powers of two; a length this close stands for a multiple."""
FLAT = 0.01
"""A change of perplexity within one per cent is none."""
VIEW = View("validation", "nonoverlapping", None)


@dataclass(frozen=True)
class PaperValue:
    """One published number."""

    table: int
    model: str
    position: str
    """Empty for systems of other papers, which have no scheme, length or mode here."""
    train_length: int | None
    inference_length: int | None
    mode: str
    stride: int | None
    split: str
    corpus: str
    """`wikitext103`, `bookcorpus` or `cc100_roberta`."""
    perplexity: float | None
    """None where the paper has none (out of memory)."""
    note: str


@dataclass(frozen=True)
class Comparison:
    """Our value beside the paper's for the same scheme, lengths, mode and split."""

    view: View
    curve: Curve
    inference_length: int
    ours: float
    """Per word, mean over seeds of the loss per word."""
    our_ratio: float | None
    """To our value at the training length."""
    paper: float
    paper_ratio: float | None
    paper_length: int
    """Differs from `inference_length` only where near lengths were asked for."""
    tables: tuple[int, ...]


@functools.cache
def paper_values() -> tuple[PaperValue, ...]:
    """Every published number, by table."""
    found = []
    tables = importlib.resources.files("alibi_lm.study") / "paper_tables"
    for file in sorted(tables.iterdir(), key=lambda entry: entry.name):
        match = re.fullmatch(r"table_(\d+)\.csv", file.name)
        if match is None:
            continue
        for row in csv.DictReader(file.read_text(encoding="utf-8").splitlines()):
            found.append(
                PaperValue(
                    table=int(match[1]),
                    train_length=int(row.pop("train_length") or 0) or None,
                    inference_length=int(row.pop("inference_length") or 0) or None,
                    stride=int(row.pop("stride") or 0) or None,
                    perplexity=float(row.pop("perplexity") or "nan"),
                    **row,
                )
            )
    return tuple(v if v.perplexity == v.perplexity else replace(v, perplexity=None) for v in found)


def find(
    position: str, train_length: int, inference_length: int, view: View, near: float = 0.0
) -> list[PaperValue]:
    """The paper's WikiText-103 values for one measurement, one for each table that has it.

    Args:
        position: scheme.
        train_length: tokens in a training sequence.
        inference_length: tokens in a window.
        view: split, mode and stride.
        near: accept the nearest inference length within this share (0.02: two per cent) where the exact one
            is missing; the paper's values move by 0.05 or so from one length to the next.
    """
    same = [
        value
        for value in paper_values()
        if value.corpus == "wikitext103"
        and (value.position, value.train_length) == (position, train_length)
        and (value.mode, value.stride, value.split) == (view.mode, view.stride, view.split)
        and value.inference_length is not None
        and value.perplexity is not None
    ]
    off = {value.inference_length: abs(value.inference_length / inference_length - 1) for value in same}  # type: ignore[operator]
    best = min(off, key=lambda length: (off[length], length), default=None)
    if best is None or off[best] > near:
        return []
    return [value for value in same if value.inference_length == best]


def paper_curves(ours: Iterable[Curve], view: View) -> list[Curve]:
    """The paper's curves of the same schemes and training lengths, where it has two points or more."""
    found = []
    for position, train_length in sorted({(c.position, c.train_length) for c in ours}):
        losses: dict[int, dict[str, float]] = {}
        for value in paper_values():
            same = (value.position, value.train_length, value.corpus) == (
                position,
                train_length,
                "wikitext103",
            )
            if same and View(value.split, value.mode, value.stride) == view:
                if value.inference_length is not None and value.perplexity is not None:
                    losses.setdefault(value.inference_length, {})["paper"] = math.log(value.perplexity)
        if len(losses) > 1:
            found.append(Curve(position, train_length, "paper", losses))
    return found


def compare(
    rows: Sequence[ResultRow], near: float = 0.0, words: Mapping[str, str] | None = None
) -> list[Comparison]:
    """Our values beside the paper's, wherever it has one. Ours are per word, whatever the tokenizer.

    Args:
        rows: of one experiment.
        near: as in `find`.
        words: recipes of the runs, see `alibi_lm.study.records.recipes`.
    """
    per_word = [counted for row in rows if row.task == "text" and (counted := _per_word(row)) is not None]
    found = []
    for view in views(per_word):
        for curve in curves(per_word, view, words):
            own = find(curve.position, curve.train_length, curve.train_length, view)
            for length in curve.lengths:
                values = find(curve.position, curve.train_length, length, view, near)
                if not values:
                    continue
                paper = values[0].perplexity
                base = own[0].perplexity if own else None
                assert paper is not None
                found.append(
                    Comparison(
                        view,
                        curve,
                        length,
                        curve.value(length),
                        curve.ratio(length),
                        paper,
                        paper / base if base else None,
                        values[0].inference_length or length,
                        tuple(sorted({value.table for value in values})),
                    )
                )
    return found


def _per_word(row: ResultRow) -> ResultRow | None:
    """The same row counted in words, so that its perplexity is per word as the paper's; None where it has none."""
    if row.nats is None or not row.words:
        return row
    value, _ = perplexity_of(row.nats, row.words)
    return None if value is None else replace(row, tokens=row.words, n=row.words, perplexity=value, value=value)


def caveats(rows: Sequence[ResultRow], records: Mapping[str, RunRecord]) -> list[str]:
    """In what model, data and budget these runs differ from the paper's; empty when nothing is known to."""
    found = []
    texts = [row for row in rows if row.run is not None and row.task == "text"]
    for split in sorted({row.split for row in texts}):
        words = {row.words for row in texts if row.split == split}
        expected = TOKENS.get(split)
        if words != {expected}:
            counts = ", ".join("unknown" if n is None else f"{n:,}" for n in sorted(words, key=lambda n: n or 0))
            found.append(f"text: {split} has {counts} words, the paper's {expected or 0:,}")
    if any(row.words is not None and row.words != row.tokens for row in texts):
        found.append("text: tokens are not words; our perplexities below are per word all the same")
    trained_on = {_training_text(record) for record in records.values()}
    found += [f"training text: {text}" for text in sorted(filter(None, trained_on))]
    known = [record for record in records.values() if record.config]
    if len(known) < len(records):
        found.append(f"unknown: {len(records) - len(known)} runs have no config.yaml at hand")
    for key, expected in SETTINGS.items():
        values = {_show(r.config[key]) for r in known if key in r.config and r.config[key] != expected}
        if values:
            found.append(f"{key} = {' or '.join(sorted(values))}, the paper's {_show(expected)}")
    shares = sorted({share for record in known if (share := _budget(record)) is not None})
    if shares and (min(shares) < 0.99 or max(shares) > 1.01):
        span = f"{shares[0]:.2%}" if len(shares) == 1 else f"{shares[0]:.2%} to {shares[-1]:.2%}"
        found.append(f"budget: {span} of the paper's training tokens")
    elif len([r for r in known if _budget(r) is None]):
        found.append("budget: tokens seen in training are not recorded for every run")
    return found


def comparison_markdown(
    rows: Sequence[ResultRow],
    records: Mapping[str, RunRecord],
    near: float,
    words: Mapping[str, str] | None = None,
) -> str:
    """`paper.md`: what differs from the paper, then paper | ours | difference | ratios, then shapes."""
    parts = ["# Beside the paper's numbers\n"]
    notes = caveats(rows, records)
    if notes:
        parts.append("**These are not the paper's experiments.** What differs:\n")
        parts.append("".join(f"- {note}\n" for note in notes))
        parts.append(
            "Absolute perplexities are then not comparable; the ratios to the value at the training length "
            "say whether the shape is the same.\n"
        )
    else:
        parts.append("Model, text, recipe and budget are the paper's, as far as the run folders tell.\n")
    found = compare(rows, near, words)
    for view in dict.fromkeys(item.view for item in found):
        parts.append(f"## {view.title[0].upper()}{view.title[1:]}\n")
        parts.append(comparison_table([item for item in found if item.view == view]).markdown())
    if not found:
        parts.append("The paper has no number for any of these schemes, lengths, modes and splits.\n")
    else:
        parts.append("Ratio: to the value at the training length. Ours: mean over seeds of the loss per word.\n")
    if table := shapes_table(shapes(rows, words)):
        parts.append(
            "## Shapes\n\nPerplexity over that at the training length, at multiples of it; validation, "
            f"nonoverlapping windows. Paper: Table 2. Within {FLAT:.0%} of 1 counts as flat.\n\n{table.markdown()}"
        )
    return "\n".join(parts)


def comparison_table(items: Sequence[Comparison]) -> Table:
    """Paper, ours and both ratios, a line a measurement."""
    body = []
    for item in items:
        curve = item.curve
        tested = str(item.inference_length)
        if item.paper_length != item.inference_length:
            tested += f" (paper: {item.paper_length})"
        body.append(
            [
                look(curve.position).name + (f" ({curve.variant})" if curve.variant else ""),
                str(curve.train_length),
                tested,
                f"{item.paper:.2f}",
                ", ".join(map(str, item.tables)),
                f"{item.ours:.2f}",
                str(len(curve.losses[item.inference_length])),
                f"{item.ours - item.paper:+.2f}",
                _ratio(item.paper_ratio),
                _ratio(item.our_ratio),
            ]
        )
    header = "scheme,trained at,tested at,paper,table,ours,seeds,difference,paper's ratio,our ratio".split(",")
    return Table(header, body)


@dataclass(frozen=True)
class Shape:
    """One scheme at one multiple of its training length."""

    position: str
    train_length: int
    factor: int
    """Inference length over training length, of ours."""
    paper_length: int
    """The paper's inference length, nearest to the same multiple of its training length."""
    paper: float
    """Perplexity over that at the training length."""
    ours: float

    @property
    def same(self) -> bool:
        """Whether both get worse, both stay as they are, or both get better."""
        return direction(self.paper) == direction(self.ours)


def direction(ratio: float) -> str:
    """`worse`, `flat` or `better`, of a perplexity over that at the training length."""
    return "flat" if abs(ratio - 1) <= FLAT else "worse" if ratio > 1 else "better"


def shapes(rows: Sequence[ResultRow], words: Mapping[str, str] | None = None) -> list[Shape]:
    """Every power-of-two multiple that was evaluated and that the paper has, by scheme.

    Levels of perplexity depend on text, model and budget; what a smaller study can confirm is in which direction a
    scheme goes past its training length, and roughly how fast.
    """
    found = []
    for curve in curves(rows, VIEW, words):
        own = find(curve.position, PAPER_LENGTH, PAPER_LENGTH, VIEW)
        if curve.variant or not own or own[0].perplexity is None:
            continue
        for length in curve.lengths:
            factor, rest = divmod(length, curve.train_length)
            if rest or factor < 2 or factor & (factor - 1):
                continue
            ours = curve.ratio(length)
            values = find(curve.position, PAPER_LENGTH, factor * PAPER_LENGTH, VIEW, NEAR)
            if ours is None or not values:
                continue
            value = values[0]
            assert value.perplexity is not None and value.inference_length is not None
            ratio = value.perplexity / own[0].perplexity
            found.append(Shape(curve.position, curve.train_length, factor, value.inference_length, ratio, ours))
    return found


def shapes_table(found: Iterable[Shape]) -> Table | None:
    """Paper, ours, and whether the direction is the same; None where there is nothing to compare."""
    body = []
    for shape in found:
        paper, ours = direction(shape.paper), direction(shape.ours)
        body.append(
            [
                look(shape.position).name,
                f"{shape.factor} L",
                f"{shape.paper:.3f} ({shape.paper_length:,})",
                f"{shape.ours:.3f} (L = {shape.train_length})",
                f"yes: {ours}" if shape.same else f"no: {paper}, {ours}",
            ]
        )
    header = ["scheme", "tested at", f"paper (L = {PAPER_LENGTH}, at)", "ours", "same direction?"]
    return Table(header, body) if body else None


def _training_text(record: RunRecord) -> str | None:
    """What a run was trained on, where its record says that it was not WikiText-103's own training split."""
    identity = ((record.corpus.get("splits") or {}).get("train") or {}).get("identity")
    return identity if identity and identity.startswith("not ") else None


def _budget(record: RunRecord) -> float | None:
    """Tokens seen in training as a share of the paper's at this training length."""
    seen, length = record.finished.get("tokens_seen"), record.config.get("train_length")
    if not isinstance(seen, int | float) or not isinstance(length, int) or not 1 <= length <= 9216:
        return None
    return seen / (9216 // length * length * GPUS * STEPS)  # 9,216 tokens a GPU, cut to whole sequences


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _show(value: Any) -> str:
    return "null" if value is None else str(value)
