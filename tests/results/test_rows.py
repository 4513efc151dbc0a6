"""Result rows survive writing and reading, replace by key, and refuse what is not a result row."""

import csv
import json
import math
import os
import subprocess
import sys

import pytest

from alibi_lm.results.rows import FIELDS, ResultRow, read_rows, upsert_rows, write_csv


def make_row(run="alibi_L64_s1", length=64, value=20.0, **changes):
    values = dict(
        run=run,
        position="alibi",
        train_length=64,
        seed=1,
        inference_length=length,
        mode="nonoverlapping",
        stride=None,
        split="validation",
        corpus="c0ffee",
        tokens=1000,
        words=800,
        bytes=4000,
        nats=1000 * math.log(value),
        perplexity=value,
        word_perplexity=value**1.25,
        tokens_per_second=1234.5,
        peak_memory_bytes=10_000,
        commit="abc123",
        reason=None,
    )
    return ResultRow(**(values | changes))


def make_null_row(**changes):
    values = dict(nats=None, perplexity=None, word_perplexity=None, reason="positions end at 64")
    return make_row(**(values | changes))


def test_rows_come_back_as_they_were(tmp_path):
    rows = [make_row(extra={"overrides": ["position.scaling=yarn"], "note": "n"}), make_null_row(length=128)]
    path = tmp_path / "new" / "results.jsonl"
    assert upsert_rows(path, rows) == rows
    assert read_rows(path) == rows
    first = json.loads(path.read_text().splitlines()[0])
    assert list(first)[: len(FIELDS)] == FIELDS and first["note"] == "n" and first["stride"] is None
    assert [entry.name for entry in path.parent.iterdir() if not entry.name.startswith(".")] == [path.name]


def test_a_row_of_the_same_key_is_replaced_and_others_stay(tmp_path):
    path = tmp_path / "results.jsonl"
    others = [
        make_row(length=128),
        make_row(split="test"),
        make_row(run="alibi_L64_s2", seed=2),
        make_row(mode="sliding", stride=16),
        make_row(mode="sliding", stride=32),
    ]
    upsert_rows(path, [make_row(value=20.0), *others])
    rows = upsert_rows(path, [make_row(value=30.0)])
    assert len(rows) == 6
    assert [row.perplexity for row in rows if row.key == make_row().key] == [30.0]


def test_the_file_does_not_depend_on_the_order_of_evaluation(tmp_path):
    rows = [make_row(length=n) for n in (32, 64, 128, 1024)]
    upsert_rows(tmp_path / "a.jsonl", rows)
    for row in reversed(rows):
        upsert_rows(tmp_path / "b.jsonl", [row])
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


def test_baselines_have_no_run_and_do_not_replace_each_other(tmp_path):
    blank = dict(run=None, train_length=None, seed=None)
    rows = upsert_rows(
        tmp_path / "results.jsonl",
        [make_row(position="unigram", **blank), make_row(position="uniform", **blank), make_row()],
    )
    assert [row.position for row in rows] == ["alibi", "uniform", "unigram"]


def test_processes_writing_at_once_lose_no_row(tmp_path):
    path = tmp_path / "results.jsonl"
    program = (
        "import json, sys\n"
        "from alibi_lm.results.rows import ResultRow, upsert_rows\n"
        "upsert_rows(sys.argv[1], [ResultRow.from_dict(json.loads(sys.argv[2]))])\n"
    )
    rows = [make_row(run=f"alibi_L64_s{seed}", seed=seed) for seed in range(4)]
    commands = [[sys.executable, "-c", program, str(path), json.dumps(row.to_dict())] for row in rows]
    workers = [subprocess.Popen(command) for command in commands]
    assert [worker.wait(60) for worker in workers] == [0] * 4
    assert read_rows(path) == rows


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(mode="overlapping"), "mode = 'overlapping'; allowed: nonoverlapping, sliding"),
        (dict(mode="sliding"), "stride is null with mode = sliding"),
        (dict(stride=8), "stride = 8 with mode = nonoverlapping"),
        (dict(mode="sliding", stride=65), "stride = 65; allowed: 1 to inference_length = 64"),
        (dict(nats=None), "nats is null but a perplexity is not"),
        (dict(nats=None, perplexity=None, word_perplexity=None), "without a reason"),
        (dict(perplexity=19.0), "perplexity = 19.0"),
        (dict(perplexity=0.0), "perplexity = 0.0"),
        (dict(word_perplexity=20.0), "word_perplexity = 20.0"),
        (dict(perplexity=None), "perplexity is null but nats is not"),
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
        ("\x00\x01", "line 2"),
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
    rows = [make_row(value=20.123456789012345), make_null_row(length=128, extra={"note": "a, b"})]
    write_csv(tmp_path / "results.csv", rows)
    with (tmp_path / "results.csv").open(newline="") as stream:
        first, second = csv.DictReader(stream)
    assert list(first) == [*FIELDS, "note"]
    assert float(first["perplexity"]) == 20.123456789012345 and first["stride"] == ""
    assert second["nats"] == "" and second["note"] == "a, b" and second["reason"] == "positions end at 64"
