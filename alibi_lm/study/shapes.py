"""The paper's curves and ours as shapes: how much worse or better, at equal multiples of the training length.

Levels of perplexity depend on text, model and budget; what a smaller study can confirm is in which direction a
scheme goes past its training length, and roughly how fast.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from alibi_lm.results.curves import View, curves
from alibi_lm.results.rows import ResultRow
from alibi_lm.study.paper import find
from alibi_lm.study.style import look
from alibi_lm.study.tables import Table

PAPER_LENGTH = 512
"""Training length of the paper's curves (Table 2): the one at which it has all four schemes."""
NEAR = 0.15
"""The paper tested at 512 + 100 and so on, not at powers of two; a length this close stands for a multiple."""
FLAT = 0.01
"""A change of perplexity within one per cent is none."""
VIEW = View("validation", "nonoverlapping", None)


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


def shapes(rows: Sequence[ResultRow]) -> list[Shape]:
    """Every power-of-two multiple that was evaluated and that the paper has, by scheme."""
    found = []
    for curve in curves(rows, VIEW):
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


def _agreement(shape: Shape) -> str:
    paper, ours = direction(shape.paper), direction(shape.ours)
    return f"yes: {ours}" if shape.same else f"no: {paper}, {ours}"


def shapes_markdown(found: Iterable[Shape]) -> str:
    """A table, paper | ours | same direction; empty text where there is nothing to compare."""
    body = [
        [
            look(shape.position).name,
            f"{shape.factor} L",
            f"{shape.paper:.3f} ({shape.paper_length:,})",
            f"{shape.ours:.3f} (L = {shape.train_length})",
            _agreement(shape),
        ]
        for shape in found
    ]
    if not body:
        return ""
    table = Table(["scheme", "tested at", f"paper (L = {PAPER_LENGTH}, at)", "ours", "same direction?"], body)
    return (
        "## Shapes\n\nPerplexity over that at the training length, at multiples of it; validation, nonoverlapping "
        f"windows. Paper: Table 2. Within {FLAT:.0%} of 1 counts as flat.\n\n{table.markdown()}"
    )
