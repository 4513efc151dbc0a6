"""Runs times inference lengths: the rows of an extrapolation curve, and the views of an analysis.

Both commands find and open runs in the same way (`plan`, `open_run`) and take passes from the same store. A run
that fails stops no other: what went wrong is told at the end, by `FailedRuns`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from alibi_lm import runtime
from alibi_lm.data.corpus import prepare
from alibi_lm.distributed import World
from alibi_lm.evaluate import context_views, self_longppl, views
from alibi_lm.evaluate.config import STREAM, VIEWS, EvaluateConfig
from alibi_lm.evaluate.passes import Passes
from alibi_lm.evaluate.plan import EXPECTED, OpenRun, PlannedRun, open_run, plan, raise_failures
from alibi_lm.evaluate.safe_length import safe_length, verdict
from alibi_lm.evaluate.store import Stored
from alibi_lm.evaluate.stream import Policy, measure_stream
from alibi_lm.evaluate.windows import head_windows
from alibi_lm.files import read_json, write_text
from alibi_lm.model.hub_folder import dotted
from alibi_lm.results.documents import DocumentSums, upsert_documents
from alibi_lm.results.rows import ResultRow, perplexity_of, read_rows, refuse_another_run, upsert_rows, write_csv
from alibi_lm.results.statistics import per_document_sums
from alibi_lm.runs import CORPUS_FILE, finished, short_hash
from alibi_lm.settings import counting, require
from alibi_lm.tasks.base import Task
from alibi_lm.tasks.items import Items, Synthetic
from alibi_lm.tasks.text import TextTask
from alibi_lm.tracking import open_tracker

CURVE_COLUMNS = (
    "curve", "run", "position", "train_length", "seed", "inference_length", "mode", "stride", "split",
    "task", "value", "tokens_per_second", "peak_memory_bytes",
)  # fmt: skip
"""Columns of the tables in Weights & Biases: the name of a row's curve, and fields; `value` goes by its metric."""

# --- rows ----------------------------------------------------------------------------------------


def evaluate(config: EvaluateConfig, world: World | None = None) -> Iterator[ResultRow]:
    """Evaluate every run at every length, writing and yielding each row as soon as it is known.

    Raises:
        ValueError: see `plan`.
        FailedRuns: at the end, where some of several runs could not be evaluated.
    """
    require(
        config.view == "curve", f"view = {config.view} is a view of scripts/analyse.py. Use that, or view=curve."
    )
    world = world or World()
    device = runtime.start(config.device, world.local_rank, config.threads)
    runs, failures = plan(config)
    results = config.output / "results.jsonl"
    if world.is_main:
        _make(config.output)
    if results.exists():
        # What could not be added to the file is better known now than after the work.
        refuse_another_run(read_rows(results), {run.name: (run.run_id, str(run.folder)) for run in runs})
    total, texts = len(runs) + len(failures), set()
    for run in runs:
        try:
            opened = open_run(config, run, device, world)
            task = opened.passes.task
            if (task.corpus, task.split) not in texts:
                texts.add((task.corpus, task.split))
                if row := _baseline(config, opened):
                    if world.is_main:
                        upsert_rows(results, [row])
                    yield row
            if config.mode == STREAM:
                policy = Policy(config.cache or "full", config.lost_share, config.window, config.sinks)
                common = common_fields(config, opened, opened.passes.text)
                row, sums = measure_stream(opened.passes, policy, **common)
                if world.is_main:
                    upsert_rows(results, [row])
                    upsert_documents(config.output / "documents.jsonl", [sums] if sums else [])
                yield row
                continue
            for passes in opened.asked:
                common = common_fields(config, opened, passes.task)
                for length in run.settings.lengths:
                    yield from measure(passes, length, config.output if world.is_main else None, **common)
        except EXPECTED as error:
            failures[run.name] = error
    if world.is_main and results.exists():
        write_csv(config.output / "results.csv", upsert_rows(results, []))
    raise_failures(failures, total)


