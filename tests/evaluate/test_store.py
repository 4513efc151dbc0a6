"""What is stored is used again exactly as long as it is the result of the same things, and is never half there."""

import dataclasses

import numpy as np
import pytest

from alibi_lm.distributed import World
from alibi_lm.evaluate.score import Scored
from alibi_lm.evaluate.store import Scoring, Stored, TokenStore

WHOLE = Scoring("validation", "nonoverlapping", 16)
NATS = np.array([0.5, 2.0, 1e-7, 11.25], dtype=np.float32)
HITS = np.array([True, False, False, True])
SAME = {"weights": "w"}


@pytest.fixture
def store(tmp_path):
    return TokenStore(tmp_path / "tokens")


def put(store, run="a", scoring=WHOLE, identity=SAME, nats=NATS, hits=None):
    store.write(run, scoring, identity, Stored(nats, hits, 1.5, 100, "c"))


def test_what_is_written_comes_back_bit_for_bit(store):
    put(store, hits=HITS)
    found = store.read("a", WHOLE, SAME, hits=True)
    assert isinstance(found.nats, np.memmap) and found.nats.tobytes() == NATS.tobytes()
    assert found.hits.tolist() == HITS.tolist()
    assert (found.seconds, found.peak_memory_bytes, found.commit) == (1.5, 100, "c")


def test_nats_without_hits_do_not_stand_for_both(store):
    put(store)
    assert store.read("a", WHOLE, SAME).hits is None and store.read("a", WHOLE, SAME, hits=True) is None


@pytest.mark.parametrize(
    "change",
    [{"length": 17}, {"split": "test"}, {"mode": "sliding", "stride": 4}, {"window": 16}, {"task": "copy"}],
)
def test_every_way_of_scoring_has_a_place_of_its_own(store, change):
    put(store)
    other = dataclasses.replace(WHOLE, **change)
    assert store.read("a", other, SAME) is None
    put(store, scoring=other, nats=NATS + 1)
    assert [store.read("a", one, SAME).nats[0] for one in (WHOLE, other)] == [0.5, 1.5]


@pytest.mark.parametrize("other", [{"weights": "v"}, {"weights": "w", "backend": "sdpa"}, {}])
def test_results_of_different_things_lie_side_by_side(store, other):
    put(store)
    assert store.read("a", WHOLE, other) is None
    put(store, identity=other, nats=NATS + 1)
    assert [store.read("a", WHOLE, identity).nats[0] for identity in (SAME, other)] == [0.5, 1.5]


def test_labels_that_are_no_file_names_stay_apart(store):
    labels = ["a+x=b/c", "a+x=b c", "a" * 300, "a" * 299]
    for index, label in enumerate(labels):
        put(store, run=label, nats=NATS + index)
    assert [store.read(label, WHOLE, SAME).nats[0] for label in labels] == [0.5, 1.5, 2.5, 3.5]


DAMAGES = {
    "cut": lambda path, data: path.write_bytes(data[:-4]),
    "flip": lambda path, data: path.write_bytes(b"\1" + data[1:]),
    "longer": lambda path, data: path.write_bytes(data + data),
    "no data": lambda path, data: path.unlink(),
    "no record": lambda path, data: path.with_suffix(".json").unlink(),
    "record": lambda path, data: path.with_suffix(".json").write_text(path.with_suffix(".json").read_text()[:-20]),
    "list": lambda path, data: path.with_suffix(".json").write_text("[]"),
    "nothing": lambda path, data: path.with_suffix(".json").write_text("{}"),
    "hits": lambda path, data: path.with_suffix(".hits").write_bytes(b"\1\1\1\1"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_counts_as_absent(store, damage):
    put(store, hits=HITS)
    path = store.path("a", WHOLE, SAME)
    DAMAGES[damage](path, path.read_bytes())
    assert store.read("a", WHOLE, SAME, hits=True) is None
    put(store, hits=HITS)
    assert store.read("a", WHOLE, SAME, hits=True) is not None


def test_an_interrupted_write_leaves_the_old_result(store, monkeypatch):
    put(store)

    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("alibi_lm.files.os.fsync", fail)
    with pytest.raises(OSError, match="No space"):
        put(store, nats=NATS + 1)
    assert store.read("a", WHOLE, SAME).nats[0] == 0.5
    assert len(list(store.folder.rglob("*.*"))) == 2


def test_get_computes_once(store):
    calls = []

    def compute():
        calls.append(1)
        return Scored(NATS.astype(np.float64), HITS)

    first = store.get("a", WHOLE, SAME, compute, hits=True, memory=lambda: 7)
    second = store.get("a", WHOLE, SAME, compute, hits=True)
    assert len(calls) == 1 and first.nats.tobytes() == second.nats.tobytes() and second.peak_memory_bytes == 7
    store.get("a", WHOLE, {"weights": "v"}, compute)
    assert len(calls) == 2 and store.read("a", WHOLE, SAME) is not None


def test_what_is_not_finite_is_not_kept(store):
    found = store.get("a", WHOLE, {}, lambda: Scored(np.array([1.0, np.inf]), None))
    assert np.isinf(found.nats[1]) and store.read("a", WHOLE, {}) is None


@pytest.mark.parametrize(("others", "computed"), [([True, True], 0), ([True, False], 1)])
def test_processes_compute_unless_all_of_them_have_it(store, monkeypatch, others, computed):
    put(store)
    monkeypatch.setattr("alibi_lm.evaluate.store.gather_objects", lambda value, world: others)
    calls = []
    store.get("a", WHOLE, SAME, lambda: calls.append(1) or Scored(NATS, None), world=World(0, 2, 0))
    assert len(calls) == computed
