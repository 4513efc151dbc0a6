"""Runs times inference lengths: the rows of an extrapolation curve."""

from __future__ import annotations

import dataclasses
import glob
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alibi_lm import runtime
from alibi_lm.config import EvaluateConfig, EvaluationConfig, TrainConfig, load_config
from alibi_lm.data.corpus import Corpus, TokenStream, prepare
from alibi_lm.data.tokenizers import Tokenizer
from alibi_lm.distributed import World
from alibi_lm.evaluate.score import score_tokens
from alibi_lm.evaluate.store import Scoring, TokenStore, identity
from alibi_lm.files import read_json
from alibi_lm.results.documents import DocumentSums, upsert_documents
from alibi_lm.results.rows import ResultRow, read_rows, upsert_rows, write_csv
from alibi_lm.results.statistics import per_document_sums
from alibi_lm.runs import finished, load_run
from alibi_lm.settings import require
from alibi_lm.tracking import open_tracker

CURVE_COLUMNS = (
    "curve", "run", "position", "train_length", "seed", "inference_length", "mode", "stride", "split",
    "perplexity", "tokens_per_second", "peak_memory_bytes",
)  # fmt: skip
"""Columns of the table in Weights & Biases: the name of a row's curve, and fields of the row."""

WAY = ("checkpoint", "attention", "precision")
"""Settings of an evaluation that each row names; `fairness.py` compares them."""


@dataclass(frozen=True)
class Task:
    """One run and how it is to be evaluated."""

    folder: Path
    config: TrainConfig
    settings: EvaluationConfig


def plan(config: EvaluateConfig) -> list[Task]:
    """Find the runs and settle lengths, mode, stride and split; nothing is loaded yet.

    Raises:
        ValueError: no run, a run that is not finished, no lengths, or settings that do not fit together.
    """
    pattern = config.runs or f"outputs/{config.experiment}/runs/*"
    folders = [Path(p) for p in sorted(glob.glob(glob.escape(pattern) if Path(pattern).is_dir() else pattern))]
    folders = [f for f in folders if f.is_dir()]
    require(
        bool(folders),
        f"runs = {pattern} matches no folder. Train first (make train), or give runs=<run folder or glob>.",
    )
    if not Path(pattern).is_dir():
        # A sweep still under way has unfinished folders beside finished ones: those can be evaluated already.
        unfinished = [f.name for f in folders if finished(f) is None]
        folders = [f for f in folders if finished(f) is not None]
        require(bool(folders), f"runs = {pattern} holds no finished run yet ({', '.join(unfinished)}).")
        if unfinished:
            print(f"left out, not finished: {', '.join(unfinished)}", flush=True)
    return [Task(f, *_settings(config, load_config(f), f)) for f in folders]


def _settings(config: EvaluateConfig, run: TrainConfig, folder: Path) -> tuple[TrainConfig, EvaluationConfig]:
    own = run.evaluation
    mode = config.mode or ("sliding" if config.stride is not None else own.mode)
    stride = config.stride if config.stride is not None else (own.stride if mode == own.mode else None)
    settings = EvaluationConfig(
        lengths=config.lengths or own.lengths,
        mode=mode,
        stride=stride,
        split=config.split or own.split,
        tokens_per_forward=own.tokens_per_forward
        if config.tokens_per_forward is None
        else config.tokens_per_forward,
    )
    require(
        bool(settings.lengths),
        f"lengths = [] and {folder} names none of its own. Give them, quoted: 'lengths=[64,128,256]'.",
    )
    return run, settings


def open_corpus(config: EvaluateConfig, task: Task) -> Corpus:
    """The text to evaluate on, encoded with the run's own tokenizer.

    Raises:
        ValueError: the text is missing, or a prepared stream belongs to another tokenizer.
    """
    data = task.config.data
    if config.data.path is not None:
        data = dataclasses.replace(data, path=config.data.path)
    if config.data.cache_dir is not None:
        data = dataclasses.replace(data, cache_dir=config.data.cache_dir)
    path = task.folder / "tokenizer.json"
    tokenizer = Tokenizer.load(path)
    record = task.folder / "corpus.json"
    if record.is_file():
        trained_with = (read_json(record).get("tokenizer") or {}).get("sha256")
        require(
            tokenizer.hash == trained_with,
            f"{path} is not the tokenizer that the run was trained with ({str(trained_with)[:12]} by corpus.json, "
            f"{tokenizer.hash[:12]} now). Put the right one back, or train the run anew.",
        )
    return prepare(data, tokenizer, splits=(task.settings.split,))


