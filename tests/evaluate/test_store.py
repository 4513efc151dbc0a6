"""What is stored is used again exactly as long as it is the result of the same things, and is never half there."""

import dataclasses

import numpy as np
import pytest
import torch
from toy_models import Toy

from alibi_lm.distributed import World
from alibi_lm.evaluate.passes import Passes
from alibi_lm.evaluate.store import Scoring, Stored, TokenStore
from alibi_lm.tasks.text import TextTask

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
    [
        *({"length": 17}, {"split": "test"}, {"mode": "sliding", "stride": 4}, {"window": 16}, {"task": "copy"}),
        *({"weights": "v"}, {"backend": "sdpa"}),
    ],
)
def test_every_way_of_scoring_and_every_model_has_a_place_of_its_own(store, change):
    put(store)
    ways = {name: value for name, value in change.items() if hasattr(WHOLE, name)}
    other = dataclasses.replace(WHOLE, **ways), SAME if ways else SAME | change
    assert store.read("a", *other) is None
    put(store, scoring=other[0], identity=other[1], nats=NATS + 1)
    assert [store.read("a", *one).nats[0] for one in ((WHOLE, SAME), other)] == [0.5, 1.5]


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


class Counting(Toy):
    """Gives each target the same nats, and counts its passes."""

    def __init__(self, each=1.0, identity="weights 1"):
        super().__init__(each=each, identity=identity, label="counting")

    def nats(self, inputs, targets, positions, window):
        return torch.full(targets.shape, self.each, dtype=torch.float64)


def scored(store, model, **more):
    return Passes(model, TextTask(np.arange(40) % 8, 7), store, **more).result(16)


def test_a_pass_is_made_once_for_each_model(store):
    model, other = Counting(), Counting(2.0, "weights 2")
    first, second = scored(store, model), scored(store, model)
    assert (
        len(model.served) == 1
        and first.nats.tobytes() == second.nats.tobytes()
        and first.seconds == second.seconds
    )
    assert scored(store, other).nats[0] == 2 and scored(store, model).nats[0] == 1 and len(other.served) == 1


@pytest.mark.parametrize(("nats", "identity"), [(np.inf, "weights 1"), (1.0, "")])
def test_what_is_not_finite_or_of_an_unknown_model_is_not_kept(store, nats, identity):
    model = Counting(nats, identity)
    assert [scored(store, model).nats[0] for _ in range(2)] == [nats, nats] and len(model.served) == 2
    assert not store.folder.exists()


@pytest.mark.parametrize(("others", "made"), [([True, True], 1), ([True, False], 2)])
def test_processes_make_a_pass_unless_all_of_them_have_it(store, monkeypatch, others, made):
    model = Counting()
    scored(store, model)
    monkeypatch.setattr("alibi_lm.evaluate.passes.gather_objects", lambda value, world: others)
    monkeypatch.setattr("alibi_lm.evaluate.score.all_reduce_sum", lambda tensor, world: tensor)
    monkeypatch.setattr(TextTask, "batches", lambda self, *_, batches=TextTask.batches: batches(self, *_[:2]))
    scored(store, model, world=World(0, 2, 0))
    assert len(model.served) == made
