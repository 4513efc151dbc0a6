"""A cache of the keys and values of all tokens seen so far; it works with every scheme.

`window_cache.py` keeps only a window per head; `streaming.py` builds either by the name of a policy.

Shape letters: B batch, T tokens now, S keys held, H heads, K head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alibi_lm.attention import Attend
from alibi_lm.positions import PositionScheme


@dataclass(frozen=True)
class LayerPositions:
    """What a scheme, and the query scale, contribute to a layer in a forward pass."""

    scheme: PositionScheme
    tables: tuple[Tensor, ...]
    attend: Attend | None
    """None if a cache attends by itself."""
    query_factor: Tensor | None = None
    """(1, T) or (H, T) float32 or better: the factors of the queries (`model.query_scale`)."""


class KeyValueCache:
    """Keys and values of all tokens seen so far.

    Buffers double when they are full, so that a step copies no old keys. Tokens are counted at the end of a pass,
    so a pass that raises leaves the cache unchanged: what some layers have stored by then is overwritten later.

    Args:
        capacity: tokens to make room for at first.

    Attributes:
        first: the first position; 0 when empty.
        next_position: the position after the last one; 0 when empty.
        lost_share: upper bound on the share of attention that any query lost in any head; None: not known.
    """

    attends = False
    """Whether the cache attends by itself, without a backend."""

    def __init__(self, capacity: int = 0) -> None:
        self.capacity = capacity
        self.first = self.next_position = self.tokens_seen = 0
        self.lost_share: float | None = 0.0
        self._buffers: list[list[Tensor | None]] = []
        self._positions = torch.empty(0, dtype=torch.int64)

    @property
    def layers(self) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """For each layer k, v (B, H, S, K), and features of its input (B, S, F) for schemes that read it."""
        return [self._held(layer, self.tokens_seen) for layer in range(len(self._buffers))]

    @property
    def keys_held(self) -> float:
        """Number of keys kept per sequence, mean over heads and layers."""
        return float(self.tokens_seen)

    def key_positions(self, positions: Tensor) -> Tensor:
        """Positions of all keys of a pass: those seen before and the new ones."""
        new = self.tokens_seen + len(positions)
        if new > len(self._positions) or self._positions.device != positions.device:
            grown = empty_like(positions, [max(self.capacity, 2 * self.tokens_seen, new)])
            grown[: self.tokens_seen] = self._positions[: self.tokens_seen]
            self._positions = grown
        self._positions[self.tokens_seen : new] = positions
        return self._positions[:new]

    def begin(self, first: int, last: int, tokens: int, window: int | None) -> None:
        """Start a pass: first position of all keys, last position, number of new tokens, and window."""
        self._coming = (first, last + 1, self.tokens_seen + tokens)

    def take_rows(self, rows: Tensor) -> None:
        """Keep these rows of the batch, (B',) int64, in this order; beam search needs this."""
        self._buffers = [[None if part is None else part[rows] for part in layer] for layer in self._buffers]

    def advance(self) -> None:
        """Count the tokens of the pass after it has succeeded."""
        self.first, self.next_position, self.tokens_seen = self._coming

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        x: Tensor | None,
        raw_k: Tensor,
        position: LayerPositions,
    ) -> Tensor:
        """Append a layer's new keys, values and inputs, and attend to all of them.

        Args:
            layer: number of the layer.
            q: (B, H, T, K).
            k: (B, H, T, K).
            v: (B, H, T, K).
            x: features of the layer's input, (B, T, F), or None.
            raw_k: (B, H, T, K), the keys before `transform_qk`.
            position: what the scheme contributes to this pass.

        Returns:
            (B, H, T, K).
        """
        if layer == len(self._buffers):
            self._buffers.append([None, None, None])
        for index, (new, dim) in enumerate(((k, 2), (v, 2), (x, 1))):
            if new is not None:
                self._buffers[layer][index] = self._append(self._buffers[layer][index], new, dim)
        assert position.attend is not None
        return position.attend(q, *self._held(layer, self.tokens_seen + k.shape[2]))

    def _held(self, layer: int, length: int) -> tuple[Tensor, Tensor, Tensor | None]:
        k, v, x = self._buffers[layer]
        assert k is not None and v is not None
        return k[:, :, :length], v[:, :, :length], None if x is None else x[:, :length]

    def _append(self, buffer: Tensor | None, new: Tensor, dim: int) -> Tensor:
        seen, total = self.tokens_seen, self.tokens_seen + new.shape[dim]
        if buffer is None or buffer.shape[dim] < total or not seen:
            shape = list(new.shape)
            shape[dim] = max(self.capacity, total if not seen else max(total, 2 * seen))
            grown = empty_like(new, shape)
            if buffer is not None and seen:
                grown.narrow(dim, 0, seen).copy_(buffer.narrow(dim, 0, seen))
            buffer = grown
        buffer.narrow(dim, seen, new.shape[dim]).copy_(new)
        return buffer


def empty_like(like: Tensor, shape: list[int]) -> Tensor:
    """A tensor of this shape, with the dtype and device of another one."""
    with torch.inference_mode(False):  # a tensor made in inference mode could not be written to outside it
        return torch.empty(shape, dtype=like.dtype, device=like.device)
