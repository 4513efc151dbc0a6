"""Comparing runs answers yes, no or not settled, and refuses to compare what is not comparable."""

import numpy as np
import pytest
from study_rows import accuracy, row, run_script, scored, write_run

from alibi_lm.results.curves import View
from alibi_lm.results.documents import upsert_documents
from alibi_lm.results.rows import write_rows
from alibi_lm.results.statistics import paired_difference
from alibi_lm.study.compare import answer_at, common_lengths, is_better, select, title

PLAIN = View("validation", "nonoverlapping")


def compared(losses_a, losses_b, **changes):
    a, first = scored("alibi", losses_a, **changes)
    b, second = scored("sinusoidal", losses_b, **changes)
    lengths = common_lengths(a, b)
    return [answer_at(a, b, first | second, n, len(lengths)) for n in lengths], is_better(
        a, b, first | second, lengths
    )


def test_yes_no_and_not_settled():
    found, lines = compared({64: 3.0, 128: 3.2, 256: 3.1}, {64: 3.05, 128: 3.1, 256: 3.1})
    assert [answer for answer, _, _ in found] == ["YES", "NO", "NOT SETTLED"]
    assert found[0][1].high < 0 < found[1][1].low
    assert "+0.0950 [" in lines[1] and "perplexity x 1.100 [" in lines[1]
    assert "times the text would settle it" in lines[2]


def test_the_interval_is_the_paired_one_widened_for_the_lengths_asked():
    losses = {64: 3.0, 128: 3.0}
    (a, first), (b, second) = scored("alibi", losses), scored("t5", losses)
    _, found, _ = answer_at(a, b, first | second, 64, 2)
    sums = [np.stack([s[r.key].nats for r in rows if r.inference_length == 64])
            for rows, s in ((a, first), (b, second))]  # fmt: skip
    expected = paired_difference(*sums, first[a[0].key].tokens, (1, 2, 3), (1, 2, 3), comparisons=2)
    assert (found.estimate, found.low, found.high) == (expected.estimate, expected.low, expected.high)
    assert answer_at(a, b, first | second, 64, 1)[1].high < found.high


def test_one_seed_settles_nothing():
    ((answer, _, note),), _ = compared({64: 3.0}, {64: 4.0}, seeds=(1,))
    assert answer == "NOT SETTLED" and "one seed" in note


def test_what_cannot_be_compared_says_why():
    a, first = scored("alibi", {64: 3.0, 128: 3.0})
    b, second = scored("learned", {64: 3.0})
    refused = [row("learned", 128, None, seed=seed) for seed in (1, 2, 3)]
    both = first | second
    assert answer_at(a, [*b, *refused], both, 128, 3) == ("NOT RUN", None, "B has no value: positions end at 64")
    assert answer_at(a, b, both, 256, 3)[2] == "A has no value: not evaluated there"
    # without sums per document the seeds alone decide, and that is said
    assert answer_at(a, b, first, 64, 1)[2].startswith("3 seeds, paired; no sums per document")
    other, third = scored("learned", {64: 3.0}, corpus="facade")
    with pytest.raises(ValueError, match=r"different texts at length 64 \(c0ffee, facade\)"):
        answer_at(a, other, first | third, 64, 1)


def test_more_is_better_where_the_metric_says_so():
    a = [accuracy("alibi", 64, v, seed=s) for s, v in ((1, 0.9), (2, 0.91), (3, 0.89))]
    b = [accuracy("t5", 64, v, seed=s) for s, v in ((1, 0.5), (2, 0.52), (3, 0.49))]
    assert answer_at(a, b, {}, 64, 1)[0] == "YES" and answer_at(b, a, {}, 64, 1)[0] == "NO"
    (line,) = is_better(a, b, {}, [64])
    assert "+0.3967 [" in line and "accuracy" in line and "perplexity" not in line


def test_patterns_must_mean_seeds_of_one_kind():
    rows = [row(), row(seed=2), row(seed=2, suffix="_0f3a9c21"), row("t5"), row(mode="sliding", stride=4)]
    assert [r.seed for r in select(rows, "alibi_L64_s?", PLAIN, "a")] == [1, 2]
    assert len(select(rows, "outputs/quick/runs/t5_L64_s*", PLAIN, "a")) == 1
    assert title(select(rows, "alibi_L64_s?", PLAIN, "a")) == "ALiBi trained at 64 (seeds 1, 2)"
    assert title(select(rows, "t5_L64_s*", PLAIN, "a")) == "T5 bias trained at 64 (seed 1)"
    with pytest.raises(
        ValueError, match=r"a = \*_L64_s1 means runs that are not seeds of each other .alibi L=64, t5 L=64"
    ):
        select(rows, "*_L64_s1", PLAIN, "a")
    with pytest.raises(ValueError, match="other settings"):
        select(rows, "alibi*", PLAIN, "a")
    with pytest.raises(ValueError, match="runs here: alibi_L64_s1"):
        select(rows, "rotary*", PLAIN, "b")
    with pytest.raises(ValueError, match="its runs have validation, nonoverlapping windows only"):
        select(rows, "t5*", View("test", "nonoverlapping"), "b")


def test_the_script_reads_documents_marks_unfairness_and_refuses_mistakes(tmp_path):
    folder = tmp_path / "extrapolation"
    a, first = scored("alibi", {64: 3.0})
    b, second = scored("sinusoidal", {64: 3.1})
    for made in (*a, *b):
        write_run(tmp_path / "runs", made.run, f"steps: {600 if made in a else 500}")
    folder.mkdir()
    write_rows(folder / "results.jsonl", [*a, *b])
    upsert_documents(folder / "documents.jsonl", [*first.values(), *second.values()])
    pair = (f"folder={folder}", "a=alibi_L64_s*", "b=sinusoidal_L64_s*")
    done = run_script("compare_runs.py", *pair)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "A: ALiBi trained at 64 (seeds 1, 2, 3)"
    assert lines[3].split()[:2] == ["64", "YES"] and "3 seeds and 40 documents" in lines[3]
    assert lines[4].startswith("NOT A FAIR COMPARISON: steps: ")
    for arguments, message in [
        ((*pair, "strict=true"), "strict = true, and the runs differ in more than the scheme:"),
        ((*pair, "strict=true"), "steps: "),
        ((*pair, "lengths=[a]"), "lengths = [a]"),
        ((*pair, "lengths=[0]"), "lengths = [0]. Use whole numbers"),
        (pair[:2], "missing: b=..."),
    ]:
        failed = run_script("compare_runs.py", *arguments)
        assert failed.returncode == 1 and message in failed.stderr and "Traceback" not in failed.stderr