def evaluate_length(
    task: Task, config: EvaluateConfig, corpus: Corpus, length: int, device: torch.device, world: World
) -> ResultRow:
    """Evaluate one run at one inference length; a scheme that cannot run there gives a row with the reason."""
    settings = task.settings
    stream = corpus.split(settings.split)
    label = task.folder.name + "".join(f"+{k}={v}" for k, v in sorted(config.position.items()))
    common: dict[str, Any] = dict(
        position=task.config.position.name,
        mode=settings.mode,
        split=settings.split,
        tokens=stream.num_tokens,
        inference_length=length,
        run=label,
        train_length=task.config.train_length,
        seed=task.config.seed,
        stride=settings.stride,
        corpus=stream.hash,
        words=stream.words,
        bytes=stream.bytes,
        commit=runtime.code_version()[0],
        extra=_origin(task.folder, corpus) | {name: getattr(config, name) for name in WAY},
    )
    model = load_run(
        task.folder, length, config.checkpoint, config.attention, device, position=config.position or None
    )
    require(
        model.vocab_size == corpus.vocab_size,
        f"{task.folder / 'tokenizer.json'} has {corpus.vocab_size} tokens, the run's model {model.vocab_size}. "
        "Put the run's own tokenizer back.",
    )
    if model.max_position is not None and length > model.max_position:
        reason = f"position={task.config.position.name} has {model.max_position} positions"
        return ResultRow(**common, reason=reason)
    runtime.reset_peak_memory(device)
    scored = TokenStore(output_folder(config) / "tokens").get(
        label,
        Scoring(settings.split, settings.mode, length, settings.stride),
        _identity(task, config, corpus, device),
        lambda: score_tokens(
            model,
            stream.tokens,
            corpus.start_id,
            length,
            settings.stride,
            settings.tokens_per_forward,
            runtime.autocast(device, config.precision),
            world=world,
            progress=f"{label} @ {length}",
        ),
        lambda: runtime.peak_memory_bytes(device),
        world,
    )
    total = float(scored.nats.sum(dtype=np.float64))
    if not math.isfinite(total):
        return ResultRow(**common, reason=f"the sum of nats is {total}")
    row = ResultRow(
        **common | {"commit": scored.commit},
        nats=total,
        perplexity=math.exp(total / stream.num_tokens),
        word_perplexity=math.exp(total / stream.words),
        tokens_per_second=stream.num_tokens / scored.seconds,
        peak_memory_bytes=scored.peak_memory_bytes,
    )
    if world.is_main:
        sums = DocumentSums(row.key, *per_document_sums(scored.nats, stream.documents))
        upsert_documents(output_folder(config) / "documents.jsonl", [sums])
    return row


def _identity(task: Task, config: EvaluateConfig, corpus: Corpus, device: torch.device) -> dict[str, Any]:
    """What the run's stored nats depend on, beside the way of scoring."""
    return identity(
        task.config,
        task.folder,
        config.checkpoint,
        config.position,
        corpus,
        task.settings.split,
        config.attention,
        config.precision if config.precision != "auto" else f"auto on {device.type}",
    )


