"""Rows and tables of the benchmark, and the paper's Table 1 beside ours."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alibi_lm import runtime
from alibi_lm.files import write_text
from alibi_lm.results.speeds import PAIRS
from alibi_lm.study.pages import Table, markdown
from benchmarks.measure import Contest, ratio
from benchmarks.subjects import OURS, Kind, Setup, flops_per_token, label

PAPER_TABLE_1 = {
    "sinusoidal": {512: (28.5, 82.1, 15.3), 1024: (26.0, 77.8, 19.2), 3072: (15.3, 42.4, 15.1)},
    "rotary": {512: (20.0, 43.4, 17.8), 1024: (17.7, 39.4, 22.8), 3072: (11.5, 29.5, 17.8)},
    "t5": {512: (14.4, 21.8, 16.9), 1024: (13.0, 20.2, 20.9), 3072: (4.3, 4.9, 15.9)},
    "alibi": {512: (28.3, 85.8, 15.3), 1024: (25.8, 76.4, 19.3), 3072: (15.5, 42.2, 15.2)},
}
"""Press et al. 2022, Table 1, one V100: thousand words/s in training and evaluation, GB of training memory."""
KINDS: tuple[Kind, ...] = ("train", "eval")


def rows(contests: Sequence[Contest], model: str, setup: Setup) -> list[dict[str, Any]]:
    """One row for each implementation and length measured so far; the reference's comes first."""
    contests = [contest for contest in contests if contest.pairs or contest.reason]
    result = []
    for length in dict.fromkeys(contest.task.length for contest in contests):
        here = [contest for contest in contests if contest.task.length == length]
        # All contests have steps of the reference; its row takes them together.
        reference = Contest(here[0].reference, here[0].reference, here[0].task)
        for contest in here:
            reference.pairs += [{kind: (a, a) for kind, (a, _) in pair.items()} for pair in contest.pairs]
            reference.matmul += contest.matmul
        measured = [reference, *(contest for contest in here if contest.subject is not contest.reference)]
        wanted = (OURS, "alibi", False)
        alibi = [
            c for c in measured if (c.subject.implementation, c.subject.position, c.subject.compiled) == wanted
        ]
        result += [_row(contest, reference, alibi[0] if alibi else None, model, setup) for contest in measured]
    return result


def _row(contest: Contest, reference: Contest, alibi: Contest | None, model: str, setup: Setup) -> dict[str, Any]:
    subject, task = contest.subject, contest.task
    machine = runtime.environment(setup.device)
    flops = flops_per_token(setup.sizes, setup.vocab_size, task.length)
    tokens = task.batch * task.length
    row: dict[str, Any] = {
        "device": machine["device"],
        "dtype": setup.precision,
        "implementation": subject.implementation,
        "position": subject.position,
        "backend": subject.backend,
        "compiled": subject.compiled,
        "length": task.length,
        "batch": task.batch,
    }
    for kind in KINDS:
        steps = contest.steps(kind)
        paired = ratio(contest.ratios(kind))
        # The quotient of two paired ratios needs no ALiBi steps next to the subject's own.
        lead = ratio(
            [a / b for a, b in zip(alibi.ratios(kind), contest.ratios(kind), strict=False)] if alibi else []
        )
        row |= {
            f"{kind}_tokens_per_second": tokens / statistics.median(steps) if steps else None,
            f"{kind}_ratio": paired and paired.median,
            f"{kind}_ratio_quartiles": paired and [paired.low, paired.high],
            f"{kind}_settled": None if contest is reference or paired is None else paired.settled,
            f"alibi_{kind}_speedup": lead and lead.median,
            f"alibi_{kind}_speedup_settled": None if contest is alibi or lead is None else lead.settled,
        }
    shares = [flops * tokens / s / speed for s, speed in zip(contest.steps("train"), contest.matmul, strict=False)]
    row |= {
        "peak_memory_bytes": subject.peak_memory_bytes.get(task.length),
        "train_flops_utilisation": statistics.median(shares) if shares else None,
        "flops_per_token": flops,
        "pairs": len(contest.pairs),
        "reason": contest.reason,
        "model": model,
        "vocab_size": setup.vocab_size,
        "parameters": subject.parameters,
        "threads": machine["threads"],
        "flushes_denormals": subject.flushes_denormals,
        "clock": setup.clock,
        "torch": machine["torch"],
        "commit": machine["commit"],
        "dirty": machine["dirty"],
    }
    return row


def write(path: Path, measured: Sequence[dict[str, Any]]) -> None:
    """Replace the file by these rows: readers see the old ones or the new ones."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(row) + "\n" for row in measured))


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of a results.jsonl; older ones, measured in rounds, have their number of rounds as `pairs`.

    Raises:
        ValueError: no such file, or it holds something other than result rows.
    """
    try:
        found = [
            {"pairs": row.get("rounds"), **row} for row in map(json.loads, path.read_text("utf-8").splitlines())
        ]
        if not found or any("train_ratio_quartiles" not in row for row in found):
            raise ValueError("no rows of a benchmark")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"show = {path}: {error}. Give a results.jsonl that make bench wrote.") from None
    return found


