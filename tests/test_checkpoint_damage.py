"""Checkpoints under kills, full disks, damage, and files from strangers that must never run."""

import errno
import hashlib
import json
import logging
import os
import pickle
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import alibi_lm.checkpoint
from alibi_lm.checkpoint import Checkpoint, CheckpointError, CheckpointStore, record_hash


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints")


def trained(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    return model, optimizer


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "bit":
        flipped = bytearray(content)
        flipped[-2] ^= 1
        path.write_bytes(bytes(flipped))
    else:
        path.unlink()


def forge(path: Path, **changes: object) -> None:
    """Rewrites fields of a state.json as somebody would who knows the format, hashes included."""
    record = json.loads((path / "state.json").read_text())
    record.pop("sha256")
    for name in record["files"]:
        content = (path / name).read_bytes()
        record["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    record.update(changes)
    record["sha256"] = record_hash(record)
    (path / "state.json").write_text(json.dumps(record))


# --- damage and kills ----------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["cut", "empty", "bit", "gone"])
@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "state.json"])
def test_damaged_checkpoints_are_reported_and_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, how: str
) -> None:
    store = CheckpointStore(tmp_path, keep_last=3)
    for step in (1, 2, 3):
        store.save(step, *trained(), {})
    store.mark_best(3, {})
    damage(tmp_path / "step-00000003" / name, how)
    with caplog.at_level(logging.WARNING, logger="alibi_lm"):
        latest = store.latest()
    assert latest is not None and latest.step == 2
    assert len(caplog.messages) == 1 and name in caplog.messages[0]
    assert store.best() is None  # never another one under the name of the best
    # Training on from step 2 comes to step 3 again and heals it.
    store.save(3, *trained(), {})
    assert store.get("last").step == 3


def test_torn_newer_checkpoints_never_push_out_a_whole_one(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=2)
    for step in (8, 11):
        store.save(step, *trained(), {})
    damage(tmp_path / "step-00000011" / "weights.safetensors", "cut")
    store.keep_last = 1
    store.save(10, *trained(), {})  # resumed from 8 and asked to stop before 11
    assert store.steps() == [10] and store.get("last").step == 10


