"""Checkpoints: exact round trips, strict loading, what is kept; kills, full disks, damage, malice."""

import copy
import errno
import hashlib
import json
import logging
import os
import pickle
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import alibi_lm.checkpoint
from alibi_lm.checkpoint import Checkpoint, CheckpointError, CheckpointStore, record_hash

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
    torch.int8, torch.uint8, torch.bool,
]  # fmt: skip


class TiedModel(nn.Module):
    """Embedding and output share one tensor, as in a language model with tied output."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, width)
        self.hidden = nn.Linear(width, width)
        self.output = nn.Linear(width, 7, bias=False)
        self.output.weight = self.embed.weight
        self.register_buffer("seen", torch.tensor(3))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.output(torch.tanh(self.hidden(self.embed(ids))))


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints")


def trained(seed: int = 0, steps: int = 3) -> tuple[TiedModel, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = TiedModel()
    decay = [model.hidden.weight, model.embed.weight]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": [model.hidden.bias], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95))
    train_on(model, optimizer, steps)
    return model, optimizer


def train_on(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        ids = torch.arange(6).roll(step)
        nn.functional.cross_entropy(model(ids), (ids + 1) % 7).backward()
        optimizer.step()
        optimizer.zero_grad()


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return (
        left.dtype == right.dtype
        and left.shape == right.shape
        and left.contiguous().view(-1).view(torch.uint8).equal(right.contiguous().view(-1).view(torch.uint8))
    )


# --- round trips ---------------------------------------------------------------------------------


def test_training_goes_on_bit_for_bit(store: CheckpointStore) -> None:
    model, optimizer = trained(steps=3)
    store.save(3, model, optimizer, {})
    train_on(model, optimizer, 4)

    resumed, resumed_optimizer = trained(seed=9, steps=1)
    checkpoint = store.find("last")
    assert checkpoint is not None and checkpoint.step == 3
    checkpoint.restore(resumed, resumed_optimizer)
    train_on(resumed, resumed_optimizer, 4)

    for name, tensor in model.state_dict().items():
        assert same_bits(tensor, resumed.state_dict()[name]), name
    left, right = optimizer.state_dict(), resumed_optimizer.state_dict()
    assert left["param_groups"] == right["param_groups"]
    for index, entries in left["state"].items():
        for entry, tensor in entries.items():
            assert same_bits(tensor, right["state"][index][entry]), (index, entry)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_of_every_dtype_survives(store: CheckpointStore, dtype: torch.dtype) -> None:
    size = torch.empty((), dtype=dtype).element_size()
    high = 2 if dtype is torch.bool else 256
    bits = np.random.default_rng(0).integers(0, high, (6 * size,), dtype=np.uint8)
    tensor = torch.from_numpy(bits).view(dtype).reshape(2, 3)  # for floats with NaN payloads and subnormals
    model = nn.Module()
    for name, value in {
        "whole": tensor, "scalar": tensor[0, 0].clone(), "empty": tensor[:0], "turned": tensor.t(),
        "slice": tensor[:, 1:],
    }.items():  # fmt: skip
        model.register_buffer(name, value)
    store.save(1, model, None, {})
    checkpoint = store.find("last")
    assert checkpoint is not None
    weights = checkpoint.load_weights()
    for name, value in model.state_dict().items():
        assert same_bits(value, weights[name]), name


def test_state_comes_back_as_it_was(store: CheckpointStore) -> None:
    state = {"loss": 0.1 + 0.2, "tiny": 5e-324, "none": None, "list": [1, 2.5], "nested": {"word": "\u00e9"}}
    store.save(1, nn.Linear(1, 1), None, state)
    assert store.get("last").state == state


def test_state_that_json_cannot_hold_is_refused_and_leaves_nothing(store: CheckpointStore) -> None:
    with pytest.raises(TypeError, match="PosixPath is not JSON"):
        store.save(1, nn.Linear(1, 1), None, {"path": Path(".")})
    assert list(store.folder.iterdir()) == []


def test_tied_weights_are_stored_once(store: CheckpointStore) -> None:
    model, _ = trained()
    path = store.save(1, model, None, {})
    assert sorted(load_file(path / "weights.safetensors")) == [
        "embed.weight", "hidden.bias", "hidden.weight", "seen"
    ]  # fmt: skip
    weights = Checkpoint(path).load_weights()
    assert weights["output.weight"] is weights["embed.weight"]
    fresh = TiedModel()
    Checkpoint(path).load_into(fresh)
    assert fresh.output.weight is fresh.embed.weight
    assert same_bits(fresh.output.weight, model.output.weight)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", [{}, {"fused": True}, {"capturable": True}], ids=str)
def test_state_of_a_gpu_goes_where_it_was(store: CheckpointStore, options: dict[str, bool]) -> None:
    def made() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Linear(3, 2).cuda()
        optimizer = torch.optim.AdamW(model.parameters(), **options)  # type: ignore[arg-type]
        model(torch.ones(3, device="cuda")).sum().backward()
        optimizer.step()
        return model, optimizer

    model, optimizer = made()
    path = store.save(1, model, optimizer, {})
    again, restored = made()
    Checkpoint(path).restore(again, restored)
    for left, right in zip(model.parameters(), again.parameters(), strict=True):
        assert same_bits(left.cpu(), right.cpu())
        for entry, tensor in optimizer.state[left].items():
            assert restored.state[right][entry].device == tensor.device, entry
            assert same_bits(restored.state[right][entry].cpu(), tensor.cpu()), entry


# --- strictness ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            lambda: nn.Linear(4, 4),
            r"lacks bias, weight and has embed.weight, .* 1 more that the model has not",
        ),
        (lambda: TiedModel(width=5), r"embed.weight is \(7, 4\) torch.float32, the model's is \(7, 5\)"),
        (lambda: TiedModel().double(), "torch.float32, the model's is .* torch.float64"),
    ],
)
def test_weights_that_do_not_fit(store: CheckpointStore, other: Callable[[], nn.Module], message: str) -> None:
    model, _ = trained()
    path = store.save(1, model, None, {})
    target = other()
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(ValueError, match=message) as caught:
        Checkpoint(path).restore(target, None)
    assert str(path / "weights.safetensors") in str(caught.value)
    assert all(same_bits(before[name], tensor) for name, tensor in target.state_dict().items())


def test_optimizers_that_do_not_fit(store: CheckpointStore) -> None:
    model, optimizer = trained()
    path = store.save(1, model, optimizer, {})
    one_group = torch.optim.AdamW(model.parameters())
    other_kind = torch.optim.SGD([{"params": group["params"]} for group in optimizer.param_groups], lr=0.1)
    for wrong in (one_group, other_kind):
        with pytest.raises(ValueError, match=r"optimizer.safetensors is the state of AdamW over"):
            Checkpoint(path).restore(model, wrong)
    weights_only = store.save(2, model, None, {})
    with pytest.raises(ValueError, match=r"no optimizer state\. It can be evaluated"):
        Checkpoint(weights_only).restore(model, optimizer)


def test_evaluation_casts_to_the_model(store: CheckpointStore) -> None:
    model, _ = trained()
    path = store.save(1, model, None, {})
    double = TiedModel().double()
    Checkpoint(path).load_into(double)
    assert double.embed.weight.dtype == torch.float64
    assert torch.equal(double.embed.weight.float(), model.embed.weight)


# --- policy --------------------------------------------------------------------------------------


def test_policy_keeps_the_newest_every_so_many_and_the_best(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=2, keep_every=40)
    model = nn.Linear(1, 1)
    for step in range(10, 110, 10):
        store.save(step, model, None, {})
        if step == 50:
            store.mark_best(step, {"validation_loss": 1.5})
    assert store.steps() == [40, 50, 80, 90, 100]
    best, last = store.get("best"), store.get("last")
    assert (best.step, last.step) == (50, 100)
    assert json.loads((tmp_path / "best.json").read_text()) == {"step": 50, "validation_loss": 1.5}


def test_nothing_there(store: CheckpointStore) -> None:
    assert store.find("last") is None and store.find("best") is None and store.steps() == []
    for which in ("best", "last"):
        with pytest.raises(ValueError, match=f"checkpoint = {which}: .*checkpoints holds no whole"):
            store.get(which)
    with pytest.raises(ValueError, match=r"checkpoint = 'first' is not known\. Use best, last or step"):
        store.get("first")
    store.save(1, nn.Linear(1, 1), None, {})
    with pytest.raises(ValueError, match="Use checkpoint=last"):
        store.get("best")


def test_saving_a_step_again_replaces_it(store: CheckpointStore) -> None:
    store.save(5, nn.Linear(1, 1), None, {"try": 1})
    store.save(5, nn.Linear(1, 1), None, {"try": 2})
    assert store.get("last").state == {"try": 2}
    assert [path.name for path in store.folder.iterdir()] == ["step-00000005"]


# --- damage and kills ----------------------------------------------------------------------------


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


@pytest.mark.parametrize("how", ["cut", "empty", "bit", "gone"])
@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "state.json"])
def test_damaged_checkpoints_are_reported_and_skipped(
    tmp_path: Path, logged: list[logging.LogRecord], name: str, how: str
) -> None:
    store = CheckpointStore(tmp_path, keep_last=3)
    for step in (1, 2, 3):
        store.save(step, *trained(), {})
    store.mark_best(3, {})
    damage(tmp_path / "step-00000003" / name, how)
    latest = store.find("last")
    assert latest is not None and latest.step == 2
    (record,) = logged
    assert record.levelname == "WARNING" and name in record.getMessage()
    assert store.find("best") is None  # never another one under the name of the best
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
    assert store.find("last") is None


def test_a_folder_of_another_step_is_refused(store: CheckpointStore) -> None:
    path = store.save(1, nn.Linear(1, 1), None, {})
    path.rename(path.with_name("step-00000900"))
    assert store.find("last") is None


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
            assert store.find("last") is None
            (store.folder / "best.json").write_bytes(bomb)
            assert store.find("best") is None
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
    for key in ("nobody/exp_avg", "plain", "/7/lr"):
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
