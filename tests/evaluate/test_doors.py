"""A model of no library and a task that is no text go through everything that runs of ours go through."""

import json
import math

import numpy as np
import pytest
import torch
from toy_models import Toy

from alibi_lm.distributed import World
from alibi_lm.evaluate import views
from alibi_lm.evaluate.passes import Passes
from alibi_lm.evaluate.rows import describe, measure
from alibi_lm.evaluate.score import score
from alibi_lm.evaluate.store import TokenStore
from alibi_lm.results.documents import read_documents
from alibi_lm.results.rows import read_rows
from alibi_lm.study.figures import draw
from alibi_lm.tasks.base import Batch, Task
from alibi_lm.tasks.text import TextTask

V = 8


class Bigram(Toy):
    """How often each token follows each other one, as a table."""

    vocab_size, train_length, max_length = V, 16, 64

    def __init__(self, tokens):
        super().__init__(label="bigram_L16_s1", identity="bigram")
        pairs = np.ones((V, V))
        np.add.at(pairs, (tokens[:-1], tokens[1:]), 1)
        self.table = torch.from_numpy(np.log(pairs / pairs.sum(axis=1, keepdims=True)))

    def refuses(self, capability):
        return f"a table of pairs has no {capability}"

    def nats(self, inputs, targets, positions, window):
        return -self.table[inputs].gather(2, targets[..., None])[..., 0]


class Cheat(Toy):
    """Knows the answer."""

    def right(self, inputs, targets):
        return torch.ones_like(targets, dtype=torch.bool)


class Constant(Toy):
    """Always says 0."""

    def nats(self, inputs, targets, positions, window):
        return torch.full(targets.shape, math.log(2))

    def right(self, inputs, targets):
        return targets == 0


class RepeatBits(Task):
    """Say the first `count` of some bits again: a function of the seed and the item's number, as in training."""

    name, metrics = "repeat_bits", ("accuracy",)

    def __init__(self, count=1, items=200, seed=1):
        self.count, self.items, self.seed, self.corpus = count, items, seed, f"bits {seed}"

    @property
    def identity(self):
        return f"{self.name} {self.count} {self.items} {self.seed}"

    def num_targets(self, length):
        return self.items * self.count

    def groups(self, length):
        return np.arange(self.items) * self.count

    def item(self, index, length):
        bits = np.random.default_rng([self.seed, index]).integers(0, 2, length - self.count)
        return np.concatenate([bits, bits[: self.count], [2]])

    def refuses(self, length):
        return "" if length >= 2 * self.count else f"{length} tokens have no room for {self.count} bits twice"

    def batches(self, length, tokens_per_forward=8192, world=None):
        world = world or World()
        own = range(world.rank, self.items, world.world_size)
        rows = max(1, tokens_per_forward // length)
        for k in range(0, len(own), rows):
            ids = torch.from_numpy(np.stack([self.item(index, length) for index in own[k : k + rows]]))
            numbers = np.full((len(ids), length), -1)
            for row, index in enumerate(own[k : k + rows]):
                numbers[row, -self.count - 1 : -1] = index * self.count + np.arange(self.count)
            yield Batch(ids[:, :-1], ids[:, 1:], numbers)


@pytest.fixture
def text():
    steps = np.random.default_rng(0).integers(1, 3, 600)
    return TextTask(np.cumsum(steps) % V, 0, documents=np.array([0, 150, 320, 480]), corpus="toy", words=600)


def test_a_table_of_pairs_is_scored_swept_viewed_and_drawn(text, tmp_path):
    model = Bigram(text.tokens)
    nats = score(model, text.batches(16), 600).nats
    before = np.array([0, *text.tokens[:-1]])
    np.testing.assert_allclose(nats, -model.table.numpy()[before, text.tokens], rtol=1e-12)

    passes = Passes(model, text, TokenStore(tmp_path / "tokens"))
    rows = [r for n in (8, 16, 32, 128) for r in measure(passes, n, tmp_path, position="bigram", seed=1)]
    assert model.served == [8, 16, 32]
    for row in rows[:3]:
        assert row.nats == pytest.approx(nats.sum(), rel=1e-6) and row.value == row.perplexity < V
        assert row.run == model.label and row.task == "text" and row.n == row.tokens == 600
    assert rows[3].reason == "bigram_L16_s1 has 64 positions"
    assert read_rows(tmp_path / "results.jsonl") == rows and len(read_documents(tmp_path)) == 3

    group = views.Group("bigram", 16, [passes])
    for points in (views.position(group, [8, 32]), views.last(group, [16, 32], 4), views.documents(group, [16])):
        assert all(point["low"] < point["nats"] < point["high"] for point in points)
    assert model.served == [8, 16, 32]  # views need no pass that the rows did not need
    for points in (views.decomposition(group, [32], 4), views.offset(group, [], [4], 8, 1)):
        assert points[0]["reason"].startswith("a table of pairs has no ")
    assert views.fixed(group, [], [1, 16], 5)[0]["nats"] == pytest.approx(nats[15::5].mean(), rel=1e-6)

    drawn = draw(tmp_path)
    assert any(path.suffix == ".png" and path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    assert "igram" in next(path for path in drawn if path.suffix == ".md").read_text()


@pytest.mark.parametrize(("kind", "accuracy"), [(Cheat, 1.0), (Constant, None)])
@pytest.mark.parametrize("count", [1, 2])
def test_an_accuracy_is_the_share_of_items_that_are_right_in_every_target(tmp_path, kind, accuracy, count):
    task = RepeatBits(count)
    if accuracy is None:  # by chance: the items whose answer happens to be zeros
        accuracy = np.mean([not task.item(index, 12)[:count].any() for index in range(task.items)])
        assert abs(accuracy - 0.5**count) < 0.1
    passes = Passes(kind(identity=kind.__name__), task, TokenStore(tmp_path / "tokens"), tokens_per_forward=50)
    (row,) = measure(passes, 12, tmp_path, position="toy")
    assert (row.task, row.metric, row.mode, row.n) == ("repeat_bits", "accuracy", "items", 200)
    assert row.value == accuracy and row.tokens == 200 * count and row.perplexity is None
    assert f"repeat_bits: accuracy {accuracy:.3f}" in describe(row)
    served = len(passes.model.served)
    assert measure(passes, 12, tmp_path, position="toy") == [row] and len(passes.model.served) == served
    (refused,) = measure(passes, 1, tmp_path, position="toy")
    assert refused.value is None and refused.reason == f"1 tokens have no room for {count} bits twice"
    assert len(read_rows(tmp_path / "results.jsonl")) == 2


def test_a_task_may_have_both_metrics(tmp_path):
    task = RepeatBits()
    task.metrics = ("perplexity", "accuracy")
    passes = Passes(Constant(), task)
    perplexity, accuracy = measure(passes, 12, tmp_path, position="toy")
    assert perplexity.value == pytest.approx(2) and perplexity.n == 200 and 0.4 < accuracy.value < 0.6
    assert [json.loads(line)["metric"] for line in (tmp_path / "results.jsonl").read_text().splitlines()] == [
        "accuracy",
        "perplexity",
    ]
    assert set(read_documents(tmp_path)) == {perplexity.key}