def test_pruning_makes_up_for_a_kill(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=3)
    for step in (1, 2, 3):
        store.save(step, *trained(), {})
    (tmp_path / ".tmp-step-00000004").mkdir()
    store.mark_best(1, {})
    damage(tmp_path / "step-00000003" / "weights.safetensors", "cut")
    store.keep_last = 1
    store.prune(2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.json", "step-00000001", "step-00000002"]


def test_one_altered_digit_of_the_state_is_noticed(store: CheckpointStore) -> None:
    path = store.save(1, *trained(), {"best_validation_loss": 2.125})
    text = (path / "state.json").read_text()
    (path / "state.json").write_text(text.replace("2.125", "2.124"))
    with pytest.raises(ValueError, match=r"state\.json was altered after it was written"):
        Checkpoint(path)
    assert store.latest() is None


def test_damaged_best_pointer(store: CheckpointStore, caplog: pytest.LogCaptureFixture) -> None:
    store.save(1, nn.Linear(1, 1), None, {})
    store.mark_best(1, {})
    for content in (b'{"st', b"[]", b"\xff", b'{"step": true}', b'{"step": "../../x"}'):
        (store.folder / "best.json").write_bytes(content)
        assert store.best() is None
        assert store.get("last").step == 1


def test_a_folder_of_another_step_is_refused(store: CheckpointStore) -> None:
    path = store.save(1, nn.Linear(1, 1), None, {})
    path.rename(path.with_name("step-00000900"))
    assert store.latest() is None


@pytest.mark.parametrize("number", range(20))
def test_a_kill_at_any_system_call_leaves_a_whole_checkpoint(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """The process vanishes at the n-th write, sync, rename or removal: no clean-up code runs."""

    class Killed(BaseException):
        pass

    model, optimizer = trained()
    store.save(5, model, optimizer, {"n": 1})
    store.save(6, model, optimizer, {"n": 1})  # the policy removes step 5
    calls = 0

    def dying(function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal calls
            calls += 1
            if calls > number:
                raise Killed
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for module, name in ((os, "rename"), (os, "replace"), (os, "fsync"), (os, "unlink"), (os, "rmdir")):
            patch.setattr(module, name, dying(getattr(module, name)))
        patch.setattr("shutil.rmtree", dying(alibi_lm.checkpoint.shutil.rmtree))
        try:
            for step in (6, 7):
                store.save(step, model, optimizer, {"n": 2})
            died = False
        except Killed:
            died = True
    assert died or calls <= number
    checkpoint = store.get("last")  # always one, and whole
    assert checkpoint.step in (6, 7)
    checkpoint.restore(*trained(seed=4))
    store.save(8, model, optimizer, {})
    assert [path.name for path in store.folder.iterdir()] == ["step-00000008"]


@pytest.mark.parametrize("number", range(3))
def test_disk_full_keeps_the_last_good_checkpoint(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    model, optimizer = trained()
    store.save(1, model, optimizer, {})
    synced = 0

    def full(descriptor: int) -> None:
        nonlocal synced
        synced += 1
        if synced > 2 * number:  # each file and its folder
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match=r"step 2 could not .*No space left.*step 1 is kept") as caught:
            store.save(2, model, optimizer, {})
    assert "Make room" in str(caught.value)
    assert [path.name for path in store.folder.iterdir()] == ["step-00000001"]
    assert store.get("last").step == 1
    assert store.save(2, model, optimizer, {}).is_dir()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("this user may not mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    store = CheckpointStore(small_disk / "checkpoints")
    model = nn.Linear(100, 100)
    store.save(1, model, None, {})
    ballast = nn.Linear(300, 300)
    with pytest.raises(CheckpointError, match=r"No space left.*step 1 is kept"):
        store.save(2, ballast, None, {})
    assert [path.name for path in store.folder.iterdir()] == ["step-00000001"]
    store.get("last").restore(model, None)
    store.save(3, model, None, {})  # room again


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"step 1 could not be written .*There is no earlier checkpoint"):
        CheckpointStore(tmp_path / "file" / "checkpoints").save(1, nn.Linear(1, 1), None, {})


# --- files from strangers ------------------------------------------------------------------------


class Bomb:
    """Creates a file when unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.target}",)


def bombs(tmp_path: Path, target: Path) -> Iterator[bytes]:
    yield pickle.dumps(Bomb(target))
    yield pickle.dumps({"weight": Bomb(target)}, protocol=0)
    for new in (True, False):
        torch.save(
            {"weight": torch.ones(1), "bomb": Bomb(target)},
            tmp_path / "b",
            _use_new_zipfile_serialization=new,
        )
        yield (tmp_path / "b").read_bytes()


def test_disguised_pickles_never_run(store: CheckpointStore, tmp_path: Path) -> None:
    target = tmp_path / "exploded"
    for bomb in bombs(tmp_path, target):
        for name in ("weights.safetensors", "optimizer.safetensors", "state.json"):
            path = store.save(1, *trained(), {})
            (path / name).write_bytes(bomb)
            if name != "state.json":
                forge(path)  # hashes that fit the bomb
            with pytest.raises(ValueError, match=name):
                Checkpoint(path)
            assert store.latest() is None
            (store.folder / "best.json").write_bytes(bomb)
            assert store.best() is None
    assert not target.exists()
    pickle.loads(pickle.dumps(Bomb(target)))
    assert target.exists()  # the bombs are live


@pytest.mark.parametrize(
    "changes",
    [
        {"files": {"../../../secret": {"bytes": 1, "sha256": "0"}, "optimizer.safetensors": {}}},
        {"files": {}}, {"files": []}, {"step": "1"}, {"step": -1.5}, {"state": []}, {"optimizer": "x"},
        {"tied": None}, {"format": 2}, {"tied": {"a": "nowhere"}}, {"optimizer": {}},
        {"optimizer": {"class": "AdamW", "groups": "x"}}, {"optimizer": {"class": "AdamW", "groups": [{}]}},
    ],
    ids=str,
)  # fmt: skip
def test_forged_records_are_refused(store: CheckpointStore, changes: dict[str, object]) -> None:
    path = store.save(1, *trained(), {})
    forge(path, **changes)
    with pytest.raises(ValueError, match=r"state\.json|optimizer\.safetensors"):
        Checkpoint(path).restore(*trained())


def test_forged_optimizer_entries_are_refused(store: CheckpointStore) -> None:
    for key in ("nobody/exp_avg", "plain", "/7/lr", "/x/lr", "/-1/params", "/0/params"):
        path = store.save(1, *trained(), {})
        entries = load_file(path / "optimizer.safetensors")
        save_file(entries | {key: torch.ones(3)}, path / "optimizer.safetensors")
        forge(path)
        with pytest.raises(ValueError, match=r"optimizer\.safetensors has"):
            Checkpoint(path).restore(*trained())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.one_of(
        st.binary(max_size=80),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_subnormal=False) | st.text(max_size=5),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
        ),
        st.tuples(st.integers(0, 2000), st.binary(min_size=1, max_size=4)),
    )
)
def test_any_record_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: object) -> None:
    store = CheckpointStore(tmp_path_factory.getbasetemp() / "fuzz")
    path = store.save(1, nn.Linear(1, 1), None, {"a": 1})
    original = (path / "state.json").read_bytes()
    if isinstance(content, bytes):
        changed = content
    elif isinstance(content, tuple):
        at, piece = content
        changed = original[:at] + piece + original[at + len(piece) :]
    else:
        changed = json.dumps(content).encode()
    (path / "state.json").write_bytes(changed)
    try:
        assert Checkpoint(path).state == {"a": 1}
    except ValueError as error:
        assert "state.json" in str(error)


def test_deep_and_huge_records_are_refused(store: CheckpointStore) -> None:
    path = store.save(1, nn.Linear(1, 1), None, {})
    for text in ("[" * 200_000, '{"step": ' + "9" * 10_000 + "}"):
        (path / "state.json").write_text(text)
        with pytest.raises(ValueError, match="not a JSON file"):
            Checkpoint(path)