def unigram_row(train: TokenStream, stream: TokenStream, vocab_size: int, **common: Any) -> ResultRow:
    """The baseline that knows only how often each token occurs in the training text (add-one smoothed)."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, train.num_tokens, 1 << 24):
        counts += np.bincount(train.tokens[start : start + (1 << 24)], minlength=vocab_size)
    log_probs = np.log((counts + 1) / (counts.sum() + vocab_size))
    occurrences = np.bincount(stream.tokens, minlength=vocab_size)
    total = float(-(occurrences * log_probs).sum())
    return ResultRow(
        position="unigram",
        nats=total,
        tokens=stream.num_tokens,
        words=stream.words,
        bytes=stream.bytes,
        perplexity=math.exp(total / stream.num_tokens),
        word_perplexity=math.exp(total / stream.words),
        **common,
    )


def evaluate(config: EvaluateConfig, world: World) -> Iterator[ResultRow]:
    """Evaluate every run at every length, writing each row as soon as it is known.

    Yields:
        The rows, in order of work.

    Raises:
        ValueError: see `plan` and `open_corpus`.
    """
    device = runtime.start(config.device, world.local_rank, config.threads)
    tasks = plan(config)
    output = output_folder(config)
    if world.is_main:
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"output_dir = {output} cannot be written ({error.strerror or error}). Give another folder."
            ) from error
    results = output / "results.jsonl"
    if results.exists():
        read_rows(results)  # rows could not be added to a damaged file: better to say so now than after the work
    corpora: dict[str, Corpus] = {}
    for task in tasks:
        corpus = open_corpus(config, task)
        if corpus.hash not in corpora:
            corpora[corpus.hash] = corpus
            row = _baseline(config, task, corpus)
            if row is not None:
                if world.is_main:
                    upsert_rows(results, [row])
                yield row
        for length in task.settings.lengths:
            row = evaluate_length(task, config, corpus, length, device, world)
            if world.is_main:
                upsert_rows(results, [row])
            yield row
    if world.is_main:
        write_csv(output / "results.csv", upsert_rows(results, []))


def _origin(folder: Path, corpus: Corpus) -> dict[str, Any]:
    """What a figure should say of where a run's numbers come from."""
    trained = finished(folder) or {}
    own = folder / "corpus.json"
    text = read_json(own)["description"] if own.is_file() else corpus.name
    return {"corpus_name": text, "tokens_seen": trained.get("tokens_seen"), "device": trained.get("device")}


def output_folder(config: EvaluateConfig) -> Path:
    """Where results.jsonl goes."""
    return Path(config.output_dir or f"outputs/{config.experiment}/extrapolation")


def _baseline(config: EvaluateConfig, task: Task, corpus: Corpus) -> ResultRow | None:
    """The unigram row, where the run's own training text is at hand."""
    if config.data.path is not None or config.position:
        return None
    try:
        own = prepare(task.config.data, Tokenizer.load(task.folder / "tokenizer.json"), splits=("train",))
    except ValueError:
        return None
    settings = task.settings
    return unigram_row(
        own.split("train"),
        corpus.split(settings.split),
        corpus.vocab_size,
        mode=settings.mode,
        stride=settings.stride,
        split=settings.split,
        corpus=corpus.split(settings.split).hash,
        commit=runtime.code_version()[0],
    )


def describe(row: ResultRow) -> str:
    """One line for a person."""
    name = row.run or row.position
    length = "" if row.inference_length is None else f" at {row.inference_length}"
    if row.nats is None:
        return f"{name}{length}: not evaluated, {row.reason}"
    speed = "" if row.tokens_per_second is None else f" ({row.tokens_per_second:,.0f} tokens/s)"
    return f"{name}{length}: perplexity {row.perplexity:.3f}{speed}"


def log_curve(config: EvaluateConfig) -> None:
    """Show the curves in Weights & Biases, where it is chosen: a table and a line plot, one run for all."""
    if config.tracking.name != "wandb":
        return
    output = output_folder(config)
    rows = [row for row in read_rows(output / "results.jsonl") if row.nats is not None and row.run is not None]
    settings = {"experiment": config.experiment, "runs": sorted({str(row.run) for row in rows})}
    name = f"{config.experiment} extrapolation"
    with open_tracker(config.tracking, output, name, config.experiment, settings, 0) as tracker:
        tracker.table(
            "extrapolation",
            list(CURVE_COLUMNS),
            [[curve_name(row), *(getattr(row, column) for column in CURVE_COLUMNS[1:])] for row in rows],
            line_plot=("inference_length", "perplexity", "curve"),
        )
        tracker.summary({f"extrapolation/{curve_name(r)}@{r.inference_length}": r.perplexity for r in rows})


def curve_name(row: ResultRow) -> str:
    """What tells one curve from another: `alibi_L64_s1`, and split or stride where not the usual ones."""
    split = "" if row.split == "validation" else f" {row.split}"
    stride = "" if row.stride is None else f" stride {row.stride}"
    return f"{row.run}{split}{stride}"