def table(measured: Sequence[dict[str, Any]]) -> str:
    """The measurements for a terminal: ratios to our `none` with their quartiles."""
    lines = []
    for length in sorted({row["length"] for row in measured}):
        here = [row for row in measured if row["length"] == length]
        first = here[0]
        lines += [
            "",
            f"length {length}, batch {first['batch']}; {first['device']}, {first['threads']} threads, "
            f"{first['dtype']}",
            f"{'':36}{'pairs':>5} {'train':>9} {'ratio to none':>28} {'eval':>9} {'ratio to none':>28} "
            f"{'of matmul':>9} {'alibi x':>13} {'memory':>8}",
        ]
        for row in here:
            leads = "/".join(
                _number(row, f"alibi_{k}_speedup", "4.2f") + ("?" * _open(row, k, "alibi")) for k in KINDS
            )
            memory = row["peak_memory_bytes"]
            lines.append(
                f"{label(row):36}{row['pairs']:>5} {_number(row, 'train_tokens_per_second', '9,.0f'):>9} "
                f"{_ratio(row, 'train'):>28} {_number(row, 'eval_tokens_per_second', '9,.0f'):>9} "
                f"{_ratio(row, 'eval'):>28} {_number(row, 'train_flops_utilisation', '9.2f'):>9} {leads:>13} "
                f"{'-' if memory is None else format(memory / 2**20, '5,.0f'):>5} MB"
            )
    lines += [
        "",
        "tokens/s: medians. ratio: median (quartiles) of tokens/s over those of our none in the step next to it.",
        f"not settled, ?: fewer than {PAIRS} pairs, or quartiles further apart than the median is from 1.",
        "of matmul: FLOPs of the training step over a matrix product's. alibi x: how many times as fast our",
        "ALiBi trains / evaluates.",
    ]
    return "\n".join(lines)


def ratios_markdown(measured: Sequence[dict[str, Any]]) -> str:
    """Tokens/s relative to our none, and training speed relative to a matrix product: `docs/speed.md`."""
    titles = {"train": "train_ratio", "eval": "eval_ratio", "of matmul": "train_flops_utilisation"}
    columns = [
        (f"{title} {length:,}", field, length)
        for length in sorted({row["length"] for row in measured})
        for title, field in titles.items()
        if any(row["length"] == length and row[field] is not None for row in measured)
    ]
    body: dict[str, dict[tuple[str, int], str]] = {}
    for row in measured:
        for title, field in titles.items():
            cell = _number(row, field, ".2f") + (" (not settled)" if _open(row, title) else "")
            body.setdefault(label(row), {})[field, row["length"]] = cell
    return grid_markdown(
        "implementation", [title for title, *_ in columns], body, [column[1:] for column in columns]
    )


def speedups_markdown(measured: Sequence[dict[str, Any]]) -> str:
    """How many times as fast our ALiBi trains / evaluates as each other library's model: `docs/speed.md`."""
    others = [row for row in measured if row["implementation"] != OURS]
    lengths = sorted({row["length"] for row in others})
    body: dict[str, dict[int, str]] = {}
    for row in others:
        cells = [
            _number(row, f"alibi_{kind}_speedup", ".2f") + (" (not settled)" if _open(row, kind, "alibi") else "")
            for kind in KINDS
        ]
        body.setdefault(label(row), {})[row["length"]] = " / ".join(cells)
    return (
        grid_markdown("our ALiBi, times as fast as", [f"{n:,}" for n in lengths], body, lengths) if others else ""
    )


def grid_markdown(
    first: str, titles: list[str], body: Mapping[str, Mapping[Any, str]], keys: Sequence[Any]
) -> str:
    """A row per name, a column per key with its title; `-` where there is no cell."""
    cells = [[name, *(known.get(key, "-") for key in keys)] for name, known in body.items()]
    return markdown([Table([first, *titles], cells)])


def _open(row: dict[str, Any], kind: str, over: str = "") -> bool:
    """Whether a ratio is not settled; older rows, measured in rounds, do not say."""
    return row.get(f"alibi_{kind}_speedup_settled" if over else f"{kind}_settled") is False


def _ratio(row: dict[str, Any], kind: str) -> str:
    if row[f"{kind}_ratio"] is None:
        return "-"
    low, high = row[f"{kind}_ratio_quartiles"]
    return f"{row[f'{kind}_ratio']:.2f} ({low:.2f}-{high:.2f})" + (" not settled" if _open(row, kind) else "")


def _number(row: dict[str, Any], field: str, form: str) -> str:
    return "-" if row[field] is None else format(row[field], form)


def table_1(measured: Sequence[dict[str, Any]]) -> str:
    """The paper's Table 1 with our numbers beside it, where lengths and schemes meet; empty where they do not."""
    ours = {(r["position"], r["length"]): r for r in measured if r["implementation"] == OURS and not r["compiled"]}
    units = {"train_tokens_per_second": 1e3, "eval_tokens_per_second": 1e3, "peak_memory_bytes": 1e9}
    lines = ["", "The paper's Table 1 (one V100) and this machine: thousand words/s, GB of memory in training"]
    lines.append(f"{'':22}{'train':>17} {'eval':>17} {'memory':>17}")
    for position, lengths in PAPER_TABLE_1.items():
        for length, paper in lengths.items():
            row = ours.get((position, length))
            if row is None:
                continue
            here = ["-" if row[field] is None else f"{row[field] / unit:9.1f}" for field, unit in units.items()]
            cells = [f"{theirs:7.1f} {mine:>9}" for theirs, mine in zip(paper, here, strict=True)]
            lines.append(f"{position:12} L={length:<7} " + " ".join(cells))
    return "\n".join(lines) if len(lines) > 3 else ""
