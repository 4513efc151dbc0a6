"""The atlas: every scheme of an experiment side by side, and a card for each, as one HTML page and as Markdown.

Made from result rows, sums per document, analyses and `cards.json` (alibi_lm/evaluate/cards.py) alone.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alibi_lm.files import read_json, write_text
from alibi_lm.results.curves import VALIDATION, Curve, curves, point_of, view_of
from alibi_lm.results.rows import ResultRow
from alibi_lm.study.analysis import Series
from alibi_lm.study.compare import Measured, answer_at, judge, measure, sample
from alibi_lm.study.evidence import Evidence, read_evidence
from alibi_lm.study.plots import Cell, Line, Panel, build, dress, grid, save
from alibi_lm.study.report import coloured, picture, report_page, safe
from alibi_lm.study.style import label, look
from alibi_lm.study.tables import Table, escape, number, provenance
from alibi_lm.study.view_figures import decomposition_panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FACTORS = (1, 2, 8)
"""Inference lengths, in training lengths, at which schemes are judged."""
RIVALS = ("alibi", "rotary")
FLAT = 1.01
"""Perplexity at 8 L over that at L up to which a scheme is said to extrapolate."""
STANDINGS = {
    "HOLDS": ("extrapolates", "#00614C"),
    "NOT SETTLED": ("not settled", "#7A5200"),
    "FAILS": ("does not", "#B00020"),
    "NOT RUN": ("ends at L", "#6A6A6A"),
}
NEAR_BEST = 0.01
"""A context whose perplexity is at most this share above the best one's is long enough."""


@dataclass(frozen=True)
class Entry:
    """One scheme."""

    curve: Curve
    card: Mapping[str, Any]
    beyond: Measured | None
    """Nats at 8 L minus those at L; None where there is no value."""
    answers: Mapping[tuple[str, int], tuple[str, Measured | None]]
    """Rival and multiple of L -> whether this scheme is better (YES, NO, NOT SETTLED, NOT RUN), and the ratio."""
    train_time: float | None
    """Processor time per token of a training pass over that without positions."""
    eval_time: float | None
    """The same of a forward pass at 8 L."""
    context: int | None
    """Shortest context whose perplexity is within 1% of the best."""
    parts: Series | None = field(repr=False, default=None)

    @property
    def name(self) -> str:
        """For people."""
        return label(self.curve.position, self.curve.variant)

    @property
    def standing(self) -> str:
        """The verdict on "at 8 L it is at most 1% worse than at L"."""
        if self.beyond is None:
            return "NOT RUN"
        return judge(self.beyond, "below", FLAT, 2)

    def value(self, factor: int) -> float | None:
        """Perplexity at a multiple of L."""
        length = factor * self.curve.train_length
        return self.curve.value(length) if length in self.curve.losses else None

    def ratio(self, factor: int) -> float | None:
        """Perplexity at a multiple of L over that at L."""
        return self.curve.ratio(factor * self.curve.train_length)


def write_atlas(folder: Path, target: Path) -> list[Path]:
    """Write `index.html` (one file that needs nothing else), `README.md` and their pictures.

    Args:
        folder: holds `results.jsonl` and `cards.json`.
        target: made where missing; pictures of schemes that are gone are removed.

    Raises:
        ValueError: no or damaged results, or no cards.
    """
    evidence = read_evidence(folder)
    entries = entries_of(evidence, read_cards(folder / "cards.json"))
    target.mkdir(parents=True, exist_ok=True)
    for old in target.glob("*.png"):
        old.unlink()
    pictures = target / "all.png"
    save(overview(entries, provenance(evidence.rows, VALIDATION)), pictures)
    blocks: list[Block] = [*_front(entries, evidence, pictures)]
    for entry in entries:
        path = target / f"{_slug(entry)}.png"
        save(card_figure(entry, entries), path)
        blocks += _card(entry, path)
    page, text = target / "index.html", target / "README.md"
    write_text(page, report_page("Atlas of position schemes", "\n".join(block.html() for block in blocks)))
    write_text(text, "\n".join(block.markdown() for block in blocks))
    return [page, text, *sorted(target.glob("*.png"))]


def read_cards(path: Path) -> list[dict[str, Any]]:
    """The cards of the schemes.

    Raises:
        ValueError: no such file, or none of ours.
    """
    try:
        return [dict(card) for card in read_json(path)["cards"]]
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist. `make atlas` writes it with the results.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no cards ({error!r}). Delete it and give make atlas again.") from None


