"""How each scheme looks: colour, marker, line and name, the same in every figure.

Colours are the eight of Okabe and Ito, which colour-blind readers can distinguish; markers and dashes repeat
the distinction for print without colour. A scheme that is not listed gets its look from a hash of its name,
so that it looks the same in all figures too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Dashes = tuple[float, ...]
SOLID: Dashes = ()


@dataclass(frozen=True)
class Look:
    """Appearance of one scheme; dashes are lengths on and off in units of the line width."""

    name: str
    color: str
    marker: str
    dashes: Dashes = SOLID


LOOKS = {
    "alibi": Look("ALiBi", "#D55E00", "o"),
    "sinusoidal": Look("sinusoidal", "#0072B2", "s", (5, 1.6)),
    "rotary": Look("rotary", "#009E73", "^", (6, 1.5, 1.2, 1.5)),
    "t5": Look("T5 bias", "#B88700", "D", (2.6, 1.2)),
    "learned": Look("learned", "#CC79A7", "X"),
    "none": Look("no positions", "#222222", "v", (1.2, 1.4)),
    "kerple_log": Look("KERPLE log", "#7A3B00", "P", (4, 1.2, 1.2, 1.2)),
    "kerple_power": Look("KERPLE power", "#7A3B00", "*", (2, 1)),
    "fire": Look("FIRE", "#A01C48", "h", (3, 1, 3, 2.4)),
    "sandwich": Look("Sandwich", "#56B4E9", "p", (4, 2)),
    "xpos": Look("xPos", "#00594B", "<", (6, 1.5, 1.2, 1.5)),
    "cope": Look("CoPE", "#6F5BB5", ">", (2, 1)),
    "bam": Look("BAM", "#5B6770", "d", (4, 2)),
    "fox": Look("FoX", "#8A4FBF", "8", (7, 2)),
    "transformer_xl": Look("Transformer-XL", "#3D6B00", "*", (5, 1.6)),
    "shaw": Look("Shaw", "#5B6770", "p", (2.6, 1.2)),
    "pope": Look("PoPE", "#00799E", "P", (6, 1.5, 1.2, 1.5)),
    "path": Look("PaTH", "#3D6B00", "d", (2, 1)),
    "wall": Look("Wall", "#7A3B00", "h", (7, 2)),
    "grape_ap": Look("GRAPE-AP", "#A01C48", "<", (4, 2)),
    "dape": Look("DAPE", "#00594B", ">", (2.6, 1.2)),
}

_COLORS = ("#56B4E9", "#6F5BB5", "#7A3B00", "#A01C48", "#00594B", "#5B6770", "#3D6B00")
_MARKERS = ("P", "p", "h", "<", ">", "d", "*", "8")
_DASHES: tuple[Dashes, ...] = ((4, 2), (2, 1), (4, 1.2, 1.2, 1.2), (3, 1, 3, 2.4), (7, 2))


def look(position: str) -> Look:
    """Appearance of a scheme, listed or not; it depends only on the name."""
    if position in LOOKS:
        return LOOKS[position]
    digest = hashlib.sha256(position.encode()).digest()
    return Look(
        position,
        _COLORS[digest[0] % len(_COLORS)],
        _MARKERS[digest[1] % len(_MARKERS)],
        _DASHES[digest[2] % len(_DASHES)],
    )


def label(position: str, variant: str = "", length: int | None = None) -> str:
    """A scheme's name, with training length and variant if they are given."""
    name = look(position).name + (f" L={length}" if length else "")
    return f"{name} ({variant})" if variant else name


def room_for_ticks(axes: Iterable[Axes]) -> float:
    """Extra inches that long numbers at the y axes need, so that no name is cut."""
    lengths = [len(label.get_text()) for axis in axes for label in axis.get_yticklabels()]
    return 0.07 * max(0, max(lengths, default=0) - 5)
