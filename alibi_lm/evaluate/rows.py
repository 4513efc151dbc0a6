"""From passes over a task to rows of results, with their sums per document."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from alibi_lm import runtime
from alibi_lm.data.prepare import prepare
from alibi_lm.evaluate.config import STREAM, EvaluateConfig
from alibi_lm.evaluate.passes import NotServed, OutOfMemory, Passes, enough_memory
from alibi_lm.evaluate.plan import OpenRun
from alibi_lm.evaluate.stream import Policy, stream_nats
from alibi_lm.evaluate.views import ONE_DOCUMENT
from alibi_lm.files import read_json
from alibi_lm.load import require_own_text
from alibi_lm.model.hub_folder import dotted
from alibi_lm.model.transformer import TransformerLM
from alibi_lm.results.documents import DocumentSums, upsert_documents
from alibi_lm.results.rows import ResultRow, perplexity_of, upsert_rows
from alibi_lm.results.statistics import per_document_sums
from alibi_lm.runs import CORPUS_FILE, finished
from alibi_lm.tasks.base import Task
from alibi_lm.tasks.items import Items
from alibi_lm.tasks.text import TextTask

OF_TASK = ("mode", "stride", "split", "corpus", "words", "bytes")
"""The fields that a row has from its task."""


def measure(passes: Passes, length: int, output: Path | None = None, **common: Any) -> list[ResultRow]:
    """Measure one model at one inference length: a row for each metric of the task.

    If the model cannot run, the memory is too small for it or the task has nothing to measure, the rows say why.

    Args:
        passes: the model's passes over the task.
        length: inference length.
        output: folder of `results.jsonl` and `documents.jsonl`, to which the rows are added; None: nowhere.
        common: further fields of the rows; `position` at least.

    Raises:
        OutOfMemory: with several processes, which wait for each other in a pass.
    """
    task = passes.task
    fields = _fields(passes, common) | {"task": task.name, "inference_length": length}
    fields["tokens"] = task.num_targets(length)
    scored, reason = None, task.refuses(length) or passes.refuses(task.width(length))
    try:
        scored = None if reason else passes.result(length)
    except NotServed as error:
        reason = str(error)
    except OutOfMemory as error:
        if passes.world is not None and passes.world.world_size > 1:
            raise
        reason = str(error)
    if scored is None:
        return keep(output, [ResultRow(**fields, metric=metric, reason=reason) for metric in task.metrics])
    groups, extra = task.groups(length), dict(fields.pop("extra", {}))
    fields |= {"commit": scored.commit, "peak_memory_bytes": scored.peak_memory_bytes}
    if scored.seconds:
        fields["tokens_per_second"] = fields["tokens"] / scored.seconds
    if isinstance(task, Items) and task.by_target:  # answers in one item go together: intervals count items
        extra["items"] = len(task.items(length))
    trained, rows = fields.get("train_length"), []
    for metric in task.metrics:
        if metric == "perplexity":
            rows.append(perplexity_row(float(scored.nats.sum(dtype=np.float64)), fields | {"extra": extra}))
            continue
        assert scored.hits is not None
        right = np.logical_and.reduceat(scored.hits, groups)
        shares = {name: float(right[members].mean()) for name, members in task.parts(length).items()}
        own = extra | ({"by_part": shares} if shares else {})
        if isinstance(task, Items) and trained and length > trained:
            own |= _by_reach(task, length, trained, right)
        rows.append(ResultRow(**fields, extra=own, metric=metric, value=float(right.mean()), n=len(right)))
    return keep(output, rows, scored.nats, groups)


def _by_reach(task: Items, length: int, trained: int, right: np.ndarray) -> dict[str, Any]:
    """How much of a result needs more than the last L tokens; empty if the task does not know.

    `in_reach`: accuracy of a perfect reader of those tokens alone; `beyond`: the model's accuracy on the other
    answers, and `items_beyond`: how many items have such answers.
    """
    inside = task.in_reach(length, trained)
    if inside is None:
        return {}
    found: dict[str, Any] = {"in_reach": float(inside.mean())}
    if not inside.all():
        outside = ~inside.reshape(len(task.items(length)), -1)  # each item has equally many answers
        found |= {"beyond": float(right[~inside].mean()), "items_beyond": int(outside.any(axis=1).sum())}
    return found


def measure_stream(passes: Passes, policy: Policy, output: Path | None = None, **common: Any) -> list[ResultRow]:
    """Measure a whole split as one window: the last point of an extrapolation curve.

    Every target has all tokens before it as context, through a key/value cache. A cache of windows takes
    constant memory, and the row says which policy was used, what it kept and what it may have lost.

    Args:
        passes: passes of one of our models over a text.
        policy: the cache.
        output: as in `measure`.
        common: likewise.

    Raises:
        ValueError: a cache that does not fit the model, and why.
    """
    text, model = passes.text, passes.model
    length = len(text.tokens)
    fields = _fields(passes, common)
    fields |= {"mode": STREAM, "stride": None, "inference_length": length, "tokens": length}
    fields["changes"] = fields.get("changes", {}) | policy.changes
    fields["extra"] = fields.get("extra", {}) | {"cache": policy.cache}
    if not isinstance(model, TransformerLM):
        return keep(output, [ResultRow(**fields, reason="it has no key/value cache that is known here")])
    if reason := passes.refuses(length):
        return keep(output, [ResultRow(**fields, reason=reason)])
    parts: list[np.ndarray] = []
    begun = time.perf_counter()
    runtime.reset_peak_memory(model.device)
    quiet = not sys.stderr.isatty()
    try:
        with enough_memory(f"at {length} tokens"):
            model.serve(length)
            cache = policy.open(model)
            with tqdm(
                total=length, unit="tok", unit_scale=True, desc=f"{model.label}: stream", disable=quiet
            ) as bar:
                for part in stream_nats(model, text.tokens, text.start_id, cache):
                    parts.append(part)
                    bar.update(len(part))
    except OutOfMemory as error:
        return keep(output, [ResultRow(**fields, reason=str(error))])
    nats = np.concatenate(parts)
    fields |= {"peak_memory_bytes": runtime.peak_memory_bytes(model.device)}
    fields["tokens_per_second"] = length / (time.perf_counter() - begun)
    fields["extra"] |= {"keys_held": cache.keys_held, "lost_share": cache.lost_share}
    return keep(output, [perplexity_row(float(nats.sum()), fields)], nats, text.groups(length))


def keep(
    output: Path | None, rows: list[ResultRow], nats: np.ndarray | None = None, groups: np.ndarray | None = None
) -> list[ResultRow]:
    """Add rows of one pass to the files of a folder, those of perplexity with their sums per document.

    The sums are of `nats` (N,), None if no pass was made; documents start at `groups` (D,). Returns the rows.
    """
    if output is not None:
        upsert_rows(output / "results.jsonl", rows)
        valued = [row for row in rows if row.metric == "perplexity" and row.nats is not None]
        if nats is not None and groups is not None and valued:
            sums = [DocumentSums(row.key, *per_document_sums(nats, groups)) for row in valued]
            upsert_documents(output / "documents.jsonl", sums)
    return rows


def _fields(passes: Passes, common: dict[str, Any]) -> dict[str, Any]:
    task, model = passes.task, passes.model
    fields = {"run": model.label, "train_length": model.train_length, "commit": runtime.code_version()[0]} | common
    return fields | {name: getattr(task, name) for name in OF_TASK}


def perplexity_row(total: float, fields: dict[str, Any]) -> ResultRow:
    """A row of perplexity; its nats are kept even if the perplexity is too large for a float."""
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
    # The run's record says whether its text is the original one; it does not describe another text.
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
            extra["note"] = ONE_DOCUMENT
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
    """The changes for the test as rows name them: settings of scheme and query scale, step of a checkpoint."""
    changes = {
        f"{group}.{name}": value
        for group in ("position", "query_scale")
        for name, value in getattr(config, group).items()
    }
    changes |= {f"model.{name}": value for name, value in dotted(config.model_config)}
    return changes | ({"checkpoint": config.checkpoint} if config.checkpoint.startswith("step:") else {})


def baseline(config: EvaluateConfig, opened: OpenRun) -> ResultRow | None:
    """The row of a model that knows only how often each token occurs in the training text (add-one smoothed).

    For a task, the row of the best constant answer, if one is ever right. None if the run's training text is not
    available.
    """
    commit = runtime.code_version()[0]
    if opened.corpus is None:
        items, share = opened.passes.task, opened.plan.config.task.chance
        if not share:
            return None
        return ResultRow(
            position="constant", mode="items", split=items.split, corpus=items.corpus, tokens=1, task=items.name,
            metric="accuracy", value=share, n=1, commit=commit,
        )  # fmt: skip
    if config.data.path is not None or config.data.name is not None or config.position or config.query_scale:
        return None
    task, vocab_size = opened.passes.text, opened.corpus.vocab_size
    try:
        own = prepare(opened.plan.config.data, opened.corpus.tokenizer, splits=("train",))
        require_own_text(opened.plan.folder, own, "train")
    except ValueError:
        return None
    train, counts = own.split("train").tokens, np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, len(train), 1 << 24):
        counts += np.bincount(train[start : start + (1 << 24)], minlength=vocab_size)
    log_probs = np.log((counts + 1) / (counts.sum() + vocab_size))
    total = float(-(np.bincount(task.tokens, minlength=vocab_size) * log_probs).sum())
    fields = {name: getattr(task, name) for name in OF_TASK}
    fields |= {"position": "unigram", "tokens": len(task.tokens), "commit": commit}
    return perplexity_row(total, fields | {"extra": {"corpus_name": opened.corpus.name}})


def describe(row: ResultRow) -> str:
    """The row as one line of text."""
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


def curve_name(row: ResultRow) -> str:
    """Name of the row's curve: `alibi_L64_s1`, with changes, and task, split and stride if unusual."""
    changes = "".join(
        f"+{key.removeprefix('position.').removesuffix('.name')}={value}"
        for key, value in sorted(row.changes.items())
    )
    split = "" if row.split == "validation" else f" {row.split}"
    stride = "" if row.stride is None else f" stride {row.stride}"
    task = "" if row.task == "text" else f" {row.task}"
    return f"{row.run}{changes}{task}{split}{stride}"