def measure(passes: Passes, length: int, output: Path | None = None, **common: Any) -> list[ResultRow]:
    """Measure one model at one inference length: a row for each metric of the task.

    Where the model cannot run or the task has nothing to measure, the rows say why.

    Args:
        passes: of the model over the task.
        length: inference length.
        output: folder of `results.jsonl` and `documents.jsonl`, which take up the rows; None: nowhere.
        common: further fields of the rows; `position` at least.
    """
    task, model = passes.task, passes.model
    fields: dict[str, Any] = {
        "run": model.label,
        "train_length": model.train_length,
        "commit": runtime.code_version()[0],
    } | common
    fields |= {name: getattr(task, name) for name in ("mode", "stride", "split", "corpus", "words", "bytes")}
    fields |= {"task": task.name, "inference_length": length, "tokens": task.num_targets(length)}
    reason = task.refuses(length) or passes.refuses(task.width(length))
    if reason:
        rows = [ResultRow(**fields, metric=metric, reason=reason) for metric in task.metrics]
        sums: list[DocumentSums] = []
    else:
        scored = passes.result(length)
        fields |= {"commit": scored.commit, "peak_memory_bytes": scored.peak_memory_bytes}
        if scored.seconds:
            fields["tokens_per_second"] = fields["tokens"] / scored.seconds
        groups = task.groups(length)
        if isinstance(task, Items) and task.by_target:  # answers in one item go together: intervals count items
            fields["extra"] = fields.get("extra", {}) | {"items": len(task.items(length))}
        rows = [_row(metric, scored, groups, fields, task.parts(length)) for metric in task.metrics]
        sums = [
            DocumentSums(row.key, *per_document_sums(scored.nats, groups))
            for row in rows
            if row.metric == "perplexity" and row.nats is not None
        ]
    if output is not None:
        upsert_rows(output / "results.jsonl", rows)
        if sums:
            upsert_documents(output / "documents.jsonl", sums)
    return rows


def _row(
    metric: str, scored: Stored, groups: np.ndarray, fields: dict[str, Any], parts: dict[str, np.ndarray]
) -> ResultRow:
    if metric == "accuracy":
        assert scored.hits is not None
        right = np.logical_and.reduceat(scored.hits, groups)
        if parts:
            shares = {name: float(right[members].mean()) for name, members in parts.items()}
            fields = fields | {"extra": fields.get("extra", {}) | {"by_part": shares}}
        return ResultRow(**fields, metric=metric, value=float(right.mean()), n=len(right))
    return perplexity_row(float(scored.nats.sum(dtype=np.float64)), fields)


def perplexity_row(total: float, fields: dict[str, Any]) -> ResultRow:
    """Nats are kept also where a perplexity is too large for a number."""
    perplexity, reason = perplexity_of(total, fields["tokens"])
    if not math.isfinite(total):
        return ResultRow(**fields, reason=reason)
    by_word, word_reason = perplexity_of(total, fields["words"]) if fields["words"] else (None, None)
    if reason is None and word_reason is not None:
        reason = f"word_perplexity is null: {word_reason}"
    row = ResultRow(**fields, nats=total, perplexity=perplexity, word_perplexity=by_word, reason=reason)
    return replace(row, extra=row.extra | {"bits_per_byte": row.bits_per_byte})


