"""Milliseconds per generated token and memory against context length, beside Hugging Face's models.

All models have the same sizes. Each measurement has its own process, which fills a cache to the context and
then decodes greedily. Caches that keep everything are filled with random keys and values, which needs no pass over
a long prompt; caches of windows are filled by the model, because it decides what they keep. For other libraries
only the forward step that `generate` calls for each token is measured, not the other work of `generate`.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alibi_lm import runtime
from alibi_lm.files import write_text
from alibi_lm.load import load_run
from alibi_lm.model.cache import KeyValueCache
from alibi_lm.model.streaming import open_cache
from alibi_lm.model.transformer import ModelConfig, TransformerLM
from alibi_lm.positions import POSITIONS
from alibi_lm.settings import require, require_at_least
from benchmarks.peers import HUGGING_FACE, hugging_face_model
from benchmarks.report import grid_markdown, write

OURS = {
    "ALiBi, full": ("alibi", "full"),
    "ALiBi, proved": ("alibi", "proved"),
    "ALiBi, certified": ("alibi", "certified"),
    "ALiBi, window 2048": ("alibi", "window"),
    "rotary, full": ("rotary", "full"),
    "T5, full": ("t5", "full"),
}
"""Scheme and cache policy by name."""
THEIRS = tuple(HUGGING_FACE)
WARM_UP = 5
WINDOW = 2048


@dataclass
class DecodingConfig:
    """What is measured."""

    contexts: list[int] = field(default_factory=lambda: [1024, 4096, 16384, 65536, 262144])
    """Context lengths: tokens before the measured ones."""
    steps: int = 50
    """Number of measured tokens at each context."""
    subjects: list[str] = field(default_factory=lambda: [*OURS, *THEIRS])
    """Models and cache policies to measure."""
    run: str | None = None
    """A run whose model replaces our ALiBi model and gives the sizes; null: random weights."""
    layers: int = 2
    """Number of layers; this and the next three settings are used without a run (default: sizes of `quick`)."""
    model_dim: int = 128
    heads: int = 8
    vocab_size: int = 1024
    threads: int | None = None
    """CPU threads; null: torch's choice."""
    output_dir: str = "outputs/decoding"

    def __post_init__(self) -> None:
        known = [*OURS, *THEIRS]
        require(
            all(s in known for s in self.subjects), f"subjects = {self.subjects}. Allowed: {', '.join(known)}."
        )
        require_at_least("steps", self.steps, 2)
        require(all(c >= 1 for c in self.contexts), f"contexts = {self.contexts}. Use whole numbers >= 1.")


def measure_decoding(config: DecodingConfig) -> list[dict[str, Any]]:
    """Measure, and write decoding.jsonl, decoding.md and decoding.png; returns the rows.

    Existing files are replaced, not extended: only rows of one call can be compared.
    """
    folder, rows = Path(config.output_dir), []
    machine = runtime.environment(torch.device("cpu"))
    for context in config.contexts:
        for subject in config.subjects:
            # A separate process has its own memory.
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                try:
                    row = pool.submit(_measure, config, subject, context).result()
                except ImportError as error:
                    row = {"subject": subject, "context": context, "reason": f"{error.name} is not installed"}
                except Exception as error:
                    if subject in OURS and not isinstance(error, (MemoryError, RuntimeError)):
                        raise  # anything but lack of memory is a bug of ours
                    row = {"subject": subject, "context": context, "reason": f"{type(error).__name__}: {error}"}
            rows.append(row | {"machine": machine})
            print(_line(row), flush=True)
            write(folder / "decoding.jsonl", rows)
        write_text(folder / "decoding.md", table(rows))
        draw(rows, folder / "decoding.png")
    return rows


def _measure(config: DecodingConfig, subject: str, context: int) -> dict[str, Any]:
    device = runtime.start("cpu", threads=config.threads)
    library = None
    if subject in THEIRS:
        torch.set_flush_denormal(False)  # as their users have it
        library = f"transformers {version('transformers')}"
    torch.manual_seed(0)
    step, held = (_theirs if subject in THEIRS else _ours)(config, subject, context)
    token = torch.zeros((1, 1), dtype=torch.int64)
    with torch.inference_mode():
        for _ in range(WARM_UP):
            token = step(token)
        seconds = []
        for _ in range(config.steps):
            begun = time.perf_counter()
            token = step(token)
            seconds.append(time.perf_counter() - begun)
    ordered = sorted(seconds)
    return {
        "subject": subject,
        "context": context,
        "median_ms": 1e3 * statistics.median(seconds),
        "p95_ms": 1e3 * ordered[math.ceil(0.95 * len(ordered)) - 1],
        "cache_bytes": held(),
        "peak_memory_bytes": runtime.peak_memory_bytes(device),
        "threads": torch.get_num_threads(),
        "library": library,
        "run": None if config.run is None else Path(config.run).name,
    }


Measured = tuple[Callable[[Tensor], Tensor], Callable[[], int]]
"""A step from token (1, 1) to the next one, and a function that gives the bytes of the cache."""


