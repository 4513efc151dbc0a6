"""The atlas: every scheme of an experiment side by side, and a card for each, as one HTML page and as Markdown.

Made from result rows, sums per document, analyses and `cards.json` (alibi_lm/evaluate/cards.py) alone.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alibi_lm.files import read_json, write_text
from alibi_lm.results.curves import NEAR_BEST, VALIDATION, Curve, curves, effective_context, point_of, view_of
from alibi_lm.results.rows import ResultRow
from alibi_lm.settings import require
from alibi_lm.study.analysis import VIEWS, Series
from alibi_lm.study.compare import Measured, answer_at, judge, measure, sample
from alibi_lm.study.evidence import Evidence, read_evidence
from alibi_lm.study.pages import Block, Links, Table, html_page, markdown, number
from alibi_lm.study.plots import Cell, Line, Panel, build, grid, save
from alibi_lm.study.style import label
from alibi_lm.study.tables import provenance
from alibi_lm.study.view_panels import decomposition_panel

FACTORS = (1, 2, 8)
"""Inference lengths at which schemes are judged, as multiples of the training length."""
FAR = max(FACTORS)
RIVALS = ("alibi", "rotary")
FLAT = 1.01
"""A scheme is said to extrapolate if its perplexity at 8 L over that at L is at most this."""
STANDINGS = {"HOLDS": "extrapolates", "NOT SETTLED": "not settled", "FAILS": "does not", "NOT RUN": "ends at L"}
"""Verdict on "at 8 L it is at most 1% worse than at L" -> its words on the page, in the page's order."""
COLORS = 64
"""Of each picture: they are many, in the page and beside it."""


@dataclass(frozen=True)
class Entry:
    """One scheme."""

    curve: Curve
    card: Mapping[str, Any]
    standing: str
    """One of the values of STANDINGS."""
    answers: Mapping[tuple[str, int], tuple[str, Measured | None]]
    """Rival and multiple of L -> whether this scheme is better (YES, NO, NOT SETTLED, NOT RUN), and the ratio."""
    times: Mapping[str, float | None]
    """`train`, `evaluate`: processor time per token (training pass; forward pass at 8 L) relative to the scheme
    without positions."""
    context: int | None
    """Shortest context whose loss is within 1% of the best."""
    exact: str
    """Perplexity of targets with exactly 8 L tokens of context over that with exactly L, with its 95% interval."""
    parts: Series | None

    @property
    def name(self) -> str:
        """Name of the scheme on the page."""
        return label(self.curve.position, self.curve.variant)

    def value(self, factor: int) -> float | None:
        """Perplexity at a multiple of L."""
        length = factor * self.curve.train_length
        return self.curve.value(length) if length in self.curve.losses else None


def write_atlas(folder: Path, target: Path) -> list[Path]:
    """Write `index.html` (one file that needs nothing else), `README.md` and their pictures.

    Args:
        folder: holds `results.jsonl` and `cards.json`.
        target: created if missing; pictures of schemes that no longer exist are removed.

    Raises:
        ValueError: no or damaged results, none of validation in nonoverlapping windows, or no cards.
    """
    evidence = read_evidence(folder)
    entries = entries_of(evidence, read_cards(folder / "cards.json"))
    target.mkdir(parents=True, exist_ok=True)
    for old in target.glob("*.png"):
        old.unlink()
    remark = "Perplexity by inference length, the same axes in all; number: that at 8 L over that at L."
    cells: list[Cell] = [_panel(entry, entries) for entry in entries]
    origin = provenance(evidence.rows, VALIDATION)
    save(build("Who extrapolates", grid(cells, 3), origin, [remark], size=(2.6, 1.6)), target / "all.png", COLORS)
    blocks = [*_front(entries, evidence, target / "all.png")]
    for entry in entries:
        words = f"{entry.curve.position}_{entry.curve.variant}".rstrip("_")
        path = target / f"{''.join(c if c.isalnum() else '_' for c in words)}.png"
        save(card_figure(entry, entries), path, COLORS)
        blocks += _card(entry, path)
    page, text = target / "index.html", target / "README.md"
    write_text(page, html_page("Atlas of position schemes", blocks))
    write_text(text, markdown(blocks))
    return [page, text, *sorted(target.glob("*.png"))]


def read_cards(path: Path) -> list[dict[str, Any]]:
    """The cards of the schemes.

    Raises:
        ValueError: no such file, or not one of ours.
    """
    try:
        return [dict(card) for card in read_json(path)["cards"]]
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist. `make atlas` writes it with the results.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no cards ({error!r}). Delete it and give make atlas again.") from None


