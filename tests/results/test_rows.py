"""Result rows survive writing and reading, replace by key, and refuse what is not a result row."""

import csv
import json
import math
import os
import subprocess
import sys

import pytest

from alibi_lm.results.rows import FIELDS, ResultRow, perplexity_of, read_rows, upsert_rows, write_csv


def make_row(run="alibi_L64_s1", length=64, at=20.0, **changes):
    values = dict(
        **dict(run=run, position="alibi", train_length=64, seed=1, inference_length=length, corpus="c0ffee"),
        **dict(mode="nonoverlapping", split="validation", tokens=1000, words=800, bytes=4000, commit="abc123"),
        **dict(nats=1000 * math.log(at), perplexity=at, word_perplexity=at**1.25, tokens_per_second=1234.5),
    )
    return ResultRow(**(values | changes))


def make_null_row(**changes):
    values = dict(nats=None, perplexity=None, word_perplexity=None, reason="positions end at 64")
    return make_row(**(values | changes))


def test_rows_come_back_as_they_were(tmp_path):
    rows = [
        make_row(changes={"position.scaling": "yarn"}, run_id="c0ffee", folder="runs/a", extra={"note": "n"}),
        make_null_row(length=128),
        make_row(task="copy", metric="accuracy", mode="items", perplexity=None, value=0.25, n=40),
    ]
    path = tmp_path / "new" / "results.jsonl"
    assert sorted(upsert_rows(path, rows), key=rows.index) == rows
    assert sorted(read_rows(path), key=rows.index) == rows
    (first,) = [one for one in map(json.loads, path.read_text().splitlines()) if "note" in one]
    assert list(first)[: len(FIELDS)] == FIELDS and first["note"] == "n" and first["stride"] is None
    assert [entry.name for entry in path.parent.iterdir() if not entry.name.startswith(".")] == [path.name]


def test_a_row_of_the_same_key_is_replaced_and_others_stay(tmp_path):
    path = tmp_path / "results.jsonl"
    changes = [
        *(dict(length=128), dict(split="test"), dict(run="alibi_L64_s2", seed=2), dict(corpus="deca5e")),
        *(dict(mode="sliding", stride=16), dict(mode="sliding", stride=32), dict(task="copy")),
        *(dict(changes={"position.scaling": name}) for name in ("yarn", "linear")),
        dict(metric="accuracy", perplexity=None, value=0.5, n=10),
    ]
    others = [make_row(**one) for one in changes]
    upsert_rows(path, [make_row(at=20.0), *others])
    rows = upsert_rows(path, [make_row(at=30.0)])
    assert len(rows) == 11
    assert [row.perplexity for row in rows if row.key == make_row().key] == [30.0]


def test_the_file_does_not_depend_on_the_order_of_evaluation(tmp_path):
    rows = [make_row(length=n) for n in (32, 64, 128, 1024)]
    upsert_rows(tmp_path / "a.jsonl", rows)
    for row in reversed(rows):
        upsert_rows(tmp_path / "b.jsonl", [row])
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


def test_rows_of_before_there_were_tasks_are_read_as_text(tmp_path):
    path, row = tmp_path / "results.jsonl", make_row()
    later = ("task", "metric", "value", "n", "changes", "run_id", "folder")
    path.write_text(json.dumps({name: v for name, v in row.to_dict().items() if name not in later}) + "\n")
    (old,) = read_rows(path)
    assert (old.task, old.metric, old.value, old.n, old.changes) == (
        "text",
        "perplexity",
        row.perplexity,
        row.tokens,
        {},
    )
    assert len(upsert_rows(path, [row])) == 1, "the same evaluation of today replaces it"


def test_baselines_have_no_run_and_do_not_replace_each_other(tmp_path):
    blank = dict(run=None, train_length=None, seed=None)
    rows = upsert_rows(
        tmp_path / "results.jsonl",
        [
            make_row(position="unigram", **blank),
            make_row(position="unigram", **blank, corpus="another text", at=30.0),
            make_row(position="uniform", **blank),
            make_row(),
        ],
    )
    assert [(row.position, row.perplexity) for row in rows] == [
        ("alibi", 20), ("uniform", 20), ("unigram", 30), ("unigram", 20),
    ]  # fmt: skip


def test_a_perplexity_too_large_for_a_number_is_null_with_the_reason_and_nats_are_kept(tmp_path):
    assert perplexity_of(2 * math.log(20), 2) == (pytest.approx(20), None)
    assert perplexity_of(709.0 * 3, 3)[0] == pytest.approx(math.exp(709))
    assert perplexity_of(5306 * 3.0, 3) == (None, "exp(5306) is too large for a number")
    assert perplexity_of(math.inf, 3) == (None, "the sum of nats is inf")
    assert perplexity_of(math.nan, 3) == (None, "the sum of nats is nan")
    none = dict(perplexity=None, word_perplexity=None, reason="exp(5306) is too large for a number")
    upsert_rows(tmp_path / "results.jsonl", [make_row(nats=5306e3, **none)])
    (row,) = read_rows(tmp_path / "results.jsonl")
    assert row.loss == 5306 and row.value is None and row.n == 1000