def _sizes(config: DecodingConfig) -> tuple[ModelConfig, int]:
    if config.run is not None:
        model = load_run(config.run)
        return model.config, model.vocab_size
    dim = config.model_dim
    sizes = ModelConfig(num_layers=config.layers, model_dim=dim, num_heads=config.heads, ffn_dim=4 * dim)
    return sizes, config.vocab_size


def _ours(config: DecodingConfig, subject: str, context: int) -> Measured:
    position, policy = OURS[subject]
    if config.run is not None and position == "alibi":
        model = load_run(config.run)
    else:
        sizes, vocab_size = _sizes(config)
        model = TransformerLM(sizes, POSITIONS[position](), "auto", vocab_size, context, context + 4096).eval()
    cache = open_cache(model, policy, window=WINDOW if policy == "window" else None)
    if policy == "full":
        _fill(model, cache, context)
    else:
        ids = torch.randint(model.vocab_size, (1, context))
        with torch.inference_mode():
            for piece in ids.split(2048, dim=1):
                model.hidden(piece, cache=cache)

    def held() -> int:
        if policy == "full":
            return sum(x.numel() * x.element_size() for layer in cache.layers for x in layer if x is not None)
        size = 2 * 4 * model.config.head_dim * model.config.num_heads * model.config.num_layers
        return int(cache.keys_held * size)

    return lambda token: model(token, last=True, cache=cache)[:, 0].argmax(-1, keepdim=True), held


def _fill(model: TransformerLM, cache: KeyValueCache, context: int) -> None:
    """Let a cache hold random keys and values of `context` tokens."""
    cache.capacity = context + 4096
    sizes = model.config
    shape = (1, sizes.num_heads, context, sizes.head_dim)
    positions = torch.arange(context)
    cache.key_positions(positions)
    cache.begin(0, context - 1, context, None)
    for _ in range(sizes.num_layers):
        cache._buffers.append([cache._append(None, torch.randn(shape), 2) for _ in "kv"] + [None])
    cache.advance()


def _theirs(config: DecodingConfig, subject: str, context: int) -> Measured:
    from transformers import DynamicCache

    sizes, vocab_size = _sizes(config)
    dim, layers, heads = sizes.model_dim, sizes.num_layers, sizes.num_heads
    model = hugging_face_model(subject, sizes, vocab_size, context + 4096).eval()
    cache = DynamicCache()
    for layer in range(layers):
        k, v = (torch.randn(1, heads, context, dim // heads) for _ in "kv")
        cache.update(k, v, layer)
    seen = [context]

    def step(token: Tensor) -> Tensor:
        seen[0] += 1
        mask = torch.ones((1, seen[0]), dtype=torch.int64)
        out = model(input_ids=token, attention_mask=mask, past_key_values=cache, use_cache=True)
        return out.logits[:, -1].argmax(-1, keepdim=True)

    return step, lambda: 2 * 4 * dim * layers * seen[0]


def _line(row: dict[str, Any]) -> str:
    name = f"{row['subject']} after {row['context']:,}"
    if "reason" in row:
        return f"{name}: not measured, {row['reason']}"
    return (
        f"{name}: {row['median_ms']:.2f} ms per token (95%: {row['p95_ms']:.2f}), "
        f"cache {row['cache_bytes'] / 2**20:.1f} MiB, peak memory {row['peak_memory_bytes'] / 2**20:.0f} MiB"
    )


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row per subject, a column per context; median (95th percentile) and the size of the cache."""
    contexts = sorted({row["context"] for row in rows})
    cells: dict[str, dict[int, str]] = {}
    for row in rows:
        cell = "-"
        if "reason" not in row:
            cell = f"{row['median_ms']:.2f} ({row['p95_ms']:.2f}); {row['cache_bytes'] / 2**20:.1f} MiB"
        cells.setdefault(row["subject"], {})[row["context"]] = cell
    return grid_markdown("milliseconds per token; cache", [f"{c:,}" for c in contexts], cells, contexts)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """The figure: latency and size of the cache against context length."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure = Figure(figsize=(9.6, 3.9), layout="constrained")
    axes = figure.subplots(1, 2)
    for number, subject in enumerate(dict.fromkeys(row["subject"] for row in rows)):
        own = [row for row in rows if row["subject"] == subject and "reason" not in row]
        x = [row["context"] for row in own]
        style: dict[str, Any] = {"color": f"C{number}", "linestyle": "--" if subject in THEIRS else "-"}
        median = [row["median_ms"] for row in own]
        axes[0].plot(x, median, marker="o", markersize=4, label=subject, **style)
        axes[0].vlines(x, median, [row["p95_ms"] for row in own], color=style["color"], linewidth=0.8)
        axes[1].plot(x, [row["cache_bytes"] / 2**20 for row in own], marker="o", markersize=4, **style)
    for axis, words in zip(
        axes,
        ("milliseconds per token, to the 95th percentile", "cache, MiB (equal for all that keep everything)"),
        strict=True,
    ):
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=10 if axis is axes[0] else 2)
        axis.set_title(words, fontsize=9, loc="left")
        axis.set_xlabel("tokens before", fontsize=9)
        axis.grid(True, color="#E5E5E5", linewidth=0.6)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())
    figure.legend(loc="outside right center", fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)
