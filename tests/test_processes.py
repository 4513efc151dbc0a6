"""Process groups: shares, sums and gradients of two processes against one."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from alibi_lm import distributed
from alibi_lm.distributed import World, all_reduce_sum, barrier, gather_objects, shard

ROOT = Path(__file__).resolve().parent.parent
TWO_PROCESSES = (
    f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
"""
    + """
import torch
from torch import nn
from alibi_lm import distributed
from two_process_driver import become_two

become_two()

def model_and_data():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    model.unused = nn.Linear(2, 2).double()                      # no gradient on any process
    model.one_sided = nn.Linear(5, 3).double()                   # gradient on process 1 only
    model.single = nn.Parameter(torch.ones(3))                     # another dtype
    model.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    return model, torch.randn(9, 5, dtype=torch.float64).mul(4).round().div(4)  # sums in float32 are exact

def backward(model, rows, one_sided):
    loss = (model[2](model[1](model[0](rows))) ** 2).sum() + (model.single * rows[:, :3].float()).sum()
    if one_sided:
        loss = loss + model.one_sided(rows[-1]).sum()
    loss.backward()

for attempt in range(5):                                          # several runs in one process, as in a multirun
    world = distributed.start("cpu")
    assert world.world_size == 2 and world.is_main == (world.rank == 0)

    reference, data = model_and_data()
    backward(reference, data, True)
    for bucket_bytes in (1, 100, 2**25):
        model, _ = model_and_data()
        share = distributed.shard(len(data), world)
        backward(model, data[share.start:share.stop], world.rank == 1)
        distributed.all_reduce_gradients(model, world, bucket_bytes)
        for (name, got), want in zip(model.named_parameters(), reference.parameters(), strict=True):
            assert (got.grad is None) == (want.grad is None), name
            if got.grad is not None:
                torch.testing.assert_close(got.grad, want.grad, rtol=1e-12, atol=1e-14, msg=name)

    assert distributed.gather_objects({"rank": world.rank}, world) == [{"rank": 0}, {"rank": 1}]
    counts = torch.tensor([2**53 + world.rank, 7])                # exact: integers are not rounded
    assert distributed.all_reduce_sum(counts, world) is counts
    assert counts.tolist() == [2**54 + 1, 14]
    distributed.barrier(world)
    distributed.stop()
    distributed.stop()
sys.stdout.write(f"rank {world.rank} done\\n")
"""
)


@pytest.fixture
def no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("n_items", [0, 1, 2, 6, 7, 100])
def test_shares_cover_everything_once_and_evenly(n_items: int, world_size: int) -> None:
    shares = [shard(n_items, World(rank, world_size, rank)) for rank in range(world_size)]
    assert [index for share in shares for index in share] == list(range(n_items))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_process_needs_no_group(no_torchrun: None, monkeypatch: pytest.MonkeyPatch) -> None:
    world = distributed.start()
    assert world == World(0, 1, 0) and world.is_main
    model = torch.nn.Linear(2, 1)
    model(torch.ones(2)).sum().backward()
    distributed.all_reduce_gradients(model, world)
    assert torch.equal(model.weight.grad, torch.ones(1, 2))  # type: ignore[arg-type]
    assert all_reduce_sum(torch.tensor(3.0), world) == 3
    assert gather_objects("x", world) == ["x"]
    barrier(world)
    distributed.stop()
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert distributed.start() == World(0, 1, 0)
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2"}, "RANK = '' in the environment"),
        ({"WORLD_SIZE": "two", "RANK": "0", "LOCAL_RANK": "0"}, "WORLD_SIZE = 'two'"),
        ({"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0"}, "RANK = 2 with WORLD_SIZE = 2"),
        ({"WORLD_SIZE": "2", "RANK": "-1", "LOCAL_RANK": "0"}, "RANK = -1"),
    ],
)
def test_senseless_environments(
    no_torchrun: None, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], message: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message) as caught:
        distributed.start()
    assert "torchrun" in str(caught.value)


def test_each_process_has_a_gpu_of_its_own(no_torchrun: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert distributed.start().local_rank == 3
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # srun --gpus-per-task=1 shows each process its own
    assert distributed.start().local_rank == 0
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert distributed.start("cpu").local_rank == 3
    with pytest.raises(ValueError, match=r"LOCAL_RANK = 3, but torch finds 2 CUDA devices.*nproc-per-node=2"):
        distributed.start()


def test_two_processes_do_not_share_a_gpu(no_torchrun: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="GPU-a"))
    monkeypatch.setattr(distributed, "_store", torch.distributed.HashStore())
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *args, **kwargs: None)
    other = "GPU-b"
    monkeypatch.setattr(distributed, "gather_objects", lambda value, world: [other, value])
    assert distributed.start() == World(1, 2, 0)
    other = "GPU-a"
    with pytest.raises(ValueError, match=r"processes 0 and 1 have the same GPU \(GPU-a\).*nproc-per-node=gpu"):
        distributed.start()


def test_two_processes(tmp_path: Path, command: Callable[..., Any]) -> None:
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    done = command(tmp_path, str(script))
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split("\n"))[-2:] == ["rank 0 done", "rank 1 done"]