def entries_of(evidence: Evidence, cards: Sequence[Mapping[str, Any]]) -> list[Entry]:
    """The schemes at the most frequent training length: first those that extrapolate, by perplexity at 8 L."""
    rows = [row for row in evidence.rows if row.run is not None and view_of(row) == VALIDATION and not row.changes]
    most = Counter(c.train_length for c in curves(rows, VALIDATION, evidence.words)).most_common(1)[0][0]
    found = [c for c in curves(rows, VALIDATION, evidence.words) if c.train_length == most and c.losses]
    by_run: dict[str, list[ResultRow]] = {}
    for row in rows:
        by_run.setdefault(str(row.run), []).append(row)
    of = {c.position: [r for run in c.seeds for r in by_run[run]] for c in found if not c.variant}
    plain = next((card for card in cards if card["position"] == "none"), {})
    entries = []
    for curve in found:
        own = [row for run in curve.seeds for row in by_run[run]]
        answers = {
            (rival, factor): answer_at(own, of[rival], evidence.documents, factor * most, 1)[:2]
            for rival in RIVALS
            if rival in of and rival != (curve.position if not curve.variant else "")
            for factor in FACTORS
        }
        ends = [[row for row in own if row.inference_length == n * most] for n in (max(FACTORS), 1)]
        known = all(end and all(point_of(row) is not None for row in end) for end in ends)
        samples = [sample(end, evidence.documents) for end in ends] if known else []
        beyond = measure(samples[0], samples[1]) if samples else None
        fixed, parts = (_series(evidence, view, curve) for view in ("fixed", "decomposition"))
        card = next((one for one in cards if one["run"] in curve.seeds), {})
        times = _over(card, plain, "train"), _over(card, plain, "evaluate")
        entries.append(Entry(curve, card, beyond, answers, *times, _context(fixed), parts))
    order = list(STANDINGS)
    return sorted(entries, key=lambda e: (order.index(e.standing), e.value(max(FACTORS)) or e.value(1) or 0.0))


def _over(card: Mapping[str, Any], plain: Mapping[str, Any], what: str) -> float | None:
    """Time per token over that of the scheme without positions."""
    own, base = (one.get("seconds_per_token", {}).get(what) for one in (card, plain))
    return own / base if own and base else None


def _series(evidence: Evidence, view: str, curve: Curve) -> Series | None:
    analysis = evidence.analyses.get(view)
    for series in analysis.series if analysis else ():
        if set(series.runs) <= set(curve.seeds) and not series.changes:
            return series
    return None


def _context(fixed: Series | None) -> int | None:
    known = {p["context"]: p["nats"] for p in fixed.points if p["nats"] is not None} if fixed else {}
    return min((c for c, v in known.items() if v <= min(known.values()) + NEAR_BEST), default=None)


# --- pictures ------------------------------------------------------------------------------------


def overview(entries: Sequence[Entry], origin: str) -> Any:
    """Small multiples: each scheme in its colour, the others behind it in grey."""
    cells: list[Cell] = [functools.partial(_thumbnail, entry=entry, entries=entries) for entry in entries]
    remarks = [
        "Perplexity by inference length, log axes, the same in all panels; dashed: the training length L. Number: "
        "perplexity at 8 L over that at L."
    ]
    return build("Who extrapolates", grid(cells, 6), origin, remarks, size=(1.72, 1.3), dense=True)


