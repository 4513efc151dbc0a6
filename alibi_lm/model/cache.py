"""Keys and values of the tokens seen so far, all of them: it serves every scheme.

`window_cache.py` keeps those of a window per head; `streaming.py` builds either by the name of a policy.

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
    """What one scheme contributes to a forward pass, computed once and used by every layer it serves."""

    scheme: PositionScheme
    tables: tuple[Tensor, ...]
    attend: Attend | None
    """None where a cache attends by itself."""
    query_factor: Tensor | None = None
    """(1, T) or (H, T) float32 or better: what queries are multiplied by (`model.query_scale`)."""


class KeyValueCache:
    """Keys and values of all tokens seen so far.

    Buffers double when they are full, so that a step copies no old keys. What was seen is counted at the end of a
    pass, so a pass that raises leaves the cache as it was: what some layers have stored beyond is overwritten.

    Args:
        capacity: tokens to make room for at first.

    Attributes:
        first: the first of the positions; 0 when empty.
        next_position: the one after the last; 0 when empty.
        lost_share: upper bound of the share of attention that any query lost in any head; None: not known.
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
    def positions(self) -> Tensor | None:
        """(S,) int64; None when empty."""
        return self._positions[: self.tokens_seen] if self.tokens_seen else None

    @property
    def layers(self) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """Of each layer k, v (B, H, S, K), and features of its input (B, S, F) for schemes that read it."""
        return [self._held(layer, self.tokens_seen) for layer in range(len(self._buffers))]

    @property
    def keys_held(self) -> float:
        """Keys of a sequence that are kept, mean over heads and layers."""
        return float(self.tokens_seen)

    def key_positions(self, positions: Tensor) -> Tensor:
        """Positions of the keys of a pass: those seen and the new ones."""
        new = self.tokens_seen + len(positions)
        if new > len(self._positions) or self._positions.device != positions.device:
            grown = positions.new_empty(max(self.capacity, 2 * self.tokens_seen, new))
            grown[: self.tokens_seen] = self._positions[: self.tokens_seen]
            self._positions = grown
        self._positions[self.tokens_seen : new] = positions
        return self._positions[:new]

    def begin(self, first: int, last: int, tokens: int, window: int | None) -> None:
        """Note the pass that starts now: first position of all keys, last one, its tokens and its window."""
        self._coming = (first, last + 1, self.tokens_seen + tokens)

    def take_rows(self, rows: Tensor) -> None:
        """Go on with these rows of the batch, (B',) int64: a search keeps some beams and drops others."""
        self._buffers = [[None if part is None else part[rows] for part in layer] for layer in self._buffers]

    def advance(self) -> None:
        """Count the tokens of the pass, which has succeeded."""
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
            position: of the pass.

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
    """A tensor of this shape, of the dtype and on the device of another one."""
    with torch.inference_mode(False):  # a tensor of inference mode could not be written to outside of it
        return torch.empty(shape, dtype=like.dtype, device=like.device)
