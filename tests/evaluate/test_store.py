"""What is stored is used again exactly as long as it is the result of the same things, and is never half there."""

import dataclasses
import shutil
import zipfile

import numpy as np
import pytest

import alibi_lm.evaluate.sweep as sweep
from alibi_lm.attention import chosen_backend
from alibi_lm.config import EvaluateConfig, EvaluateData
from alibi_lm.distributed import World
from alibi_lm.evaluate.store import Scoring, Stored, TokenStore
from alibi_lm.results.documents import (
    curve_edges,
    position_edges,
    positions_in_window,
    read_summaries,
    write_summaries,
)
from alibi_lm.results.rows import read_rows

WHOLE = Scoring("validation", "nonoverlapping", 16)
NATS = np.array([0.5, 2.0, 1e-7, 11.25], dtype=np.float32)


@pytest.fixture
def store(tmp_path):
    return TokenStore(tmp_path / "tokens")


def put(store, run="a", scoring=WHOLE, identity=None, nats=NATS):
    store.write(run, scoring, identity or {"weights": "w"}, Stored(nats, 1.5, 100, "c", False))


def test_what_is_written_comes_back_bit_for_bit(store):
    put(store)
    found = store.read("a", WHOLE, {"weights": "w"})
    assert isinstance(found.nats, np.memmap) and found.nats.tobytes() == NATS.tobytes()
    assert (found.seconds, found.peak_memory_bytes, found.commit, found.reused) == (1.5, 100, "c", True)


@pytest.mark.parametrize("change", [{"weights": "other"}, {"weights": "w", "position": {"scaling": "yarn"}}, {}])
def test_results_of_something_else_are_not_used(store, change):
    put(store)
    assert store.read("a", WHOLE, change) is None


@pytest.mark.parametrize(
    "change", [{"length": 17}, {"split": "test"}, {"mode": "sliding", "stride": 4}, {"window": 16}, {"first": 3}]
)
def test_every_way_of_scoring_has_a_place_of_its_own(store, change):
    put(store)
    other = dataclasses.replace(WHOLE, **change)
    assert store.read("a", other, {"weights": "w"}) is None
    put(store, scoring=other, nats=NATS + 1)
    assert store.read("a", WHOLE, {"weights": "w"}).nats[0] == 0.5
    assert store.read("a", other, {"weights": "w"}).nats[0] == 1.5


def test_labels_that_are_no_file_names_stay_apart(store):
    for index, label in enumerate(["a+x=b/c", "a+x=b c", "a" * 300, "a" * 299]):
        put(store, run=label, nats=NATS + index)
    for index, label in enumerate(["a+x=b/c", "a+x=b c", "a" * 300, "a" * 299]):
        assert store.read(label, WHOLE, {"weights": "w"}).nats[0] == 0.5 + index


@pytest.mark.parametrize("damage", ["cut", "flip", "longer", "no data", "no record", "record", "list"])
def test_damage_counts_as_absent(store, damage):
    put(store)
    path = store.path("a", WHOLE)
    record = path.with_suffix(".json")
    data = path.read_bytes()
    if damage == "cut":
        path.write_bytes(data[:-4])
    elif damage == "flip":
        path.write_bytes(b"\1" + data[1:])
    elif damage == "longer":
        path.write_bytes(data + data)
    elif damage == "no data":
        path.unlink()
    elif damage == "no record":
        record.unlink()
    elif damage == "record":
        record.write_text(record.read_text()[:-20])
    else:
        record.write_text("[]")
    assert store.read("a", WHOLE, {"weights": "w"}) is None
    put(store)
    assert store.read("a", WHOLE, {"weights": "w"}) is not None


def test_an_interrupted_write_leaves_the_old_result(store, monkeypatch):
    put(store)

    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("alibi_lm.files.os.fsync", fail)
    with pytest.raises(OSError, match="No space"):
        put(store, nats=NATS + 1)
    assert store.read("a", WHOLE, {"weights": "w"}).nats[0] == 0.5
    assert len(list(store.folder.rglob("*.*"))) == 2


