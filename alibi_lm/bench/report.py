"""Rows, tables, and the paper's Table 1 beside ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from alibi_lm import runtime
from alibi_lm.bench.measure import Round, spread
from alibi_lm.bench.subjects import OURS, Implementation
from alibi_lm.files import write_text
from alibi_lm.model.transformer import ModelConfig

PAPER_TABLE_1 = {
    "sinusoidal": {512: (28.5, 82.1, 15.3), 1024: (26.0, 77.8, 19.2), 3072: (15.3, 42.4, 15.1)},
    "rotary": {512: (20.0, 43.4, 17.8), 1024: (17.7, 39.4, 22.8), 3072: (11.5, 29.5, 17.8)},
    "t5": {512: (14.4, 21.8, 16.9), 1024: (13.0, 20.2, 20.9), 3072: (4.3, 4.9, 15.9)},
    "alibi": {512: (28.3, 85.8, 15.3), 1024: (25.8, 76.4, 19.3), 3072: (15.5, 42.2, 15.2)},
}
"""Press et al. 2022, Table 1, one V100: thousand words/s in training and evaluation, GB of training memory."""


def rows(rounds: list[Round], sizes: ModelConfig, vocab_size: int) -> list[dict[str, Any]]:
    """One row for each subject and length."""
    result = []
    commit, dirty = runtime.code_version()
    for one in (r for r in rounds if r.seconds):
        device = one.subjects[0].device
        machine = runtime.environment(device)
        base = one.subjects[0]
        reference = next((s for s in one.subjects if s.ours and s.position == "alibi" and not s.compiled), None)
        for subject in one.subjects:
            training = spread(one.ratios(subject, "train", base))
            evaluation = spread(one.ratios(subject, "evaluate", base))
            row: dict[str, Any] = {
                "device": machine["device"],
                "dtype": _dtype(subject),
                "implementation": subject.implementation,
                "position": subject.position,
                "backend": subject.backend,
                "compiled": subject.compiled,
                "length": one.length,
                "batch": one.batch,
                "train_tokens_per_second": one.tokens_per_second(subject, "train"),
                "eval_tokens_per_second": one.tokens_per_second(subject, "evaluate"),
                "train_ratio": training and training[0],
                "eval_ratio": evaluation and evaluation[0],
                "peak_memory_bytes": one.times[subject.label + subject.backend].peak_memory_bytes,
                "train_ratio_quartiles": training and list(training[1:]),
                "eval_ratio_quartiles": evaluation and list(evaluation[1:]),
                "train_flops_utilisation": one.utilisation(subject, sizes, vocab_size),
            }
            for kind, name in (("train", "alibi_train_speedup"), ("evaluate", "alibi_eval_speedup")):
                faster = spread(one.ratios(reference, kind, subject)) if reference else None
                row[name] = faster and faster[0]
            row |= {
                "rounds": len(one.seconds_of("evaluate", subject)),
                "threads": machine["threads"],
                "flushes_denormals": subject.flushes_denormals,
                "clock": one.clock,
                "torch": machine["torch"],
            }
            row |= {"parameters": subject.num_parameters, "commit": commit, "dirty": dirty}
            result.append(row)
    return result


def _dtype(subject: Implementation) -> str:
    if subject.precision == "auto":
        return "bfloat16" if subject.device.type == "cuda" else "float32"
    return subject.precision


def write(folder: Path, measured: list[dict[str, Any]]) -> Path:
    """Replace results.jsonl atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.jsonl"
    write_text(path, "".join(json.dumps(row) + "\n" for row in measured))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of a results.jsonl.

    Raises:
        ValueError: no such file, or something else than result rows in it.
    """
    try:
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if not found or any("train_ratio_quartiles" not in row for row in found):
            raise ValueError("no rows of a benchmark")
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"show = {path}: {error}. Give a results.jsonl that make bench wrote.") from None
    return found


def table(measured: list[dict[str, Any]]) -> str:
    """The measurements for a terminal: ratios to our `none` with their quartiles."""
    lines = []
    for length in sorted({row["length"] for row in measured}):
        here = [row for row in measured if row["length"] == length]
        first = here[0]
        fewest = min(row["rounds"] for row in here)
        rounds = f"{first['rounds']} rounds" + (f" ({fewest} of others)" if fewest < first["rounds"] else "")
        lines += [
            "",
            f"length {length}, batch {first['batch']}, {rounds}; {first['device']}, "
            f"{first['threads']} threads, {first['dtype']}",
            f"{'':38}{'train':>9} {'ratio to none':>20} {'eval':>9} {'ratio to none':>20} {'of matmul':>9} "
            f"{'alibi x':>11} {'memory':>8}",
        ]
        for row in here:
            speedups = "/".join(_number(row[k], "4.2f") for k in ("alibi_train_speedup", "alibi_eval_speedup"))
            lines.append(
                f"{_name(row):38}{_number(row['train_tokens_per_second'], '9,.0f'):>9} {_ratio(row, 'train'):>20} "
                f"{_number(row['eval_tokens_per_second'], '9,.0f'):>9} {_ratio(row, 'eval'):>20} "
                f"{_number(row['train_flops_utilisation'], '9.2f'):>9} {speedups:>11} "
                f"{_number(row['peak_memory_bytes'] and row['peak_memory_bytes'] / 2**20, '5,.0f'):>5} MB"
            )
    lines += [
        "",
        "tokens/s: medians. ratio: median (quartiles) of tokens/s over our none's in the same round.",
        "of matmul: FLOPs of the training step over a matrix product's. alibi x: how many times as fast our",
        "ALiBi trains / evaluates.",
    ]
    return "\n".join(lines)


def ratios_markdown(measured: list[dict[str, Any]]) -> str:
    """Tokens/s over our none's, and the training step's share of a matrix product's speed: `docs/speed.md`."""
    kinds = {"train": "train_ratio", "eval": "eval_ratio", "of matmul": "train_flops_utilisation"}
    columns = [
        (f"{title} {length:,}", kind, length)
        for length in sorted({row["length"] for row in measured})
        for title, kind in kinds.items()
        if any(row["length"] == length and row[kind] is not None for row in measured)
    ]
    body: dict[str, dict[tuple[str, int], str]] = {}
    for row in measured:
        for kind in kinds.values():
            body.setdefault(_name(row), {})[kind, row["length"]] = _number(row[kind], ".2f")
    titles = " | ".join(title for title, *_ in columns)
    lines = [f"| implementation | {titles} |", f"| --- |{' --: |' * len(columns)}"]
    for name, cells in body.items():
        lines.append(f"| {name} | {' | '.join(cells.get((kind, length), '-') for _, kind, length in columns)} |")
    return "\n".join(lines)


