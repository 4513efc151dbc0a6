"""Comparing runs answers yes, no or not settled, and refuses to compare what is not comparable."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from study_rows import TOKENS, row, run_script, write_run

from alibi_lm.results.curves import View
from alibi_lm.results.rows import write_rows
from alibi_lm.results.statistics import paired_difference
from alibi_lm.study.compare import common_lengths, compare_runs, select, title

PLAIN = View("validation", "nonoverlapping")
DOCUMENTS = 40


def scored(position, losses, seeds=(1, 2, 3), spread=0.003, **changes):
    """Rows and document sums of runs with these mean losses by length."""
    rng = np.random.default_rng(sum(map(ord, position)))
    tokens = np.full(DOCUMENTS, TOKENS // DOCUMENTS)
    hard = np.random.default_rng(7).normal(0, 0.5, DOCUMENTS)  # documents differ far more than schemes
    rows, summaries = [], {}
    for length, loss in losses.items():
        for seed in seeds:
            sums = (loss + hard + rng.normal(0, spread) + rng.normal(0, 0.01, DOCUMENTS)) * tokens
            made = row(position, length, math.exp(sums.sum() / TOKENS), seed=seed, **changes)
            rows.append(made)
            summaries[made.key] = SimpleNamespace(document_nats=sums, document_tokens=tokens)
    return rows, summaries


def compared(losses_a, losses_b, lengths=None, **changes):
    a, first = scored("alibi", losses_a, **changes)
    b, second = scored("sinusoidal", losses_b, **changes)
    return compare_runs(a, b, first | second, lengths or common_lengths(a, b))


def test_yes_no_and_not_settled():
    found = compared({64: 3.0, 128: 3.2, 256: 3.1}, {64: 3.05, 128: 3.1, 256: 3.1})
    assert [(item.inference_length, item.answer) for item in found] == [
        (64, "YES"),
        (128, "NO"),
        (256, "NOT SETTLED"),
    ]
    assert found[0].difference.high < 0 < found[1].difference.low
    assert "+0.0950 [" in found[1].line and "perplexity x 1.0997 [" in found[1].line


def test_the_interval_is_the_paired_one_widened_for_the_lengths_asked():
    losses = {64: 3.0, 128: 3.0}
    (a, first), (b, second) = scored("alibi", losses), scored("t5", losses)
    found = compare_runs(a, b, first | second, [64, 128])[0].difference
    sums = [np.stack([s[r.key].document_nats for r in rows if r.inference_length == 64])
            for rows, s in ((a, first), (b, second))]  # fmt: skip
    expected = paired_difference(*sums, first[a[0].key].document_tokens, comparisons=2)
    assert found == expected
    assert compare_runs(a, b, first | second, [64])[0].difference.high < found.high


def test_one_seed_settles_nothing():
    (found,) = compared({64: 3.0}, {64: 4.0}, seeds=(1,))
    assert found.answer == "NOT SETTLED" and "one seed" in found.note


def test_what_cannot_be_compared_says_why():
    a, first = scored("alibi", {64: 3.0, 128: 3.0})
    b, second = scored("learned", {64: 3.0})
    refused = [row("learned", 128, None, seed=seed) for seed in (1, 2, 3)]
    found = compare_runs(a, [*b, *refused], first | second, [64, 128, 256])
    assert [item.answer for item in found][1:] == ["NOT RUN", "NOT RUN"]
    assert found[1].note == "B has no value: positions end at 64" and "A has no value" in found[2].note
    assert "no document sums of learned_L64_s1" in compare_runs(a, b, first, [64])[0].note
    other, third = scored("learned", {64: 3.0}, corpus="facade")
    with pytest.raises(ValueError, match=r"different texts at length 64 \(c0ffee, facade\)"):
        compare_runs(a, other, first | third, [64])


def test_patterns_must_mean_seeds_of_one_kind():
    rows = [row(), row(seed=2), row(seed=2, suffix="_0f3a9c21"), row("t5"), row(mode="sliding", stride=4)]
    assert [r.seed for r in select(rows, "alibi_L64_s?", PLAIN, "a")] == [1, 2]
    assert len(select(rows, "outputs/quick/runs/t5_L64_s*", PLAIN, "a")) == 1
    assert title(select(rows, "alibi_L64_s?", PLAIN, "a")) == "ALiBi trained at 64 (seeds 1, 2)"
    with pytest.raises(
        ValueError, match=r"a = \*_L64_s1 means runs that are not seeds of each other .alibi L=64, t5 L=64"
    ):
        select(rows, "*_L64_s1", PLAIN, "a")
    with pytest.raises(ValueError, match="0f3a9c21"):
        select(rows, "alibi*", PLAIN, "a")
    with pytest.raises(ValueError, match="runs here: alibi_L64_s1"):
        select(rows, "rotary*", PLAIN, "b")
    with pytest.raises(ValueError, match="its runs have validation, nonoverlapping windows only"):
        select(rows, "t5*", View("test", "nonoverlapping"), "b")


def test_the_script_reads_summaries_marks_unfairness_and_refuses_mistakes(tmp_path):
    from alibi_lm.results.documents import summarise, write_summaries

    folder = tmp_path / "extrapolation"
    folder.mkdir()
    rows, summaries = [], []
    documents = np.arange(0, TOKENS, TOKENS // DOCUMENTS)
    for position, loss in (("alibi", 3.0), ("sinusoidal", 3.1)):
        for seed in (1, 2, 3):
            rng = np.random.default_rng(seed + ord(position[0]))
            nats = rng.exponential(loss, TOKENS).astype(np.float32)
            total = float(nats.sum(dtype=np.float64))
            made = row(position, perplexity=math.exp(total / TOKENS), seed=seed)
            rows.append(made)
            summaries.append(summarise(nats, documents, made))
            write_run(tmp_path / "runs", made.run, f"steps: {600 if position == 'alibi' else 500}")
    write_rows(folder / "results.jsonl", rows)
    write_summaries(folder / "summary.npz", summaries)
    pair = (f"folder={folder}", "a=alibi_L64_s*", "b=sinusoidal_L64_s*")
    done = run_script("compare_runs.py", *pair)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "A: ALiBi trained at 64 (seeds 1, 2, 3)"
    assert lines[3].split()[:2] in (["64", "YES"], ["64", "NOT"]) and "nats, perplexity x" in lines[3]
    assert lines[4].startswith("NOT A FAIR COMPARISON: steps: ")
    for arguments, message in [
        ((*pair, "strict=true"), "strict = true, and the runs differ in: steps"),
        ((*pair, "lengths=[a]"), "it must be whole numbers"),
        ((*pair, "lengths=64"), "lengths = 64; it must be whole numbers"),
        (pair[:2], "b is missing"),
    ]:
        failed = run_script("compare_runs.py", *arguments)
        assert failed.returncode == 1 and message in failed.stderr and "Traceback" not in failed.stderr