def test_get_computes_once(store):
    calls = []

    def compute():
        calls.append(1)
        return NATS.astype(np.float64)

    first = store.get("a", WHOLE, {"weights": "w"}, compute, lambda: 7)
    second = store.get("a", WHOLE, {"weights": "w"}, compute)
    assert len(calls) == 1 and not first.reused and second.reused
    assert first.nats.tobytes() == second.nats.tobytes() and second.peak_memory_bytes == 7
    store.get("a", WHOLE, {"weights": "v"}, compute)
    assert len(calls) == 2 and store.read("a", WHOLE, {"weights": "w"}) is None


def test_what_is_not_finite_is_not_kept(store):
    found = store.get("a", WHOLE, {}, lambda: np.array([1.0, np.inf]))
    assert np.isinf(found.nats[1]) and store.read("a", WHOLE, {}) is None


@pytest.mark.parametrize(("others", "computed"), [([True, True], 0), ([True, False], 1)])
def test_processes_compute_unless_all_of_them_have_it(store, monkeypatch, others, computed):
    put(store)
    monkeypatch.setattr("alibi_lm.evaluate.store.gather_objects", lambda value, world: others)
    calls = []
    store.get("a", WHOLE, {"weights": "w"}, lambda: calls.append(1) or NATS, world=World(0, 2, 0))
    assert len(calls) == computed


# --- a whole evaluation --------------------------------------------------------------------------


@pytest.fixture
def place(trained_runs, tmp_path, monkeypatch):
    shutil.copytree(trained_runs / "outputs", tmp_path / "outputs")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "outputs" / "smoke"


@pytest.fixture
def passes(monkeypatch):
    """Labels of the passes that are really made."""
    made = []

    def record(*arguments, original=sweep.score_tokens, **more):
        made.append(more["progress"])
        return original(*arguments, **more)

    monkeypatch.setattr(sweep, "score_tokens", record)
    return made


def evaluate(**settings):
    config = EvaluateConfig(experiment="smoke", device="cpu", threads=1, **settings)
    return [row for row in sweep.evaluate(config, World()) if row.run is not None]


def test_a_second_evaluation_gives_the_same_rows_without_a_model(place, passes):
    first = evaluate(lengths=[8, 16])
    assert len(passes) == 5  # two seeds of alibi at two lengths; learned has one
    before = (place / "extrapolation" / "summary.npz").read_bytes()
    assert evaluate(lengths=[8, 16]) == first and len(passes) == 5
    assert (place / "extrapolation" / "summary.npz").read_bytes() == before
    evaluate(lengths=[8], stride=4, mode="sliding")
    assert len(passes) == 8


def test_another_checkpoint_is_evaluated_anew(place, passes):
    first = {row.run: row.nats for row in evaluate(lengths=[8])}
    source, target = (place / "runs" / f"alibi_L8_s{k}" / "checkpoints" for k in (2, 1))
    shutil.rmtree(target)
    shutil.copytree(source, target)
    passes.clear()
    second = {row.run: row.nats for row in evaluate(lengths=[8])}
    assert passes == ["alibi_L8_s1 @ 8"]
    assert second["alibi_L8_s1"] == second["alibi_L8_s2"] == first["alibi_L8_s2"] != first["alibi_L8_s1"]


def test_another_text_is_evaluated_anew(place, passes, tmp_path):
    first = evaluate(lengths=[8])
    text = tmp_path / "text"
    text.mkdir()
    (text / "wiki.valid.tokens").write_text(" \n = A = \n \n w1 w2 w3 \n \n = B = \n \n w4 w5 w6 \n")
    second = evaluate(lengths=[8], data=EvaluateData(path=str(text), cache_dir=str(tmp_path / "cache")))
    assert len(passes) == 6 and second[0].tokens < first[0].tokens


