"""A text of any length through a run's model in constant memory: perplexity and memory, block by block."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alibi_lm import runtime
from alibi_lm.config import load_config
from alibi_lm.data.corpus import prepare
from alibi_lm.evaluate.stream import Policy, stream_nats
from alibi_lm.files import write_text
from alibi_lm.model.streaming import POLICIES
from alibi_lm.runs import load_run, run_tokenizer
from alibi_lm.settings import require


@dataclass
class LongStreamConfig:
    """Which text, and through which cache."""

    run: str
    """The run folder."""
    tokens: int = 1_000_000
    """Tokens to stream; the split is repeated where it is shorter."""
    every: int = 100_000
    """A line is printed for so many tokens."""
    split: str = "train"
    """train, validation or test, of the run's own text."""
    cache: str = "proved"
    """full, proved, certified or window, see alibi_lm/model/streaming.py."""
    lost_share: float | None = None
    """proved, certified: share of a query's attention that a head may lose; null: 2^-25."""
    window: int | None = None
    """window: last tokens that are kept."""
    sinks: int | None = None
    """window: first tokens that are kept besides."""
    threads: int | None = None
    """CPU threads; null: torch's choice."""
    output_dir: str | None = None
    """Folder of stream.jsonl (a row per block) and stream.md, replaced if they are there; null: only print."""

    def __post_init__(self) -> None:
        require(self.cache in POLICIES, f"cache = {self.cache!r}. Allowed: {', '.join(POLICIES)}.")
        require(
            self.split in ("train", "validation", "test"),
            f"split = {self.split!r}. Allowed: train, validation, test.",
        )
        for name in ("tokens", "every"):
            require(getattr(self, name) >= 1, f"{name} = {getattr(self, name)}. Use a whole number >= 1.")


@dataclass(frozen=True)
class Block:
    """What a block of tokens took."""

    end: int
    """Tokens streamed until its end."""
    perplexity: float
    tokens_per_second: float
    resident_bytes: int
    """Of the process, at its end (Linux; else 0)."""
    descriptors: int
    """Open files of the process, at its end (Linux; else 0)."""
    keys_held: float
    lost_share: float | None


def long_stream(config: LongStreamConfig) -> Iterator[Block]:
    """Stream, and yield each block as soon as it is done.

    Raises:
        ValueError: a run that cannot be loaded, or a cache that does not fit it.
    """
    device = runtime.start("cpu", threads=config.threads)
    folder = Path(config.run)
    model = load_run(folder, device=device)
    model.serve(config.tokens)
    tokenizer = run_tokenizer(folder)
    corpus = prepare(load_config(folder).data, tokenizer, splits=(config.split,))
    stream = corpus.split(config.split).tokens
    require(len(stream) > 0, f"split = {config.split} holds no tokens. Use another one.")
    cache = Policy(config.cache, config.lost_share, config.window, config.sinks).open(model)
    before = corpus.start_id
    for start in range(0, config.tokens, config.every):
        end = min(start + config.every, config.tokens)
        tokens = stream[np.arange(start, end) % len(stream)]
        begun, total = time.perf_counter(), 0.0
        for nats in stream_nats(model, tokens, before, cache):
            total += float(nats.sum())
        before = int(tokens[-1])
        seconds = time.perf_counter() - begun
        yield Block(
            end,
            math.exp(total / (end - start)),
            (end - start) / seconds,
            resident_bytes(),
            descriptors(),
            cache.keys_held,
            cache.lost_share,
        )


def resident_bytes() -> int:
    """Memory of this process now; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


def descriptors() -> int:
    """Open files of this process; 0 where the system does not tell."""
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return 0


def table(config: LongStreamConfig, blocks: list[Block]) -> str:
    """Markdown: a row per block."""
    lines = [
        f"{Path(config.run).name}, cache={config.cache}, {config.split} split of its text",
        "",
        "| tokens until | perplexity of the block | tokens/s | resident MiB | open files | keys held per head "
        "| lost share at most |",
        "| --: | --: | --: | --: | --: | --: | --: |",
    ]
    for b in blocks:
        lost = "not known" if b.lost_share is None else f"{b.lost_share:.2g}"
        lines.append(
            f"| {b.end:,} | {b.perplexity:.3f} | {b.tokens_per_second:,.0f} | {b.resident_bytes / 2**20:,.0f} "
            f"| {b.descriptors} | {b.keys_held:,.0f} | {lost} |"
        )
    return "\n".join(lines) + "\n"


def print_long_stream(config: LongStreamConfig) -> None:
    """Print a line per block, and write the same to the output folder as soon as it is done."""
    commit, dirty = runtime.code_version()
    common: dict[str, Any] = {"run": Path(config.run).name, "cache": config.cache, "split": config.split}
    common |= {"commit": commit, "dirty": dirty}
    blocks = []
    if config.output_dir is not None:
        Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    for block in long_stream(config):
        blocks.append(block)
        if config.output_dir is not None:
            rows = [json.dumps(common | asdict(each)) + "\n" for each in blocks]
            write_text(Path(config.output_dir) / "stream.jsonl", "".join(rows))
            write_text(Path(config.output_dir) / "stream.md", table(config, blocks))
        lost = "not known" if block.lost_share is None else f"at most {block.lost_share:.2g}"
        print(
            f"to {block.end:>9,}: perplexity {block.perplexity:.3f}, {block.tokens_per_second:,.0f} tokens/s, "
            f"{block.resident_bytes / 2**20:,.0f} MiB, {block.descriptors} open files, "
            f"{block.keys_held:,.0f} keys held per head, lost share {lost}",
            flush=True,
        )
