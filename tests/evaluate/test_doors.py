"""A model of no library goes through everything that runs of ours go through."""

import numpy as np
import pytest
import torch
from toy_models import Toy

from alibi_lm.evaluate import views
from alibi_lm.evaluate.passes import Passes
from alibi_lm.evaluate.rows import measure
from alibi_lm.evaluate.score import score
from alibi_lm.evaluate.store import TokenStore
from alibi_lm.results.documents import read_documents
from alibi_lm.results.rows import read_rows
from alibi_lm.study.figures import draw
from alibi_lm.tasks.text import TextTask

V = 8


class Bigram(Toy):
    """How often each token follows each other one, as a table; nothing of torch but the interface's tensors."""

    train_length, max_length = 16, 64

    def __init__(self, tokens, label="bigram_L16_s1"):
        super().__init__(label=label, identity=label)
        pairs = np.ones((V, V))
        np.add.at(pairs, (tokens[:-1], tokens[1:]), 1)
        self.table = torch.from_numpy(np.log(pairs / pairs.sum(axis=1, keepdims=True)))

    def refuses(self, capability):
        return f"a table of pairs has no {capability}"

    def nats(self, inputs, targets, positions, window):
        return -self.table[inputs, targets]


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
    assert views.fixed(group, [1, 16], every=5)[0]["nats"] == pytest.approx(nats[15::5].mean(), rel=1e-6)

    drawn = draw(tmp_path)
    assert any(path.suffix == ".png" and path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    assert "igram" in next(path for path in drawn if path.suffix == ".md").read_text()