def common_fields(config: EvaluateConfig, opened: OpenRun, task: Task) -> dict[str, Any]:
    """Fields of all rows of a run and a task."""
    run = opened.plan
    trained, record = finished(run.folder) or {}, run.folder / CORPUS_FILE
    own, corpus = read_json(record) if record.is_file() else {}, opened.corpus
    # The run's record says whether a text is the original one, and is no name of another text.
    texts = [
        m.get("splits", {}).get(task.split, {}).get("text_sha256") for m in (own, getattr(corpus, "manifest", {}))
    ]
    same = own and (corpus is None or texts[0] == texts[1])
    extra: dict[str, Any] = {
        "corpus_name": own["description"] if same else getattr(corpus, "name", ""),
        "tokens_seen": trained.get("tokens_seen"),
        "device": trained.get("device"),
    } | opened.way
    if run.found is not None:
        extra |= {"model": run.found.source, "train_length_from": run.found.train_length_from}
    if isinstance(task, TextTask):
        extra["documents"] = documents = len(task.groups(run.config.train_length))
        if documents == 1:
            extra["note"] = views.ONE_DOCUMENT
    else:
        extra["trained_steps"] = trained.get("steps")
    return {
        "run": run.name,
        "position": run.config.position.name,
        "train_length": run.config.train_length,
        "seed": run.config.seed if run.found is None else None,
        "changes": changes_of(config),
        "run_id": run.run_id,
        "folder": str(run.folder),
        "extra": extra,
    }


def changes_of(config: EvaluateConfig) -> dict[str, Any]:
    """What is changed for the test, as rows name it: settings of scheme and query scale, step of a checkpoint."""
    changes = {
        f"{group}.{name}": value
        for group in ("position", "query_scale")
        for name, value in getattr(config, group).items()
    }
    changes |= {f"model.{name}": value for name, value in dotted(config.model_config)}
    return changes | ({"checkpoint": config.checkpoint} if config.checkpoint.startswith("step:") else {})


def _baseline(config: EvaluateConfig, opened: OpenRun) -> ResultRow | None:
    """The row of a model that knows only how often each token occurs in the training text (add-one smoothed).

    For a task, that of the best constant answer, where there is one that is ever right. None where the run's own
    training text is not at hand.
    """
    if opened.corpus is None:
        return _chance(opened.passes.task, opened.plan.config.task.chance)
    if config.data.path is not None or config.data.name is not None or config.position or config.query_scale:
        return None
    task, vocab_size = opened.passes.text, opened.corpus.vocab_size
    try:
        own = prepare(opened.plan.config.data, opened.corpus.tokenizer, splits=("train",))
    except ValueError:
        return None
    train, counts = own.split("train").tokens, np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, len(train), 1 << 24):
        counts += np.bincount(train[start : start + (1 << 24)], minlength=vocab_size)
    log_probs = np.log((counts + 1) / (counts.sum() + vocab_size))
    total = float(-(np.bincount(task.tokens, minlength=vocab_size) * log_probs).sum())
    fields = {name: getattr(task, name) for name in ("mode", "stride", "split", "corpus", "words", "bytes")}
    fields |= {"position": "unigram", "tokens": len(task.tokens), "commit": runtime.code_version()[0]}
    return perplexity_row(total, fields | {"extra": {"corpus_name": opened.corpus.name}})


def _chance(task: Task, share: float) -> ResultRow | None:
    if not share:
        return None
    return ResultRow(
        position="constant", mode="items", split=task.split, corpus=task.corpus, tokens=1, task=task.name,
        metric="accuracy", value=share, n=1, commit=runtime.code_version()[0],
    )  # fmt: skip


def describe(row: ResultRow) -> str:
    """One line for a person."""
    name = (row.run or row.position) + "".join(f" {key}={value}" for key, value in sorted(row.changes.items()))
    length = "" if row.inference_length is None else f" at {row.inference_length}"
    task = "" if row.task == "text" else f" {row.task}:"
    if row.value is None:
        found = "not evaluated" if row.loss is None else f"{row.loss:.4f} nats per token, no {row.metric}"
        return f"{name}{length}:{task} {found}, {row.reason}"
    if row.bits_per_byte is not None and "model" in row.extra:
        found = f"{row.bits_per_byte:.4f} bits per byte, perplexity {row.perplexity:.3f} per token"
        return f"{name}{length}: {found}, {row.word_perplexity or math.inf:.3f} per word"
    speed = "" if row.tokens_per_second is None else f" ({row.tokens_per_second:,.0f} tokens/s)"
    kept = ""
    if row.mode == STREAM:
        lost = row.extra.get("lost_share")
        kept = f"; {row.extra.get('keys_held', 0):,.0f} keys held per head, "
        kept += "no bound on the lost share" if lost is None else f"lost share at most {lost:.2g}"
    return f"{name}{length}:{task} {row.metric} {row.value:.3f}{speed}{kept}"