def entries_of(evidence: Evidence, cards: Sequence[Mapping[str, Any]]) -> list[Entry]:
    """The schemes at the most frequent training length; those that extrapolate first, by perplexity at 8 L."""
    rows = [row for row in evidence.rows if row.run is not None and view_of(row) == VALIDATION and not row.changes]
    found = [curve for curve in curves(rows, VALIDATION, evidence.words) if curve.losses]
    require(
        bool(found), f"the results have no value for {VALIDATION.title}, which the atlas shows. Use make atlas."
    )
    length = Counter(curve.train_length for curve in found).most_common(1)[0][0]
    found = [curve for curve in found if curve.train_length == length]
    of = {c.position: [row for row in rows if row.run in c.seeds] for c in found if not c.variant}
    plain = next((card for card in cards if card["position"] == "none"), {})
    entries = []
    for curve in found:
        own = [row for row in rows if row.run in curve.seeds]
        answers = {
            (rival, factor): answer_at(own, of[rival], evidence.documents, factor * length, len(FACTORS))[:2]
            for rival in RIVALS
            if rival in of and rival != (curve.position if not curve.variant else "")
            for factor in FACTORS
        }
        card = next((one for one in cards if one["run"] in curve.seeds), {})
        known, base = (one.get("seconds_per_token", {}) for one in (card, plain))
        times = {k: known[k] / base[k] if known.get(k) and base.get(k) else None for k in ("train", "evaluate")}
        fixed, parts = (_series(evidence, view, curve) for view in ("fixed", "decomposition"))
        entries.append(
            Entry(
                curve,
                card,
                _standing(own, evidence, length),
                answers,
                times,
                _context(fixed),
                _exact(fixed),
                parts,
            )
        )
    order = list(STANDINGS.values())
    return sorted(entries, key=lambda e: (order.index(e.standing), e.value(FAR) or e.value(1) or 0.0))


def _standing(own: Sequence[ResultRow], evidence: Evidence, length: int) -> str:
    ends = [[row for row in own if row.inference_length == n * length] for n in (FAR, 1)]
    if not all(end and all(point_of(row) is not None for row in end) for end in ends):
        return STANDINGS["NOT RUN"]
    far, near = (sample(end, evidence.documents) for end in ends)
    return STANDINGS[judge(measure(far, near), "below", FLAT, 2)]


def _series(evidence: Evidence, view: str, curve: Curve) -> Series | None:
    analysis = evidence.analyses.get(view)
    for series in analysis.series if analysis else ():
        if set(series.runs) <= set(curve.seeds) and not series.changes:
            return series
    return None


def _context(fixed: Series | None) -> int | None:
    known = {p["context"]: p["nats"] for p in fixed.points if p["nats"] is not None} if fixed else {}
    return effective_context(known) if known else None


def _exact(fixed: Series | None) -> str:
    for point in fixed.points if fixed else ():
        change = point.get("difference")
        if fixed and point["context"] == FAR * fixed.train_length and change and change["low"] is not None:
            value, low, high = (math.exp(change[name]) for name in ("nats", "low", "high"))
            return f"{value:.3f} [{low:.2f}, {high:.2f}]"
    return "-"


# --- pictures ------------------------------------------------------------------------------------


def _panel(entry: Entry, entries: Sequence[Entry]) -> Panel:
    """A curve in front of all others in grey; its band goes from the lowest to the highest seed."""
    curve, ratio = entry.curve, entry.curve.ratio(FAR * entry.curve.train_length)
    runs = [[curve.shown(v) for v in curve.losses[n].values()] for n in curve.lengths]
    line = replace(
        _line(curve), name=number(ratio), note=entry.standing, low=[*map(min, runs)], high=[*map(max, runs)]
    )
    behind = [_line(other.curve) for other in entries]
    values = [v for other in behind for v in other.y]
    limits = min(values) * 0.92, max(values) * 1.35
    return Panel(
        [line], entry.name, trained=curve.train_length, log_y=True, limits=limits, band=True, behind=behind
    )


def _line(curve: Curve) -> Line:
    return Line(curve.position, "", [float(n) for n in curve.lengths], [curve.value(n) for n in curve.lengths])


def card_figure(entry: Entry, entries: Sequence[Entry]) -> Any:
    """A scheme's curve in front of all others and, if measured, why its loss changes beyond L."""
    cells: list[Cell] = [_panel(entry, entries)]
    remarks = ["Its band goes from the lowest to the highest seed; grey: all other schemes."]
    if entry.parts is not None:
        cells.append(functools.partial(decomposition_panel, series=entry.parts))
        remarks.append(f"Right: what changes the loss from L on. {VIEWS['decomposition'].remark}")
    return build(entry.name, [cells], "", remarks, size=(3.4, 2.3))


# --- words ---------------------------------------------------------------------------------------


