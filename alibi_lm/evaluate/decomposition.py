"""Why the loss at a longer window differs from the loss at the trained length: three measured parts.

Source: Press, Smith and Lewis (2022), arXiv 2108.12409, Appendix B, which shows one of the parts (the "early
token curse") by comparing two kinds of evaluation; here each part is an intervention on the model's input.

A model trained at L is scored in nonoverlapping windows of n > L tokens. Each target has three losses:
    full       as it is
    windowed   the same pass, each layer's attention limited to the last L keys
    reset      only the last L tokens of the window as input, positions from 0
and their means telescope exactly:
    full at n - full at L = (reset - full at L)     early tokens: fewer targets have a short context
                          + (windowed - reset)      positions beyond L, with no key further than L
                          + (full - windowed)       keys further than L: negative is use, positive is harm
At positions up to L all three are the same pass. Limited attention reaches further than L through several
layers: the second part holds what the model makes of that, too.

With a stride s, a reset target beyond L has between L - s + 1 and L tokens of input. Its loss is then a little
too high, which moves the same amount from the second part to the first; the third part and the sum are not
touched, and neither are the targets up to L. Stride 1 is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from alibi_lm.evaluate.passes import Passes, positions_in_window

TERMS = ("early_tokens", "positions_beyond", "keys_beyond")
"""The three parts, in the order in which they add up."""


@dataclass(frozen=True)
class Losses:
    """What the parts are differences of: (N,) nats of the same targets.

    Attributes:
        train: full, in windows of L.
        reset: in windows of n.
        windowed: in windows of n.
        full: in windows of n.
    """

    train: np.ndarray
    reset: np.ndarray
    windowed: np.ndarray
    full: np.ndarray

    def terms(self) -> dict[str, np.ndarray]:
        """Differences of every target by the name of the part, and `total`: (N,) float64 each.

        Only their sums mean something; a single target's differences must not be sorted by sign.
        """
        steps = [a.astype(np.float64) for a in (self.train, self.reset, self.windowed, self.full)]
        parts = {name: b - a for name, a, b in zip(TERMS, steps, steps[1:], strict=False)}
        return parts | {"total": steps[-1] - steps[0]}


def measure(passes: Passes, length: int, train_length: int, stride: int = 1) -> Losses:
    """Run the interventions.

    Args:
        passes: of the model over the text.
        length: n, more than train_length.
        train_length: L.
        stride: of the reset, from 1 to L.

    Raises:
        ValueError: a length that is not beyond the trained one, or a stride out of range.
    """
    if length <= train_length:
        raise ValueError(f"length = {length}; the parts exist beyond train_length = {train_length} only.")
    if not 1 <= stride <= train_length:
        raise ValueError(f"stride = {stride}. Allowed: 1 to train_length = {train_length}.")
    return Losses(
        passes.nats(train_length),
        passes.reset(length, train_length, stride),
        passes.nats(length, window=train_length),
        passes.nats(length),
    )


def largest_early_difference(losses: Losses, length: int, train_length: int) -> float:
    """Largest difference, in nats, between the three losses of any target up to the trained length.

    It is rounding for every scheme whose parameters do not depend on the window's length, and shows how far the
    parts can be trusted for one whose do (automatic scaling).
    """
    early = positions_in_window(len(losses.full), length) <= train_length
    three = np.stack([losses.full[early], losses.windowed[early], losses.reset[early]])
    return float((three.max(axis=0) - three.min(axis=0)).max())


def document_sums(differences: Sequence[np.ndarray], documents: np.ndarray) -> np.ndarray:
    """Sums of differences per document: (seeds, documents) float64 from (N,) of each seed."""
    return np.stack([np.add.reduceat(d, documents, dtype=np.float64) for d in differences])