def log_curve(config: EvaluateConfig) -> None:
    """Show the curves in Weights & Biases, where it is chosen: a table and a plot for each metric, in one run."""
    if config.tracking.name != "wandb":
        return
    rows = [
        row
        for row in read_rows(config.output / "results.jsonl")
        if row.run is not None and row.value is not None and row.inference_length is not None
    ]
    settings = {"experiment": config.experiment, "runs": sorted({str(row.run) for row in rows})}
    name = f"{config.experiment} extrapolation"
    with open_tracker(config.tracking, config.output, name, config.experiment, settings, 0) as tracker:
        for metric, title in (("perplexity", "extrapolation"), ("accuracy", "accuracy")):
            own = [row for row in rows if row.metric == metric]
            columns = [metric if column == "value" else column for column in CURVE_COLUMNS]
            body = [[curve_name(row), *(getattr(row, column) for column in CURVE_COLUMNS[1:])] for row in own]
            if own:
                tracker.table(title, columns, body, line_plot=("inference_length", metric, "curve"))
                tracker.summary({f"{title}/{curve_name(r)}@{r.inference_length}": r.value for r in own})


def curve_name(row: ResultRow) -> str:
    """What tells one curve from another: `alibi_L64_s1`, with changes, and task, split and stride if unusual."""
    changes = "".join(
        f"+{key.removeprefix('position.').removesuffix('.name')}={value}"
        for key, value in sorted(row.changes.items())
    )
    split = "" if row.split == "validation" else f" {row.split}"
    stride = "" if row.stride is None else f" stride {row.stride}"
    task = "" if row.task == "text" else f" {row.task}"
    return f"{row.run}{changes}{task}{split}{stride}"


# --- views ---------------------------------------------------------------------------------------


def analyse(config: EvaluateConfig) -> Iterator[Path]:
    """Compute the views that are asked for, of all runs, seeds of a scheme together; yields the file of each.

    Raises:
        ValueError: no runs, missing text, or a setting out of range.
        FailedRuns: at the end, where some of several runs could not be analysed.
    """
    require(
        config.view != "curve", "view = curve is what scripts/evaluate.py computes. Use that, or another view."
    )
    device = runtime.start(config.device, threads=config.threads)
    runs, failures = plan(config)
    for run in runs:
        require(
            not isinstance(run.config.task, Synthetic),
            f"view = {config.view} needs a text, and {run.name} was trained on items of {run.config.task.name}. "
            "Use view=curve (scripts/evaluate.py), or name runs that were trained on a text.",
        )
    total = len(runs) + len(failures)
    names = list(VIEWS) if config.view == "all" else [config.view]
    series: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    corpora: dict[str, str] = {}
    for members in _by_seed(runs):
        opened = []
        for run in members:
            try:
                opened.append(open_run(config, run, device))
            except EXPECTED as error:
                failures[run.name] = error
        if not opened:
            continue
        try:
            who = ", ".join(run.plan.name for run in opened)
            require(
                len({run.passes.text.sha256 for run in opened}) == 1,
                f"runs {who} differ in their seed only, but their texts are encoded differently. "
                "Analyse them one at a time: runs=<run folder>.",
            )
            first = opened[0].plan.config
            group = views.Group(first.position.name, first.train_length, [run.passes for run in opened])
            corpora[str(opened[0].passes.text.corpus)] = getattr(opened[0].corpus, "name", "")
            for name in names:
                print(f"{name}: {', '.join(group.labels)}", flush=True)
                series[name].append(_series(config, name, opened, group))
        except EXPECTED as error:
            failures |= {run.plan.name: error for run in opened}
    self_longppl.finish(series.get("self_longppl", []))
    for name in names:
        if series[name]:
            content = {
                "view": name,
                "experiment": config.experiment,
                "split": runs[0].settings.split,
                "corpora": corpora,
                "commit": runtime.code_version()[0],
                "series": series[name],
            }
            _make(config.output)
            path = config.output / f"{name}.json"
            write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
            yield path
    raise_failures(failures, total)


