"""A cache of a window of keys and values per head: endless streams in constant memory.

Each head keeps its own number of keys. `streaming.py` builds the cache by the name of a policy.

Shape letters: B batch, T tokens now, H heads, G heads of one buffer, K head dim, N distances.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from alibi_lm.attention.decode import HeldKeys, Lines, decode
from alibi_lm.model.bound import BiasTail
from alibi_lm.model.cache import KeyValueCache, LayerPositions, empty_like
from alibi_lm.positions import PositionScheme
from alibi_lm.settings import require

CHUNK = 256
"""How many tokens a buffer holds beyond its window before it drops its oldest keys."""


@dataclass
class _Buffer:
    """The keys of some heads with equal windows."""

    heads: list[int]
    window: int
    k: Tensor
    """(B, G, capacity, K)"""
    v: Tensor
    count: int = 0
    """Number of keys in it, from its start."""

    def keep(self, tokens: int) -> None:
        """Move the last tokens to the start, and drop the others."""
        for buffer in (self.k, self.v):
            kept = buffer[:, :, self.count - tokens : self.count]
            # If the old and the new place overlap, the copy would read what it has just written.
            buffer[:, :, :tokens] = kept.clone() if self.count < 2 * tokens else kept
        self.count = tokens


class _Layer:
    """The keys of one layer, and what the kernel must know about them."""

    line: Tensor | None
    """The bias (H, N) of all distances that there can be in a buffer."""
    lines: Lines | None
    """The same as the kernel reads it."""

    def __init__(
        self,
        windows: Tensor,
        tail: BiasTail | None,
        scheme: PositionScheme,
        like: Tensor,
        first: tuple[Tensor, ...],
    ) -> None:
        self.seen, self.tail, self.scheme = 0, tail, scheme
        self.held = HeldKeys(len(windows), like.shape[-1])
        self.norms = empty_like(like.float(), [len(like), len(windows)]).zero_()
        self.first = first
        """Keys, not yet transformed, and values of the sinks."""
        self.extremes: Tensor | None = None
        """(3, H) float64: the largest norm of a query and of a key seen, and the largest -q . k of one token."""
        self.buffers: list[_Buffer] = []
        self.resize(windows, like)

    def resize(self, windows: Tensor, like: Tensor) -> None:
        """Make room for windows that are at least as large as before; dropped keys do not come back."""
        distances = torch.arange(int(windows.max()) + CHUNK, device=like.device)
        self.line, self.lines = self.scheme.distance_bias(distances), None
        if self.line is not None and like.is_cpu:
            tail = None if self.tail is None else self.tail.at(distances.expand(len(windows), -1))
            self.lines = Lines.of(self.line, tail)
        old, self.buffers = self.buffers, []
        alike = not old and bool((windows == windows[0]).all())
        for heads in [list(range(len(windows)))] if alike else [[h] for h in range(len(windows))]:
            window = int(windows[heads[0]])
            shape = [len(like), len(heads), window + CHUNK]
            k, v = (empty_like(like, [*shape, dim]) for dim in (like.shape[-1], self.first[1].shape[-1]))
            buffer = _Buffer(heads, window, k, v)
            for before in old:
                if heads[0] in before.heads:
                    at, buffer.count = before.heads.index(heads[0]), before.count
                    k[:, 0, : before.count] = before.k[:, at, : before.count]
                    v[:, 0, : before.count] = before.v[:, at, : before.count]
            self.buffers.append(buffer)
            self.held.place(heads, k, v)
            self.held.windows[heads], self.held.keys[heads] = window, buffer.count

    def make_room(self, tokens: int) -> None:
        """Count `tokens` more as held; first drop the oldest keys of every buffer that would overflow."""
        for buffer in self.buffers:
            if buffer.count + tokens > buffer.k.shape[2]:
                buffer.keep(buffer.window - 1)
            buffer.count += tokens
            self.held.keys[buffer.heads] = buffer.count
        self.seen += tokens
        self.held.missing[:] = self.seen - self.held.keys

    def place_sinks(self) -> None:
        """Put the sinks right before the rest of the window, over keys that were just dropped."""
        (buffer,), (raw_k, v) = self.buffers, self.first
        sinks = v.shape[2]
        place = slice(buffer.count - buffer.window, buffer.count - buffer.window + sinks)
        positions = torch.arange(sinks, device=v.device) + (self.seen - buffer.window)
        buffer.k[:, :, place] = self.scheme.transform_qk(raw_k, raw_k, self.scheme.tables(positions))[1]
        buffer.v[:, :, place] = v


class WindowCache(KeyValueCache):
    """The last keys of each head, for schemes whose bias, if any, is a function of the distance.

    A pass that raises leaves the cache unusable.

    Args:
        windows: for each layer, (H,) int64: keys that a head sees, including the query's own.
        native: whether the compiled kernel may be used.
        tails: for each layer, the sums of its bias; None: what is lost is not known.
        sinks: how many of the first tokens are kept too; they count in the windows, which must then be equal.
        grows: windows grow so that, by the norms of the queries and keys seen so far, no head loses more than this
            share of its attention; None: they do not grow.
        proved: share that no head can lose under any input.
    """

    attends = True

    def __init__(
        self,
        windows: list[Tensor],
        native: bool,
        tails: list[BiasTail] | None = None,
        sinks: int = 0,
        grows: float | None = None,
        proved: float = 1.0,
    ) -> None:
        super().__init__()
        self.windows, self.native, self.tails, self.sinks, self.grows = windows, native, tails, sinks, grows
        self.proved = proved
        self.lost_share = None if tails is None else 0.0
        self._stores: dict[int, _Layer] = {}

    def take_rows(self, rows: Tensor) -> None:
        raise NotImplementedError("a window of keys cannot be reordered: use cache=full for beam search")

    def begin(self, first: int, last: int, tokens: int, window: int | None) -> None:
        require(window is None, f"window = {window} with a cache that has its own windows. Leave it out.")
        require(
            last + 1 == self.tokens_seen + tokens,
            f"positions end at {last} with {self.tokens_seen + tokens} tokens, and a window counts tokens. "
            "Leave positions out.",
        )
        super().begin(first, last, tokens, window)

    @property
    def keys_held(self) -> float:
        return float(torch.stack([w.clamp_max(self.tokens_seen).double().mean() for w in self.windows]).mean())

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
        if layer not in self._stores:
            tail, none = None if self.tails is None else self.tails[layer], (raw_k[:, :, :0], v[:, :, :0])
            self._stores[layer] = _Layer(self.windows[layer], tail, position.scheme, k, none)
        store = self._stores[layer]
        assert store.seen == self.tokens_seen and k.shape[0] == len(store.norms), "a pass has failed before"
        if self.grows is not None:
            self._grow(layer, store, q, k, self.grows)
        if store.first[0].shape[2] < self.sinks:
            pairs = zip(store.first, (raw_k, v), strict=True)
            store.first = tuple(torch.cat([old, new], 2)[:, :, : self.sinks] for old, new in pairs)
        parts, start, window = [], 0, int(self.windows[layer][0])
        while start < q.shape[2]:
            step = CHUNK
            if self.sinks:  # once keys were dropped, the kept ones have other positions for every query
                step = max(1, min(CHUNK, window - store.seen))
            rows = slice(start, start + step)
            parts.append(self._piece(store, q[:, :, rows], k[:, :, rows], v[:, :, rows]))
            start += step
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def _piece(self, store: _Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        store.make_room(q.shape[2])
        if self.sinks and store.seen > store.buffers[0].window:
            store.place_sinks()
        lost = None if store.tail is None else q.new_empty(q.shape[:3], dtype=torch.float32)
        if self.native and q.is_cpu and q.dtype == torch.float32 and q.shape == v.shape:
            out = decode(q, store.held, store.lines, (k, v), None if store.lines is None else store.norms, lost)
        else:
            out = _plain(store, q, k, v, lost)
        if lost is not None:
            share = min(self.proved, 2.0 ** min(0.0, float(lost.max())))
            self.lost_share = max(self.lost_share or 0.0, share)
        return out

    def _grow(self, layer: int, store: _Layer, q: Tensor, k: Tensor, lost_share: float) -> None:
        """Update the norms with new queries and keys, and widen the windows that have become too short."""
        assert store.tail is not None
        exact_q, exact_k = q.double(), k.double()
        opposed = -(exact_q * exact_k).sum(-1)
        now = torch.stack([x.amax((0, 2)) for x in (exact_q.norm(dim=-1), exact_k.norm(dim=-1), opposed)])
        if store.extremes is not None:
            now = torch.maximum(now, store.extremes)
            if torch.equal(now, store.extremes):
                return
        store.extremes = now
        excess = (now[0] * now[1] + now[2]) * q.shape[-1] ** -0.5
        own = self.windows[layer]
        try:
            wanted = store.tail.windows(excess, lost_share)
        except ValueError as error:
            raise ValueError(f"cache = certified: {error}. Use cache=full or window.") from None
        if bool((wanted > own).any()):
            # Slightly more than is needed now, so that slowly rising norms do not copy keys at every step.
            self.windows[layer] = torch.where(wanted > own, wanted + wanted // 16, own)
            store.resize(self.windows[layer], k)


def _plain(
    store: _Layer,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lost: Tensor | None,
) -> Tensor:
    """What the kernel computes, in plain tensor operations: scores and softmax in float32 or better."""
    line = store.line
    tokens, exact = q.shape[2], torch.promote_types(q.dtype, torch.float32)
    out, scale = torch.empty_like(v), q.shape[-1] ** -0.5
    for buffer in store.buffers:
        heads, window, count = buffer.heads, buffer.window, buffer.count
        buffer.k[:, :, count - tokens : count] = k[:, heads]
        buffer.v[:, :, count - tokens : count] = v[:, heads]
        begin = max(0, count - tokens - window + 1)
        index = torch.arange(count - tokens, count, device=q.device)
        distance = index[:, None] - torch.arange(begin, count, device=q.device)
        queries, keys = q[:, heads].to(exact), buffer.k[:, :, begin:count].to(exact)
        scores = queries @ keys.mT * scale
        if line is not None:
            scores = scores + line[heads][:, distance.clamp_min(0)]
        scores = scores.masked_fill((distance < 0) | (distance >= window), -math.inf)
        out[:, heads] = scores.softmax(-1).to(v.dtype) @ buffer.v[:, :, begin:count]
        if lost is None:
            continue
        assert store.tail is not None and line is not None
        # The running certificate: the share of keys that are not held or outside the window.
        largest = torch.maximum(store.norms[:, heads], k[:, heads].float().norm(dim=-1).amax(-1))
        store.norms[:, heads] = largest
        nearest = (index + 1).clamp_max(window).cpu().expand(len(line), -1)
        tail = store.tail.at(nearest)[heads].to(q.device)
        own = line[heads, :1].double()
        share = queries.norm(dim=-1) * scale * largest[:, :, None] + tail - (scores.logsumexp(-1) - own)
        whole = (index < window) if count == store.seen else torch.zeros_like(index, dtype=torch.bool)
        lost[:, heads] = (share / math.log(2) + 1e-3).masked_fill(whole, -math.inf).float()
    return out