def test_precision_and_settings_of_the_run_count(place, passes):
    evaluate(lengths=[8])
    evaluate(lengths=[8], precision="bfloat16")
    assert len(passes) == 6
    config = place / "runs" / "alibi_L8_s1" / "config.yaml"
    text = config.read_text()
    assert "num_heads: 2" in text
    config.write_text(text.replace("num_heads: 2", "num_heads: 4"))
    evaluate(lengths=[8], precision="bfloat16")
    assert passes[6:] == ["alibi_L8_s1 @ 8"]


# --- the summary ---------------------------------------------------------------------------------


def test_the_summary_has_an_entry_for_every_value_and_agrees_with_its_row(place):
    evaluate(lengths=[8, 16])
    evaluate(lengths=[8], stride=4, mode="sliding")
    rows = [
        row for row in read_rows(place / "extrapolation" / "results.jsonl") if row.run and row.nats is not None
    ]
    summaries = read_summaries(place / "extrapolation" / "summary.npz")
    assert set(summaries) == {row.key for row in rows} and len(rows) == 8
    for row in rows:
        assert {
            "checkpoint": "best",
            "attention": chosen_backend("auto"),
            "precision": "float32",
        }.items() <= row.extra.items()
        summary = summaries[row.key]
        assert summary.nats == pytest.approx(row.nats, rel=1e-12)
        assert summary.document_tokens.sum() == summary.position_tokens.sum() == row.tokens
        seen = summary.position_tokens > 0
        total = (summary.position_nats[seen] * summary.position_tokens[seen]).sum()
        assert total == pytest.approx(row.nats, rel=1e-5)
        widths = summary.curve_last - summary.curve_first + 1
        assert widths.sum() == seen.sum()
        if row.mode == "nonoverlapping":
            assert (summary.curve_low < summary.curve_nats).all()
        else:  # one target in the whole stream has so short a context: no interval
            assert summary.position_tokens[:4].tolist() == [1, 1, 1, 1] and np.isnan(summary.curve_low[:4]).all()


def test_positions_count_the_tokens_that_a_target_is_predicted_from():
    assert positions_in_window(7, 3).tolist() == [1, 2, 3, 1, 2, 3, 1]
    assert positions_in_window(7, 4, 2).tolist() == [1, 2, 3, 4, 3, 4, 3]
    assert positions_in_window(6, 4, 1).tolist() == [1, 2, 3, 4, 4, 4]


def test_positions_are_single_up_to_2048_and_binned_beyond():
    assert position_edges(5).tolist() == [1, 2, 3, 4, 5, 6]
    edges = position_edges(2200)
    assert edges[:2048].tolist() == list(range(1, 2049)) and edges[2048:].tolist() == [2049, 2113, 2177, 2201]
    assert len(position_edges(16384)) < 2300


@pytest.mark.parametrize(("length", "trained"), [(5, 8), (8, 8), (100, 8), (3, 100), (1, 1), (16384, 512)])
def test_bins_of_the_curve_cover_the_window_and_end_at_the_trained_length(length, trained):
    edges = curve_edges(length, trained)
    assert edges[0] == 1 and edges[-1] == length + 1 and (np.diff(edges) > 0).all()
    assert length <= trained or trained + 1 in edges
    assert (np.diff(edges) <= np.maximum(1, 0.2 * edges[:-1] + 1)).all()


def test_a_damaged_summary_is_named(place, tmp_path):
    evaluate(lengths=[8])
    path = place / "extrapolation" / "summary.npz"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"summary\.npz is damaged .*Delete it"):
        read_summaries(path)
    with pytest.raises(ValueError, match="does not exist"):
        read_summaries(tmp_path / "none.npz")
    with zipfile.ZipFile(path, "w") as archive:  # an object array could run code when it is read
        with archive.open("index.npy", "w") as out:
            np.lib.format.write_array(out, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="damaged"):
        read_summaries(path)


def test_summaries_survive_writing_in_any_order(place, tmp_path):
    evaluate(lengths=[8, 16])
    summaries = read_summaries(place / "extrapolation" / "summary.npz")
    write_summaries(tmp_path / "again.npz", reversed(summaries.values()))
    assert (tmp_path / "again.npz").read_bytes() == (place / "extrapolation" / "summary.npz").read_bytes()