def _by_seed(runs: list[PlannedRun]) -> list[list[PlannedRun]]:
    """Runs that differ in nothing but the seed, together; longest training length first, then by scheme."""
    found: dict[str, list[PlannedRun]] = {}
    for run in runs:
        key = short_hash({k: v for k, v in counting(run.config, "run").items() if k != "seed"})
        members = found.setdefault(key, [])
        if any(run.config.seed == other.config.seed for other in members):
            members = found[f"{key} {run.folder}"] = []
        members.append(run)
    return sorted(found.values(), key=lambda m: (-m[0].config.train_length, m[0].config.position.name))


def _series(config: EvaluateConfig, view: str, opened: list[OpenRun], group: views.Group) -> dict[str, Any]:
    """One curve of a view."""
    found: dict[str, Any] = {
        "position": group.position,
        "train_length": group.train_length,
        "corpus": opened[0].passes.text.corpus,
        "tokens": group.num_tokens,
        "documents": len(group.documents),
        "runs": group.labels,
        "changes": changes_of(config),
        "interval": "seeds and documents" if len(opened) > 1 else "documents, given this seed",
        "points": _points(config, view, opened[0].plan.settings.lengths, group),
    }
    if view == "safe_length":
        found |= verdict(found["points"])
        print(f"  {found['verdict']}", flush=True)
    return found | ({"note": group.note} if group.note else {})


def _points(config: EvaluateConfig, view: str, lengths: list[int], group: views.Group) -> Any:
    """Points of a view, or what they are made of once all curves are there (`self_longppl.finish`)."""
    trained = group.train_length
    if view == "windows":
        return head_windows(group.passes[0])  # other seeds have other weights, and much the same windows
    if view == "perplexity":
        return views.perplexity(group, lengths, config.stride)
    if view == "position":
        return views.position(group, sorted(lengths))
    if view == "last":
        return views.last(group, lengths, config.last)
    if view == "documents":
        return views.documents(group, config.lengths or sorted({trained, max(lengths)}))
    if view == "safe_length":
        return safe_length(group, lengths)
    if view == "fixed":
        contexts = sorted(config.contexts or lengths)
        return views.fixed(group, contexts, config.every or max(1, group.num_tokens // 1000))
    if view == "decomposition":
        # The same setting means sliding windows elsewhere, so with view=all it may be too long for a short L.
        stride = config.stride or max(1, trained // 8)
        require(stride <= trained, f"stride = {stride}. Allowed: 1 to train_length = {trained}.")
        return views.decomposition(group, sorted(lengths), stride)
    if view == "effective_context":
        powers = [2**k for k in range(max(lengths).bit_length())]
        contexts = sorted(config.contexts or {*powers, *lengths})
        return context_views.effective_context(group, contexts, config.every or max(1, group.num_tokens // 1000))
    if view == "repeat":
        width = config.width or max(1, trained // 4)
        distances = config.distances or [width * 2**k for k in range(16) if width * 2**k + width <= max(lengths)]
        every = config.every or max(1, group.num_tokens // width // 128)
        return context_views.repeat(group, sorted(distances), width, every)
    if view == "self_longppl":
        return self_longppl.gather(group, lengths, config.short, config.key_gain, config.key_loss)
    if view == "attention":
        return context_views.attention(group, sorted(lengths), config.windows)
    width = config.width or max(1, trained // 2)
    powers = [0, *(trained * 2**k // 8 for k in range(3)), *(n for n in sorted(lengths) if n >= trained)]
    every = config.every or max(1, group.num_tokens // width // 256)
    return views.offset(group, sorted(set(config.offsets or powers)), width, every)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"output_dir = {folder} cannot be written ({error.strerror or error}). Give another folder."
        ) from error
