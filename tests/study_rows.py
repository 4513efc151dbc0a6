"""Hand-made result rows for the tests of studies."""

import contextlib
import importlib.util
import io
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from alibi_lm.results.documents import DocumentSums
from alibi_lm.results.rows import ResultRow, write_rows
from alibi_lm.study.analysis import Analysis

ROOT = Path(__file__).parents[1]
TOKENS = 10_000
WORDS = 8_000


def row(
    position="alibi",
    length=64,
    perplexity=20.0,
    *,
    train=64,
    seed=1,
    suffix="",
    reason=None,
    tokens=TOKENS,
    words=WORDS,
    **changes,
):
    """One row of a run; perplexity None makes it a refused one."""
    nats = None if perplexity is None else tokens * math.log(perplexity)
    values = dict(
        run=f"{position}_L{train}_s{seed}{suffix}",
        position=position,
        train_length=train,
        seed=seed,
        inference_length=length,
        mode="nonoverlapping",
        stride=None,
        split="validation",
        corpus="c0ffee",
        tokens=tokens,
        words=words,
        bytes=50_000,
        nats=nats,
        perplexity=perplexity,
        word_perplexity=None if nats is None else math.exp(nats / words),
        commit="abc1234",
        reason=reason or ("positions end at 64" if nats is None else None),
    )
    return ResultRow(**(values | changes))


def curve(position, values, **changes):
    """Rows of one run from {length: perplexity}."""
    return [row(position, length, value, **changes) for length, value in values.items()]


def accuracy(position, length, value, items=200, **changes):
    """A row of a task whose metric is accuracy; value None makes it a refused one."""
    task = dict(task="copy", metric="accuracy", mode="items", nats=None, perplexity=None, word_perplexity=None)
    reason = None if value is not None else "positions end at 64"
    return replace(row(position, length, **changes), **task, value=value, n=items, reason=reason)


def scored(position, losses, seeds=(1, 2, 3), spread=0.003, **changes):
    """Rows and sums per document of runs with these mean losses by length; documents differ more than schemes."""
    rng = np.random.default_rng(sum(map(ord, position)))
    tokens = np.full(40, TOKENS // 40)
    hard = np.random.default_rng(7).normal(0, 0.5, 40)
    rows, documents = [], {}
    for length, loss in losses.items():
        for seed in seeds:
            sums = (loss + hard + rng.normal(0, spread) + rng.normal(0, 0.01, 40)) * tokens
            made = row(position, length, math.exp(sums.sum() / TOKENS), seed=seed, **changes)
            rows.append(made)
            documents[made.key] = DocumentSums(made.key, sums, tokens)
    return rows, documents


def analysis(view, *series, split="validation"):
    """A view as `analyse.py` writes it, of these curves."""
    return Analysis(view, "mine", split, {"c0ffee": "a text"}, "abc1234", list(series))


def unigram(perplexity=500.0, **changes):
    """The baseline's row."""
    return row("unigram", None, perplexity, run=None, train_length=None, seed=None, **changes)


SHAPES = {
    "alibi": {32: 22.0, 64: 20.0, 128: 19.0, 512: 18.5},
    "sinusoidal": {32: 22.5, 64: 20.5, 128: 40.0, 512: 160.0},
    "learned": {32: 23.0, 64: 21.0, 128: None, 512: None},
}


def study(folder, seeds=(1,), **changes):
    """A small study on disk: three schemes at L=64, ALiBi at L=32, and the baseline; returns its rows."""
    rows = [unigram()]
    for seed in seeds:
        for position, shape in SHAPES.items():
            values = {n: v if v is None else v * (1 + 0.01 * seed) for n, v in shape.items()}
            rows += curve(position, values, seed=seed, **changes)
        rows += curve("alibi", {32: 24.0, 64: 21.5, 128: 20.5, 512: 20.2}, seed=seed, train=32, **changes)
    folder.mkdir(parents=True, exist_ok=True)
    return write_rows(folder / "results.jsonl", rows)


def write_run(folder, name, config="", finished=None, environment=None, corpus=None):
    """A run folder's own account, config given as YAML."""
    place = folder / name
    place.mkdir(parents=True, exist_ok=True)
    (place / "config.yaml").write_text(config)
    parts = {"finished.json": finished, "environment.json": environment, "corpus.json": corpus}
    for file, value in parts.items():
        if value is not None:
            (place / file).write_text(json.dumps(value))


@dataclass
class Done:
    """How a script ended and what it printed."""

    returncode: int
    stdout: str
    stderr: str


def real_config(position, **changes):
    """The config.yaml of a run that training really wrote, with changes by dotted name (`__` for the dot)."""
    import yaml

    config = yaml.safe_load((ROOT / f"docs/results/quick/runs/{position}_L64_s1/config.yaml").read_text())
    for name, value in changes.items():
        place, *parts = config, *name.split("__")
        for part in parts[:-1]:
            place = place[part]
        place[parts[-1]] = value
    return yaml.safe_dump(config)


def run_script(name, *arguments, cwd="."):
    """Run a script of the repository as a user would, in this process."""
    spec = importlib.util.spec_from_file_location(f"script_{Path(name).stem}", ROOT / "scripts" / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.chdir(cwd):
        try:
            module.main(list(arguments))
            status = 0
        except SystemExit as end:
            status = end.code or 0
    return Done(status, out.getvalue(), err.getvalue())


def paper_rows():
    """The paper's own WikiText-103 tables as result rows of one seed each."""
    from alibi_lm.study.paper import TOKENS as COUNTS
    from alibi_lm.study.paper import paper_values

    found = {}
    for value in paper_values():
        if value.position and value.corpus == "wikitext103":
            window = dict(mode=value.mode, stride=value.stride, split=value.split)
            count = COUNTS[value.split]
            lengths = dict(length=value.inference_length, train=value.train_length)
            made = row(value.position, perplexity=value.perplexity, tokens=count, words=count, **lengths, **window)
            found.setdefault(made.key, made)
    return list(found.values())
