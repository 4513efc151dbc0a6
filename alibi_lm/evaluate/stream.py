"""A stream of tokens through a key/value cache, chunk by chunk; and a text of any length in constant memory.

`evaluate.py mode=stream` takes a whole split as one window (`measure_stream` in rows.py); `stream.py` repeats a
split until it has enough tokens, and prints perplexity and memory block by block.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alibi_lm import runtime
from alibi_lm.config import load_config
from alibi_lm.data.prepare import prepare
from alibi_lm.data.text import SPLITS
from alibi_lm.files import write_text
from alibi_lm.load import load_run, require_own_text, run_tokenizer
from alibi_lm.model.cache import KeyValueCache
from alibi_lm.model.streaming import POLICIES, open_cache
from alibi_lm.model.transformer import TransformerLM
from alibi_lm.settings import require, require_at_least, require_one_of

CHUNK = 2048
"""Tokens per forward pass."""


@dataclass(frozen=True)
class Policy:
    """Which cache to stream through; the fields of `streaming.open_cache`."""

    cache: str = "full"
    lost_share: float | None = None
    window: int | None = None
    sinks: int | None = None

    @classmethod
    def of(cls, config: Any) -> Policy:
        """The policy that a command's settings of these names describe; no sinks are the same as none given."""
        return cls(config.cache or "full", config.lost_share, config.window, config.sinks or None)

    def open(self, model: TransformerLM) -> KeyValueCache:
        """An empty cache; ValueError if the policy does not fit the model."""
        sinks = self.sinks or 0
        return open_cache(model, self.cache, lost_share=self.lost_share, window=self.window, sinks=sinks)

    @property
    def changes(self) -> dict[str, Any]:
        """The fields that distinguish rows of one policy from those of another; none for a full cache."""
        return {name: value for name, value in vars(self).items() if value not in (None, "full")}


@torch.inference_mode()
def stream_nats(
    model: TransformerLM, tokens: np.ndarray, start_id: int, cache: KeyValueCache, chunk: int = CHUNK
) -> Iterator[np.ndarray]:
    """Nats of every target of a stream, in order, chunk by chunk: (<= chunk,) float64 each.

    Args:
        model: in evaluation mode.
        tokens: (N,) the targets; of a memory map only the current chunk is loaded.
        start_id: input in front of the first target.
        cache: an empty cache.
        chunk: tokens per forward pass.
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


# --- a text of any length ------------------------------------------------------------------------


@dataclass
class LongStreamConfig:
    """Which text, and through which cache."""

    run: str
    """The run folder."""
    tokens: int = 1_000_000
    """Tokens to stream; a shorter split is repeated."""
    every: int = 100_000
    """Tokens per printed line."""
    split: str = "train"
    """train, validation or test, of the run's own text."""
    cache: str = "proved"
    """full, proved, certified or window, see alibi_lm/model/streaming.py."""
    lost_share: float | None = None
    """proved, certified: share of a query's attention that a head may lose; null: 2^-25."""
    window: int | None = None
    """window: how many of the last tokens are kept."""
    sinks: int | None = None
    """window: how many of the first tokens are kept too."""
    threads: int | None = None
    """CPU threads; null: torch's choice."""
    output_dir: str | None = None
    """Folder of stream.jsonl (a row per block) and stream.md, replaced if they exist; null: only print."""

    def __post_init__(self) -> None:
        require_one_of("cache", self.cache, POLICIES)
        require_one_of("split", self.split, SPLITS)
        for name in ("tokens", "every"):
            require_at_least(name, getattr(self, name), 1)


def long_stream(config: LongStreamConfig) -> Iterator[dict[str, Any]]:
    """Stream, and yield the measurements of each block of tokens as soon as it is done.

    `end` is the number of tokens up to its end; `resident_bytes` and `descriptors` (open files) are those of the
    process at that point, 0 if the system does not say.

    Raises:
        ValueError: a run that cannot be loaded, or a cache that does not fit it.
    """
    device = runtime.start("cpu", threads=config.threads)
    folder = Path(config.run)
    model = load_run(folder, device=device)
    model.serve(config.tokens)
    corpus = prepare(load_config(folder).data, run_tokenizer(folder), splits=(config.split,))
    require_own_text(folder, corpus, config.split)
    stream = corpus.split(config.split).tokens
    require(len(stream) > 0, f"split = {config.split} holds no tokens. Use another one.")
    cache = Policy.of(config).open(model)
    before = corpus.start_id
    for start in range(0, config.tokens, config.every):
        end = min(start + config.every, config.tokens)
        tokens = stream[np.arange(start, end) % len(stream)]
        begun = time.perf_counter()
        total = sum(float(nats.sum()) for nats in stream_nats(model, tokens, before, cache))
        before = int(tokens[-1])
        yield {
            "end": end,
            "perplexity": math.exp(total / (end - start)),
            "tokens_per_second": (end - start) / (time.perf_counter() - begun),
            "resident_bytes": resident_bytes(),
            "descriptors": descriptors(),
            "keys_held": cache.keys_held,
            "lost_share": cache.lost_share,
        }


def resident_bytes() -> int:
    """Resident memory of this process now, in bytes; 0 if the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


def descriptors() -> int:
    """Number of open files of this process; 0 if the system does not say."""
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return 0


def print_long_stream(config: LongStreamConfig) -> None:
    """Print a line per block, and write it to the output folder as soon as the block is done."""
    commit, dirty = runtime.code_version()
    common = {"run": Path(config.run).name, "cache": config.cache, "split": config.split}
    rows = ""
    table = f"{common['run']}, cache={config.cache}, {config.split} split of its text\n\n"
    table += (
        "| tokens until | perplexity of the block | tokens/s | resident MiB | open files | keys held per head "
    )
    table += "| lost share at most |\n" + "| --: " * 7 + "|\n"
    for block in long_stream(config):
        bound, megabytes = block["lost_share"], f"{block['resident_bytes'] / 2**20:,.0f}"
        lost = "not known" if bound is None else f"{bound:.2g}"
        perplexity, speed = f"{block['perplexity']:.3f}", f"{block['tokens_per_second']:,.0f}"
        end, files, keys = block["end"], block["descriptors"], f"{block['keys_held']:,.0f}"
        rows += json.dumps(common | {"commit": commit, "dirty": dirty} | block) + "\n"
        table += f"| {end:,} | {perplexity} | {speed} | {megabytes} | {files} | {keys} | {lost} |\n"
        if config.output_dir is not None:
            Path(config.output_dir).mkdir(parents=True, exist_ok=True)
            write_text(Path(config.output_dir) / "stream.jsonl", rows)
            write_text(Path(config.output_dir) / "stream.md", table)
        print(
            f"to {end:>9,}: perplexity {perplexity}, {speed} tokens/s, {megabytes} MiB, {files} open files, "
            f"{keys} keys held per head, lost share {lost if bound is None else f'at most {lost}'}",
            flush=True,
        )
