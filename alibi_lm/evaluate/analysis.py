"""One command for all views: opens an experiment's runs, computes a view and writes it as `<view>.json`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alibi_lm import runtime
from alibi_lm.config import EvaluateConfig, EvaluateData
from alibi_lm.data.corpus import Corpus
from alibi_lm.evaluate import views
from alibi_lm.evaluate.passes import Passes
from alibi_lm.evaluate.store import Scoring, TokenStore, identity
from alibi_lm.evaluate.sweep import Task, open_corpus, plan
from alibi_lm.files import write_text
from alibi_lm.runs import load_run, short_hash
from alibi_lm.settings import require

SETTINGS: dict[str, tuple[str, ...]] = {
    "perplexity": ("lengths", "stride"),
    "position": ("lengths",),
    "last": ("lengths", "last"),
    "documents": ("lengths",),
    "fixed": ("contexts", "every"),
    "decomposition": ("lengths", "stride"),
    "offset": ("offsets", "width", "every"),
}
"""The views and the settings that each understands."""

_INCIDENTAL = {
    "seed", "output_dir", "overwrite", "tracking", "device", "threads", "compile", "study", "measurements",
    "evaluation", "log_every", "validate_every", "checkpoint_every", "keep_last", "keep_every", "experiment",
}  # fmt: skip


@dataclass
class AnalyseConfig:
    """One view of one or more runs."""

    view: str = "position"
    """perplexity, position, last, documents, fixed, decomposition, offset, or all of them."""
    experiment: str = "quick"
    """Names the default run folders, outputs/<experiment>/runs/*, and the default output_dir."""
    runs: str | None = None
    """A run folder or a glob of them."""
    lengths: list[int] = field(default_factory=list)
    """Inference lengths; empty: the experiment's own."""
    stride: int | None = None
    """perplexity: of sliding windows, null for none. decomposition: of the reset, null for train_length / 8."""
    contexts: list[int] = field(default_factory=list)
    """fixed: tokens of context; empty: the experiment's lengths."""
    every: int | None = None
    """fixed: every how many targets one is scored; offset: the same for windows. Null: about 1,000 and 256."""
    last: int = 16
    """last: how many targets at the end of each window."""
    offsets: list[int] = field(default_factory=list)
    """offset: positions of a window's first token; empty: 0 to the experiment's longest length."""
    width: int | None = None
    """offset: tokens of a window; null: half of train_length."""
    split: str | None = None
    """validation or test; null: the experiment's own."""
    checkpoint: str = "best"
    """best (lowest validation loss) or last."""
    attention: str = "auto"
    """Attention backend."""
    position: dict[str, Any] = field(default_factory=dict)
    """Test-time changes of the scheme's settings, such as +position.scaling=yarn."""
    data: EvaluateData = field(default_factory=EvaluateData)
    tokens_per_forward: int | None = None
    """Tokens of a forward pass; null: the experiment's own."""
    device: str = "auto"
    """auto, cpu or cuda."""
    precision: str = "float32"
    """auto, float32 or bfloat16."""
    threads: int | None = None
    """CPU threads; null: torch's choice."""
    tokens_dir: str | None = None
    """Where per-token results are kept; null: outputs/<experiment>/extrapolation/tokens, as evaluations do."""
    output_dir: str | None = None
    """Where the views go; null: outputs/<experiment>/analysis."""

    def __post_init__(self) -> None:
        allowed = (*SETTINGS, "all")
        require(self.view in allowed, f"view = {self.view!r}. Allowed: {', '.join(allowed)}.")
        for name in ("stride", "every", "last", "width"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} = {value}. Use a whole number >= 1.")
        for name, least in (("lengths", 1), ("contexts", 1), ("offsets", 0)):
            values = getattr(self, name)
            require(all(v >= least for v in values), f"{name} = {values}. Use whole numbers >= {least}.")
        if self.view == "all":
            return
        defaults = {f.name: f for f in dataclasses.fields(self)}
        for name in sorted({name for names in SETTINGS.values() for name in names} - set(SETTINGS[self.view])):
            own = [] if defaults[name].default is dataclasses.MISSING else defaults[name].default
            users = ", ".join(view for view, names in SETTINGS.items() if name in names)
            require(
                getattr(self, name) == own,
                f"{name} = {getattr(self, name)} has no effect with view={self.view}. It belongs to view={users}.",
            )

    @property
    def evaluation(self) -> EvaluateConfig:
        """The same runs, text and machine as settings of an evaluation."""
        shared = {f.name for f in dataclasses.fields(EvaluateConfig)} & {f.name for f in dataclasses.fields(self)}
        values = {name: getattr(self, name) for name in shared - {"stride", "lengths", "output_dir"}}
        return EvaluateConfig(**values, lengths=list(self.lengths), mode="nonoverlapping")

    @property
    def output(self) -> Path:
        """Folder of the views."""
        return Path(self.output_dir or f"outputs/{self.experiment}/analysis")


def analyse(config: AnalyseConfig) -> Iterator[Path]:
    """Compute the views that are asked for.

    Yields:
        The file of each, as soon as it is written.

    Raises:
        ValueError: no runs, missing text, or a setting out of range.
    """
    device = runtime.start(config.device, threads=config.threads)
    tasks = plan(config.evaluation)
    groups = [_open(config, members, device) for members in _by_seed(tasks)]
    for view in SETTINGS if config.view == "all" else (config.view,):
        yield _write(config, view, tasks[0], groups)


def _write(config: AnalyseConfig, view: str, task: Task, groups: list[tuple[views.Group, Corpus, str]]) -> Path:
    series = []
    for group, corpus, variant in groups:
        print(f"{view}: {', '.join(group.labels)}", flush=True)
        series.append(
            {
                "position": group.position,
                "train_length": group.train_length,
                "variant": variant,
                "corpus": corpus.split(task.settings.split).hash,
                "tokens": group.num_tokens,
                "documents": len(group.documents),
                "runs": group.labels,
                "interval": "seeds and documents" if len(group.labels) > 1 else "documents, given this seed",
                "points": _points(config, view, task, group),
            }
        )
    corpora = {corpus.split(task.settings.split).hash: corpus.name for _, corpus, _ in groups}
    content = {
        "view": view,
        "experiment": config.experiment,
        "split": task.settings.split,
        "corpora": corpora,
        "commit": runtime.code_version()[0],
        "series": series,
    }
    config.output.mkdir(parents=True, exist_ok=True)
    path = config.output / f"{view}.json"
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
    return path


def _points(config: AnalyseConfig, view: str, task: Task, group: views.Group) -> list[views.Point]:
    lengths, trained = task.settings.lengths, group.train_length
    if view == "perplexity":
        return views.perplexity(group, lengths, config.stride)
    if view == "position":
        return views.position(group, sorted(lengths))
    if view == "last":
        return views.last(group, lengths, config.last)
    if view == "documents":
        return views.documents(group, config.lengths or sorted({trained, max(lengths)}))
    if view == "fixed":
        contexts = sorted(config.contexts or lengths)
        return views.fixed(group, contexts, config.every or max(1, group.num_tokens // 1000))
    if view == "decomposition":
        # The same setting means sliding windows elsewhere, so with view=all it may be too long for a short L.
        stride = config.stride or max(1, trained // 8)
        require(stride <= trained, f"stride = {stride}. Allowed: 1 to train_length = {trained}.")
        return views.decomposition(group, sorted(lengths), stride)
    width = config.width or max(1, trained // 2)
    powers = [0, *(trained * 2**k // 8 for k in range(3)), *(n for n in sorted(lengths) if n >= trained)]
    every = config.every or max(1, group.num_tokens // width // 256)
    return views.offset(group, sorted(set(config.offsets or powers)), width, every)


def _by_seed(tasks: list[Task]) -> list[list[Task]]:
    """Runs that differ in nothing but the seed, together; longest training length first, then by scheme."""
    found: dict[str, list[Task]] = {}
    for task in tasks:
        settings = dataclasses.asdict(task.config)
        key = short_hash({k: v for k, v in settings.items() if k not in _INCIDENTAL})
        members = found.setdefault(key, [])
        if any(task.config.seed == other.config.seed for other in members):
            members = found[f"{key} {task.folder}"] = []
        members.append(task)
    return sorted(found.values(), key=lambda m: (-m[0].config.train_length, m[0].config.position.name))


def _open(config: AnalyseConfig, tasks: list[Task], device: torch.device) -> tuple[views.Group, Corpus, str]:
    """The group of these runs, its text, and what tells it from others of its scheme and training length."""
    corpora = [open_corpus(config.evaluation, task) for task in tasks]
    first = tasks[0]
    streams = [corpus.split(first.settings.split) for corpus in corpora]
    require(
        len({stream.sha256 for stream in streams}) == 1,
        f"runs {', '.join(t.folder.name for t in tasks)} differ in their seed only, but their texts are encoded "
        "differently. Analyse them one at a time: runs=<run folder>.",
    )
    labels = [t.folder.name + "".join(f"+{k}={v}" for k, v in sorted(config.position.items())) for t in tasks]
    passes = [
        _passes(config, task, label, corpus, device)
        for task, label, corpus in zip(tasks, labels, corpora, strict=True)
    ]
    documents = np.asarray(streams[0].documents)
    group = views.Group(first.config.position.name, first.config.train_length, labels, passes, documents)
    plain = f"{group.position}_L{group.train_length}_s{first.config.seed}"
    return group, corpora[0], labels[0].removeprefix(plain).lstrip("_")


def _passes(config: AnalyseConfig, task: Task, label: str, corpus: Corpus, device: torch.device) -> Passes:
    split = task.settings.split
    precision = config.precision if config.precision != "auto" else f"auto on {device.type}"
    known = identity(
        task.config, task.folder, config.checkpoint, config.position, corpus, split, config.attention, precision
    )
    folder = config.tokens_dir or f"outputs/{config.experiment}/extrapolation/tokens"
    store = TokenStore(folder)

    def keep(scoring: Scoring, compute: Callable[[], np.ndarray]) -> np.ndarray:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        return store.get(label, scoring, known, compute, lambda: runtime.peak_memory_bytes(device)).nats

    return Passes(
        lambda length: load_run(
            task.folder, length, config.checkpoint, config.attention, device, config.position or None
        ),
        corpus.split(split).tokens,
        corpus.start_id,
        split,
        task.settings.tokens_per_forward,
        lambda: runtime.autocast(device, config.precision),
        keep,
    )


__all__ = ["SETTINGS", "AnalyseConfig", "analyse"]