def _thumbnail(axis: Axes, entry: Entry, entries: Sequence[Entry]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    words, color = STANDINGS[entry.standing]
    dress(axis, entry.name, look(entry.curve.position).color)
    for other in entries:
        axis.plot(other.curve.lengths, _values(other.curve), color="#C4C4C4", linewidth=0.6, zorder=1)
    line = _line(entry)
    axis.fill_between(line.x, line.low, line.high, color=look(line.position).color, alpha=0.25, linewidth=0)
    axis.plot(line.x, line.y, color=look(line.position).color, linewidth=2.2, zorder=3)
    axis.axvline(entry.curve.train_length, color="#999999", linewidth=0.8, dashes=(3, 2), zorder=1)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_ylim(*_limits(entries))
    ticks = [factor * entry.curve.train_length for factor in FACTORS]
    axis.xaxis.set_major_locator(FixedLocator(ticks))
    axis.xaxis.set_major_formatter(
        FuncFormatter(lambda v, _: f"{v / entry.curve.train_length:g}L".removeprefix("1L") or "L")
    )
    axis.yaxis.set_major_locator(FixedLocator([v for v in (10, 20, 30, 50, 100, 200, 500, 1000)]))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    for which in (axis.xaxis, axis.yaxis):
        which.set_minor_locator(NullLocator())
    ratio = entry.ratio(max(FACTORS))
    text = words if ratio is None else f"{words}: {ratio:.2f}"
    axis.text(0.04, 0.96, text, transform=axis.transAxes, va="top", fontsize=8, color=color, fontweight="bold")


def card_figure(entry: Entry, entries: Sequence[Entry]) -> Any:
    """Its curve among all others, and why its loss changes beyond L where that was measured."""
    curve = entry.curve
    behind = [Line(o.curve.position, "", [float(n) for n in o.curve.lengths], _values(o.curve)) for o in entries]
    cells: list[Cell] = [
        Panel(
            [_line(entry)],
            trained=curve.train_length,
            log_y=True,
            limits=_limits(entries),
            band=True,
            behind=behind,
        )
    ]
    remarks = ["Its band goes from the lowest to the highest seed; grey: all other schemes."]
    if entry.parts is not None:
        cells.append(functools.partial(decomposition_panel, series=entry.parts))
        remarks.append(
            "Right: what changes the loss from L on: early tokens (blue), positions beyond L (pink), keys further "
            "than L (orange); diamond: their total. Left axis: nats per token, right: factor of perplexity."
        )
    return build(entry.name, [cells], "", remarks, size=(3.4, 2.3))


def _line(entry: Entry) -> Line:
    curve = entry.curve
    runs = [[curve.shown(v) for v in curve.losses[n].values()] for n in curve.lengths]
    low, high = [min(values) for values in runs], [max(values) for values in runs]
    return Line(curve.position, "", [float(n) for n in curve.lengths], _values(curve), "", low, high)


def _values(curve: Curve) -> list[float]:
    return [curve.value(n) for n in curve.lengths]


def _limits(entries: Sequence[Entry]) -> tuple[float, float]:
    values = [v for entry in entries for v in _values(entry.curve)]
    return min(values) * 0.92, max(values) * 1.35


# --- words ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A piece of the page, in both of its forms."""

    kind: str
    """h1, h2, h3, p, pre, picture or table."""
    content: Any
    anchor: str = ""

    def html(self) -> str:
        """For index.html; everything is escaped."""
        if self.kind == "table":
            return coloured(self.content.html(), {verdict: words for verdict, (words, _) in STANDINGS.items()})
        if self.kind == "picture":
            return picture(self.content.stem, self.content)
        if self.kind == "links":
            return "<p>" + " | ".join(f'<a href="#{a}">{safe(text)}</a>' for a, text in self.content) + "</p>"
        named = f' id="{self.anchor}"' if self.anchor else ""
        return f"<{self.kind}{named}>{safe(self.content)}</{self.kind}>"

    def markdown(self) -> str:
        """For README.md."""
        if self.kind == "table":
            return str(self.content.markdown())
        if self.kind == "picture":
            return f"![{self.content.stem}]({self.content.name})\n"
        if self.kind == "links":
            return ""
        if self.kind == "pre":
            return f"```\n{self.content}\n```\n"
        return {"h1": "# ", "h2": "## ", "h3": "### "}.get(self.kind, "") + escape(self.content, keep="[]_") + "\n"


def _front(entries: Sequence[Entry], evidence: Evidence, pictures: Path) -> Iterator[Block]:
    length = entries[0].curve.train_length
    standings = Counter(entry.standing for entry in entries)
    words = {"HOLDS": "extrapolate", "NOT SETTLED": "not settled", "FAILS": "do not", "NOT RUN": "end at L"}
    counts = "; ".join(f"{what}: {standings[key]}" for key, what in words.items() if standings[key])
    yield Block("h1", "Atlas of position schemes")
    yield Block(
        "p",
        f"{len(entries)} schemes, trained alike at L = {length}, tested to {max(FACTORS)} L; {counts}. A scheme "
        f"extrapolates if its perplexity at {max(FACTORS)} L is at most {FLAT - 1:.0%} above that at L, by a 95% "
        "interval over seeds and documents.",
    )
    origin = provenance(evidence.rows, VALIDATION)
    yield Block("p", f"{origin}. A verdict is about this text and models of this size.")
    for item in evidence.unfair:
        if item.matters:
            yield Block("p", f"NOT A FAIR COMPARISON: {item.sentence}")
    yield Block("picture", pictures)
    yield Block("links", [(_slug(entry), entry.name) for entry in entries])
    orders = {
        f"Best at {max(FACTORS)} L first": lambda e: e.value(max(FACTORS)),
        "Best at the training length first": lambda e: e.value(1),
        "Cheapest to train first": lambda e: e.train_time,
    }
    for title, key in orders.items():
        yield Block("h2", title)
        yield Block("table", _table(sorted(entries, key=lambda e: (key(e) is None, key(e) or 0.0))))
    yield Block(
        "p",
        "Better than ALiBi (rotary): at L, 2 L and 8 L, YES or no by a paired 95% interval, ? where that leaves "
        "it open, - where there is no value. Times: processor time per token over that without positions, of a "
        "forward and backward pass at L, and of a forward pass at 8 L.",
    )
    yield Block("h1", "Cards")


def _table(entries: Sequence[Entry]) -> Table:
    head = ["scheme", "past L", "at L", "at 2 L", "at 8 L", "8 L / L", "better than ALiBi", "than rotary"]
    body = []
    for entry in entries:
        cells = [number(entry.value(factor)) for factor in FACTORS]
        cells.append(number(entry.ratio(max(FACTORS)), 3))
        for rival in RIVALS:
            signs = {"YES": "YES", "NO": "no", "NOT SETTLED": "?", "NOT RUN": "-"}
            told = [signs[entry.answers[rival, f][0]] for f in FACTORS if (rival, f) in entry.answers]
            cells.append(", ".join(told))
        cells += [number(v) for v in (entry.train_time, entry.eval_time)]
        parameters = entry.card.get("parameters")
        words = STANDINGS[entry.standing][0]
        body.append([entry.name, words, *cells, "-" if parameters is None else f"{parameters:,}"])
    return Table([*head, "training time", "evaluation time", "parameters"], body, 2)


def _card(entry: Entry, path: Path) -> Iterator[Block]:
    card = entry.card
    yield Block("h2", entry.name, _slug(entry))
    yield Block("p", str(card.get("title", "")))
    if card.get("formula"):
        yield Block("pre", card["formula"])
    yield Block("picture", path)
    field = card.get("receptive_field")
    facts = {
        "source": card.get("source") or "-",
        "acts on": ", ".join(card.get("acts_on", [])) or "nothing",
        "past L": card.get("beyond") or "defined everywhere",
        "parameters": f"{card.get('parameters', 0):,}",
        "training time": f"{number(entry.train_time)} of that without positions",
        "evaluation time": f"{number(entry.eval_time)} of that without positions",
        "receptive field of the bias": _field(field, entry.curve.train_length),
        "receptive field as measured": "-"
        if entry.context is None
        else f"{entry.context} tokens of context are within {NEAR_BEST:.0%} of the best",
    }
    yield Block("table", Table(["what", "this scheme"], [list(pair) for pair in facts.items()], 2))
    body = []
    for rival in RIVALS:
        for factor in FACTORS:
            if (rival, factor) in entry.answers:
                answer, measured = entry.answers[rival, factor]
                ratio = measured.ratio if measured else "-"
                body.append([label(rival), "L" if factor == 1 else f"{factor} L", answer, ratio])
    if body:
        yield Block("table", Table(["better than", "at", "answer", "perplexity over its"], body, 3))


def _field(reach: Sequence[int] | None, train_length: int) -> str:
    """In words, of the shortest and the longest head."""
    if reach is None:
        return "no bias by distance"
    shown = [f"{n:,}" if n < 32 * train_length else "no limit" for n in reach]
    heads = shown[0] if shown[0] == shown[1] else f"{shown[0]} to {shown[1]} by head"
    return f"{heads} (distances that hold 99% of its weight)"


def _slug(entry: Entry) -> str:
    words = f"{entry.curve.position}_{entry.curve.variant}".rstrip("_")
    return "".join(c if c.isalnum() else "_" for c in words)
