"""Checkpoints: exact round trips, strict loading, what is kept."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from alibi_lm.checkpoint import Checkpoint, CheckpointStore

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
    checkpoint = store.latest()
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
    checkpoint = store.latest()
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


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers_are_not_evaluated(store: CheckpointStore, value: float) -> None:
    model, _ = trained()
    with torch.no_grad():
        model.hidden.bias[2] = value
    path = store.save(1, model, None, {})
    with pytest.raises(ValueError, match=r"hidden.bias holds NaN or infinite values"):
        Checkpoint(path).load_into(TiedModel())


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
    assert store.latest() is None and store.best() is None and store.steps() == []
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