def _front(entries: Sequence[Entry], evidence: Evidence, picture: Path) -> Iterator[Block]:
    standings = Counter(entry.standing for entry in entries)
    counts = "; ".join(f"{words}: {standings[words]}" for words in STANDINGS.values() if standings[words])
    yield "# Atlas of position schemes"
    yield (
        f"{len(entries)} schemes, trained alike at L = {entries[0].curve.train_length}, tested to {FAR} L; "
        f"{counts}. A scheme extrapolates if its perplexity at {FAR} L is at most {FLAT - 1:.0%} above that at L, "
        "by a 95% interval over seeds and documents."
    )
    yield (
        "In nonoverlapping windows, as there, longer windows also leave fewer tokens with a short context, which "
        'alone lowers perplexity. The column "exact context" leaves that out: the perplexity of targets with '
        f"exactly {FAR} L tokens of context over that of the same targets with exactly L."
    )
    seen = {row.extra.get("tokens_seen") for row in evidence.rows if row.run is not None}
    amounts = " or ".join(f"{n:,}" for n in sorted(n for n in seen if n)) or "an unknown number of"
    yield (
        f"{provenance(evidence.rows, VALIDATION)}. A verdict is about this text, models of this size, and "
        f"training on {amounts} tokens: after a short training schemes that must learn their bias have less of it."
    )
    if serious := [item.sentence for item in evidence.unfair if item.matters]:
        yield "**NOT A FAIR COMPARISON:**"
        yield serious
    yield picture
    yield Links([entry.name for entry in entries])
    orders = {
        f"Best at {FAR} L first": lambda e: e.value(FAR),
        "Best at the training length first": lambda e: e.value(1),
        "Cheapest to train first": lambda e: e.times["train"],
    }
    for title, key in orders.items():
        yield f"## {title}"
        yield _table(sorted(entries, key=lambda e: (key(e) is None, key(e) or 0.0)))
    yield (
        "Better than ALiBi (rotary): at L, 2 L and 8 L, YES or no by a paired 95% interval, corrected for these "
        "three lengths but not for the number of schemes, ? where that leaves it open, - where there is no value. "
        "Times: processor time per token over that without positions, of a forward and backward pass at L, and of "
        "a forward pass at 8 L."
    )
    yield "# Cards"


def _table(entries: Sequence[Entry]) -> Table:
    head = [
        "scheme",
        "past L",
        "at L",
        "at 2 L",
        "at 8 L",
        "8 L / L",
        "exact context",
        "better than ALiBi",
        "than rotary",
    ]
    signs = {"YES": "YES", "NO": "no", "NOT SETTLED": "?", "NOT RUN": "-"}
    body = []
    for entry in entries:
        cells = [number(entry.value(factor)) for factor in FACTORS]
        cells += [number(entry.curve.ratio(FAR * entry.curve.train_length), 3), entry.exact]
        for rival in RIVALS:
            told = [signs[entry.answers[rival, f][0]] for f in FACTORS if (rival, f) in entry.answers]
            cells.append(", ".join(told))
        cells += [number(entry.times["train"]), number(entry.times["evaluate"]), _parameters(entry.card)]
        body.append([entry.name, entry.standing, *cells])
    return Table([*head, "training time", "evaluation time", "parameters"], body, 2)


def _card(entry: Entry, path: Path) -> Iterator[Block]:
    card = entry.card
    yield f"## {entry.name}"
    yield str(card.get("title", ""))
    if card.get("formula"):
        yield f"```\n{card['formula']}\n```"
    yield path
    facts = {
        "source": card.get("source") or "-",
        "acts on": ", ".join(card.get("acts_on", [])) or "nothing",
        "past L": card.get("beyond") or "defined everywhere",
        "parameters": _parameters(card),
        "training time": f"{number(entry.times['train'])} of that without positions",
        "evaluation time": f"{number(entry.times['evaluate'])} of that without positions",
        "receptive field of the bias": _field(card.get("receptive_field"), entry.curve.train_length),
        "effective context": "-"
        if entry.context is None
        else f"{entry.context} tokens (the shortest whose loss is within {NEAR_BEST:.0%} of the best)",
    }
    yield Table(["what", "this scheme"], [list(pair) for pair in facts.items()], 2)
    body = [
        [label(rival), f"{factor} L".removeprefix("1 "), answer, measured.ratio if measured else "-"]
        for (rival, factor), (answer, measured) in entry.answers.items()
    ]
    if body:
        yield Table(["better than", "at", "answer", "perplexity over its"], body, 3)


def _parameters(card: Mapping[str, Any]) -> str:
    return f"{card['parameters']:,}" if "parameters" in card else "-"


def _field(reach: Sequence[int] | None, train_length: int) -> str:
    """The receptive field of the heads with the shortest and the longest reach, in words."""
    if reach is None:
        return "no bias by distance"
    shown = [f"{n:,}" if n < 32 * train_length else "no limit" for n in reach]
    heads = shown[0] if shown[0] == shown[1] else f"{shown[0]} to {shown[1]} by head"
    return f"{heads} (distances that hold 99% of its weight)"