def test_processes_writing_at_once_lose_no_row(tmp_path):
    path = tmp_path / "results.jsonl"
    program = (
        "import json, sys\n"
        "from alibi_lm.results.rows import ResultRow, upsert_rows\n"
        "upsert_rows(sys.argv[1], [ResultRow.from_dict(json.loads(sys.argv[2]))])\n"
    )
    rows = [make_row(run=f"alibi_L64_s{seed}", seed=seed) for seed in range(2)]
    commands = [[sys.executable, "-c", program, str(path), json.dumps(row.to_dict())] for row in rows]
    workers = [subprocess.Popen(command) for command in commands]
    assert [worker.wait(60) for worker in workers] == [0] * 2
    assert read_rows(path) == rows


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(mode="overlapping"), "mode = 'overlapping'; allowed: nonoverlapping, sliding, items"),
        (dict(mode="items", stride=8), "stride = 8 with mode = items; allowed: null"),
        (dict(mode="sliding"), "stride = None with mode = sliding; allowed: 1 to inference_length = 64"),
        (dict(stride=8), "stride = 8 with mode = nonoverlapping; allowed: null"),
        (dict(mode="sliding", stride=65), "stride = 65 with mode = sliding; allowed: 1 to"),
        (dict(nats=None), "nats is null but a perplexity is not"),
        (dict(nats=None, perplexity=None, word_perplexity=None), "perplexity is null without a reason"),
        (dict(nats=None, perplexity=None, reason="r"), "nats is null but a perplexity is not"),
        (dict(perplexity=None), "perplexity is null without a reason"),
        (dict(perplexity=19.0), "perplexity = 19.0"),
        (dict(perplexity=0.0), "perplexity = 0.0"),
        (dict(word_perplexity=20.0), "word_perplexity = 20.0"),
        (dict(value=19.0), "value = 19.0"),
        (dict(n=999), "value = 20.0 of n = 999"),
        (dict(metric="accuracy", value=1.5, n=4), "value = 1.5 of n = 4; an accuracy is 0 to 1"),
        (dict(metric="accuracy", value=0.5), "value = 0.5 of n = None"),
        (dict(metric="accuracy"), "accuracy is null without a reason"),
        (dict(task=""), "task is missing"),
        (dict(changes="yarn"), "changes = 'yarn'; it must be an object"),
        (dict(nats=math.nan), "nats = nan"),
        (dict(nats=math.inf), "nats = inf"),
        (dict(tokens=0), "tokens = 0"),
        (dict(tokens=True), "tokens = True"),
        (dict(seed="1"), "seed = '1'; it must be a whole number or null"),
        (dict(train_length=None), "train_length is null in a row of run"),
        (dict(position=""), "position is missing"),
    ],
)
def test_a_row_that_contradicts_itself_is_refused(changes, message):
    with pytest.raises(ValueError) as error:
        make_row(**changes)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 2"),
        ("[1, 2]", "expected a JSON object, got list"),
        (
            '{"step": 1, "train/loss": 3.0}',
            "no field position, mode, split, tokens; this is not a result row",
        ),
        (json.dumps(make_row().to_dict()).replace("20.0", "NaN"), "NaN is not JSON"),
        (json.dumps(make_row(length=128).to_dict()), "the same evaluation as line 1"),
    ],
)
def test_a_foreign_or_damaged_file_is_named_with_its_line(tmp_path, line, message):
    path = tmp_path / "results.jsonl"
    good = json.dumps(make_row(length=128).to_dict())
    path.write_text(good + "\n" + line + "\n")
    before = path.read_bytes()
    for action in (lambda: read_rows(path), lambda: upsert_rows(path, [make_row()])):
        with pytest.raises(ValueError) as error:
            action()
        assert str(path) in str(error.value) and "line 2" in str(error.value) and message in str(error.value)
    assert path.read_bytes() == before


def test_a_missing_or_binary_file_is_a_clear_error(tmp_path):
    with pytest.raises(ValueError, match="does not exist; evaluate first"):
        read_rows(tmp_path / "results.jsonl")
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"b\.jsonl cannot be read"):
        read_rows(tmp_path / "b.jsonl")
    with pytest.raises(ValueError, match="cannot be read"):
        read_rows(tmp_path)


def test_a_failed_write_leaves_the_old_file_and_no_scraps(tmp_path, monkeypatch):
    path = tmp_path / "results.jsonl"
    upsert_rows(path, [make_row()])
    before = path.read_bytes()

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        upsert_rows(path, [make_row(length=128)])
    assert path.read_bytes() == before
    assert {entry.name for entry in tmp_path.iterdir()} <= {"results.jsonl", ".results.jsonl.lock"}


def test_csv_holds_every_field_and_every_digit(tmp_path):
    rows = [make_row(at=20.123456789012345), make_null_row(length=128, extra={"note": "a, b"})]
    write_csv(tmp_path / "results.csv", rows)
    with (tmp_path / "results.csv").open(newline="") as stream:
        first, second = csv.DictReader(stream)
    assert list(first) == [*FIELDS, "note"]
    assert float(first["perplexity"]) == 20.123456789012345 and first["stride"] == ""
    assert second["nats"] == "" and second["note"] == "a, b" and second["reason"] == "positions end at 64"
