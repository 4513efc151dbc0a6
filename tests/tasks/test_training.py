"""A run on a task: it learns, stops when it is right, is resumed exactly, and is scored on what lies beyond."""

import json
from pathlib import Path

import pytest
import torch

from alibi_lm import load_run
from alibi_lm.config import TrainConfig
from alibi_lm.evaluate.config import EvaluateConfig
from alibi_lm.evaluate.sweep import analyse, evaluate
from alibi_lm.experiment import compose, run_folder
from alibi_lm.model.compiled import CompiledNats
from alibi_lm.results.rows import read_rows
from alibi_lm.runs import finished
from alibi_lm.study.figures import draw
from alibi_lm.tasks import TASKS
from alibi_lm.tasks.items import ItemBatches
from alibi_lm.train import Interrupted, train

TINY = [
    "experiment=board_quick", "train_length=6", "tokens_per_step=96", "steps=12", "log_every=3",
    "validate_every=4", "checkpoint_every=4", "task.validation_items=20", "evaluation.lengths=[6,12]",
    "model.model_dim=16", "model.ffn_dim=16", "task.items=40",
]  # fmt: skip


def config(*more: str) -> TrainConfig:
    return compose([*TINY, *more])


def test_only_the_answer_is_learned_from(tiny_model):
    """The gradient is that of the mean over the targets that count, whatever the micro-batches."""
    model = tiny_model("alibi", vocab_size=5, train_length=9).double()
    inputs, targets, counted = ItemBatches(TASKS["bin_majority"](), 6, 8, seed=1).batch(0)
    by_hand = torch.log_softmax(model(inputs), -1).gather(2, targets[..., None])[..., 0]
    expected = -torch.stack([by_hand[r, t] for r, t in counted.nonzero()])
    torch.testing.assert_close(model.nats(inputs, targets, counted), expected, rtol=1e-12, atol=0)
    compiled = CompiledNats.__new__(CompiledNats)
    compiled.model, compiled.hidden = model, model.hidden
    torch.testing.assert_close(compiled(inputs, targets, counted), expected, rtol=1e-12, atol=0)


def test_a_run_that_is_stopped_ends_as_if_it_had_not_been(tmp_path: Path, monkeypatch):
    whole = train(config("position=learned", "position.random_offset=true", "position.rows=30"), tmp_path / "a")
    settings = config("position=learned", "position.random_offset=true", "position.rows=30")
    steps = {"left": 5}
    batch = ItemBatches.batch

    def stopping(self, step, rows=slice(None)):
        steps["left"] -= 1
        if steps["left"] < 0:
            raise Interrupted(15, step)
        return batch(self, step, rows)

    monkeypatch.setattr(ItemBatches, "batch", stopping)
    with pytest.raises(Interrupted):
        train(settings, tmp_path / "b")
    monkeypatch.setattr(ItemBatches, "batch", batch)
    again = train(settings, tmp_path / "b")
    assert {k: v for k, v in whole.items() if k != "device"} == {k: v for k, v in again.items() if k != "device"}
    first, second = (load_run(tmp_path / name).state_dict() for name in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)
    rows = [json.loads(line) for line in (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "validation/accuracy" in row] == [4, 8, 12]
    assert (tmp_path / "a" / "config.yaml").read_text() == (tmp_path / "b" / "config.yaml").read_text()


def test_micro_batches_change_nothing_but_rounding(tmp_path: Path):
    losses = [
        train(config("position=alibi", *more), tmp_path / str(len(more)))["validation_loss"]
        for more in ([], ["micro_batch_tokens=30"])
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_training_ends_when_every_item_of_a_validation_is_right(tmp_path: Path):
    easy = ["position=none", "train_length=1", "tokens_per_step=64", "optimizer.lr=0.02", "evaluation.lengths=[1]"]
    done = train(config(*easy, "steps=200"), tmp_path / "early")
    assert done["steps"] < 200 and done["steps"] % 4 == 0 and done["tokens_seen"] == 64 * done["steps"]
    assert finished(tmp_path / "early") == done
    assert train(config(*easy, "steps=200"), tmp_path / "early") == done, "it is finished, not to be resumed"
    stays = train(config(*easy, "steps=40", "task.stop_when_solved=false"), tmp_path / "all")
    assert stays["steps"] == 40


def test_a_task_run_is_named_scored_and_drawn(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for overrides in (["position=alibi"], ["position=alibi", "seed=2"], ["position=none", "task=parity"]):
        settings = config(*overrides)
        folder = run_folder(settings)
        assert folder.name.startswith(f"{settings.position.name}_L6_s{settings.seed}_{settings.task.name}")
        train(settings, folder)
    rows = list(evaluate(EvaluateConfig("curve", "board_quick", device="cpu")))
    found = {(r.task, r.position, r.seed, r.inference_length): r for r in rows}
    assert {r.task for r in rows} == {"bin_majority", "parity"} and all(r.metric == "accuracy" for r in rows)
    assert (
        found["bin_majority", "alibi", 1, 12].n == 40
        and found["bin_majority", "constant", None, None].value == 0.5
    )
    again = list(evaluate(EvaluateConfig("curve", "board_quick", device="cpu")))
    assert (
        again
        == rows
        == [row for row in again if row in read_rows("outputs/board_quick/extrapolation/results.jsonl")]
    )
    drawn = {path.name for path in draw(Path("outputs/board_quick/extrapolation"))}
    assert {"tasks.png", "tasks.svg", "table.md"} <= drawn
    table = Path("outputs/board_quick/extrapolation/table.md").read_text()
    assert "0 of 2" in table and "seeds 1, 2" in table and "Differences" not in table.split("environment")[0]
    with pytest.raises(ValueError, match="view = position needs a text, and alibi_L6_s1_bin_majority"):
        list(analyse(EvaluateConfig("position", "board_quick", device="cpu")))
    for mode, stride in (("stream", None), ("sliding", 2), (None, 2)):
        refused = EvaluateConfig("curve", "board_quick", device="cpu", mode=mode, stride=stride)
        with pytest.raises(ValueError, match=f"mode = {mode}, stride = {stride}: .* was trained on items"):
            list(evaluate(refused))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task=sort", "task.symbols=5"], "train_length = 6 with task=sort: sort has 5 symbols"),
        (["task=mqar"], "train_length = 6 with task=mqar: mqar with 8 pairs needs 32 tokens"),
        (["position=learned", "position.rows=5"], "position.rows = 5, but a training sequence has 9 tokens"),
        (["position=learned", "position.rows=0"], "position.rows = 0"),
    ],
)
def test_a_task_that_cannot_be_is_refused_before_any_file(tmp_path: Path, overrides, message):
    with pytest.raises(ValueError, match=message):
        train(compose([s for s in TINY if "task.items" not in s] + overrides), tmp_path / "run")
    assert not (tmp_path / "run" / "config.yaml").exists()