def speedups_markdown(measured: list[dict[str, Any]]) -> str:
    """How many times as fast our ALiBi trains / evaluates as each other library's model: `docs/speed.md`."""
    others = [row for row in measured if row["implementation"] != OURS]
    lengths = sorted({row["length"] for row in others})
    body: dict[str, dict[int, str]] = {}
    for row in others:
        cell = " / ".join(_number(row[f"alibi_{kind}_speedup"], ".2f") for kind in ("train", "eval"))
        body.setdefault(_name(row), {})[row["length"]] = cell
    lines = [f"| our ALiBi, times as fast as | {' | '.join(f'{n:,}' for n in lengths)} |"]
    lines.append(f"| --- |{' --: |' * len(lengths)}")
    lines += [f"| {name} | {' | '.join(cells.get(n, '-') for n in lengths)} |" for name, cells in body.items()]
    return "\n".join(lines) if others else ""


def _name(row: dict[str, Any]) -> str:
    name = f"{row['implementation']} {row['position']}" + (" compiled" if row["compiled"] else "")
    return name if row["backend"] == "its own" else f"{name} ({row['backend']})"


def table_1(measured: list[dict[str, Any]]) -> str:
    """The paper's Table 1 with our numbers beside it, where lengths and schemes meet."""
    lines = ["", "The paper's Table 1 (one V100) and this machine: thousand words/s, GB of memory in training"]
    lines.append(f"{'':22}{'train':>17} {'eval':>17} {'memory':>17}")
    for position, lengths in PAPER_TABLE_1.items():
        for length, paper in lengths.items():
            row = next(
                (
                    r
                    for r in measured
                    if (r["implementation"], r["position"], r["length"], r["compiled"])
                    == (OURS, position, length, False)
                ),
                None,
            )
            if row is None:
                continue
            here = [
                row["train_tokens_per_second"] and row["train_tokens_per_second"] / 1e3,
                row["eval_tokens_per_second"] and row["eval_tokens_per_second"] / 1e3,
                row["peak_memory_bytes"] and row["peak_memory_bytes"] / 1e9,
            ]
            cells = [f"{theirs:7.1f} {_number(mine, '9.1f'):>9}" for theirs, mine in zip(paper, here, strict=True)]
            lines.append(f"{position:12} L={length:<7} " + " ".join(cells))
    return "\n".join(lines) if len(lines) > 3 else ""


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _ratio(row: dict[str, Any], kind: str) -> str:
    if row[f"{kind}_ratio"] is None:
        return "-"
    low, high = row[f"{kind}_ratio_quartiles"]
    return f"{row[f'{kind}_ratio']:.2f} ({low:.2f}-{high:.2f})"
