"""A whole split as one window: every target has all tokens before it as context, through a key/value cache.

It is the last point of an extrapolation curve. With a cache of windows (`model/streaming.py`) it takes constant
memory, and the row says which policy was used, what it kept and what it may have lost.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from alibi_lm import runtime
from alibi_lm.evaluate.passes import Passes
from alibi_lm.model.cache import KeyValueCache
from alibi_lm.model.streaming import open_cache
from alibi_lm.model.transformer import TransformerLM
from alibi_lm.results.documents import DocumentSums
from alibi_lm.results.rows import ResultRow, perplexity_of
from alibi_lm.results.statistics import per_document_sums

CHUNK = 2048
"""Tokens of a pass."""


@dataclass(frozen=True)
class Policy:
    """Which cache to stream through; the fields of `streaming.open_cache`."""

    cache: str = "full"
    lost_share: float | None = None
    window: int | None = None
    sinks: int | None = None

    def open(self, model: TransformerLM) -> KeyValueCache:
        """An empty cache; ValueError where it does not fit the model."""
        sinks = self.sinks or 0
        return open_cache(model, self.cache, lost_share=self.lost_share, window=self.window, sinks=sinks)

    @property
    def changes(self) -> dict[str, Any]:
        """What tells rows of one policy from those of another; nothing for a full cache."""
        found: dict[str, Any] = {} if self.cache == "full" else {"cache": self.cache}
        for name in ("lost_share", "window", "sinks"):
            if getattr(self, name) is not None:
                found[name] = getattr(self, name)
        return found


@torch.inference_mode()
def stream_nats(
    model: TransformerLM, tokens: np.ndarray, start_id: int, cache: KeyValueCache, chunk: int = CHUNK
) -> Iterator[np.ndarray]:
    """Nats of every target of a stream, in order, chunk by chunk: (<= chunk,) float64 each.

    Args:
        model: in evaluation mode.
        tokens: (N,) the targets; a memory map stays on the disk but for the chunk at hand.
        start_id: input in front of the first target.
        cache: empty.
        chunk: tokens of a pass.
    """
    before = start_id
    for start in range(0, len(tokens), chunk):
        targets = torch.from_numpy(tokens[start : start + chunk].astype(np.int64))
        inputs = torch.cat([torch.tensor([before]), targets[:-1]])
        before = int(targets[-1])
        with runtime.autocast(model.device, model.precision):
            hidden = model.hidden(inputs[None].to(model.device), cache=cache)
            nats: Tensor = model.nats_of(hidden, targets[None].to(model.device))
        yield nats[0].to("cpu", torch.float64).numpy()


def measure_stream(passes: Passes, policy: Policy, **common: Any) -> tuple[ResultRow, DocumentSums | None]:
    """The row of a whole split as one window, and its sums per document where it has a value.

    Args:
        passes: of a model of ours over a text.
        policy: the cache.
        common: further fields of the row; `position` at least.

    Raises:
        ValueError: a cache that does not fit the model, and why.
    """
    text, model = passes.text, passes.model
    length = len(text.tokens)
    fields: dict[str, Any] = {"run": model.label, "train_length": model.train_length} | common
    fields |= {name: getattr(text, name) for name in ("split", "corpus", "words", "bytes")}
    fields |= {"mode": "stream", "inference_length": length, "tokens": length}
    fields["commit"] = runtime.code_version()[0]
    fields["changes"] = fields.get("changes", {}) | policy.changes
    extra = fields.get("extra", {}) | {"cache": policy.cache}
    fields["extra"] = extra
    if not isinstance(model, TransformerLM):
        return ResultRow(**fields, reason="it has no key/value cache that is known here"), None
    if reason := passes.refuses(length):
        return ResultRow(**fields, reason=reason), None
    model.serve(length)
    cache = policy.open(model)
    begun = time.perf_counter()
    runtime.reset_peak_memory(model.device)
    parts = []
    quiet = not sys.stderr.isatty()
    with tqdm(total=length, unit="tok", unit_scale=True, desc=f"{model.label}: stream", disable=quiet) as bar:
        for part in stream_nats(model, text.tokens, text.start_id, cache):
            parts.append(part)
            bar.update(len(part))
    nats = np.concatenate(parts)
    total = float(nats.sum())
    fields |= {"peak_memory_bytes": runtime.peak_memory_bytes(model.device)}
    fields |= {"tokens_per_second": length / (time.perf_counter() - begun), "nats": total}
    extra |= {"keys_held": cache.keys_held, "lost_share": cache.lost_share}
    fields["extra"] = extra
    perplexity, why = perplexity_of(total, length)
    by_word = perplexity_of(total, text.words)[0] if text.words else None
    row = ResultRow(**fields, perplexity=perplexity, word_perplexity=by_word, reason=why)
    return row, DocumentSums(row.key, *per_document_sums(nats, text.groups(length)))
