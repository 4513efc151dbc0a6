"""Needles and passkeys: where they stand, what is asked, and which training sequences hold one."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_models import Toy

from alibi_lm.data.tokenizers import BPEConfig, word_tokenizer
from alibi_lm.data.windows import TrainingBatches
from alibi_lm.evaluate.config import EvaluateConfig
from alibi_lm.evaluate.passes import Passes
from alibi_lm.evaluate.rows import measure
from alibi_lm.evaluate.sweep import evaluate
from alibi_lm.experiment import compose
from alibi_lm.results.rows import read_rows
from alibi_lm.study.figures import draw
from alibi_lm.tasks.needle import FRAME, NeedleBatches, NeedleConfig, NeedleTask, PasskeyTask, with_needle
from alibi_lm.train import train

FIRST = 1000
TEXT = np.arange(900)


def read(sequence):
    """Depth in tokens, key and value of the needle; key and value of the question; the text without either."""
    (place,) = np.flatnonzero(sequence == FIRST + 10)
    fact, question = sequence[place : place + 8] - FIRST, sequence[-8:] - FIRST
    assert fact[3] == question[3] == 11 and question[0] == 12
    symbols = [*fact[1:3], *fact[4:], *question[1:3], *question[4:]]
    assert all(0 <= s < 10 for s in symbols)
    rest = np.concatenate([sequence[:place], sequence[place + 8 : -8]])
    return place, tuple(fact[1:3]), tuple(fact[4:]), tuple(question[1:3]), tuple(question[4:]), rest


@pytest.mark.parametrize("depth", [0, 0.3, 0.5, 1])
def test_a_needle_stands_at_its_depth_and_the_question_asks_for_it(depth):
    made = with_needle(TEXT[:40], FIRST, depth, np.random.default_rng(0))
    place, key, value, asked, told, rest = read(made)
    assert len(made) == 40 and place == round(depth * 24) and (key, value) == (asked, told)
    assert list(rest) == list(TEXT[:24]), "the text goes on after the needle"


@pytest.mark.parametrize(
    ("training_depths", "places"), [(None, set(range(15))), (11, {0, 1, 3, 4, 6, 7, 8, 10, 11, 13, 14})]
)
def test_a_share_of_the_training_sequences_holds_one_and_the_others_are_as_they_were(training_depths, places):
    task = NeedleConfig(share=0.3, training_depths=training_depths)
    plain = TrainingBatches(TEXT, 7, 30, 6, seed=2)
    batches = NeedleBatches(task, TEXT, 7, 30, 6, seed=2, first=FIRST)
    held, depths = 0, set()
    for step in range(60):
        inputs, targets = batches.batch(step)
        before_inputs, before = plain.batch(step)
        assert torch.equal(inputs[:, 0], before_inputs[:, 0]) and torch.equal(inputs[:, 1:], targets[:, :-1])
        changed = (targets != before).any(dim=1)
        assert bool((targets[changed] >= FIRST).any(dim=1).all())
        held += int(changed.sum())
        depths |= {read(row.numpy())[0] for row in targets[changed]}
        part = batches.batch(step, slice(2, 5))
        assert torch.equal(part[1], targets[2:5]) and torch.equal(part[0], inputs[2:5])
    assert abs(held / 360 - 0.3) < 3 * math.sqrt(0.21 / 360)
    assert depths == places and batches.targets(0) == 180


def test_training_needles_stand_at_all_places_alike():
    batches = NeedleBatches(NeedleConfig(share=1), np.arange(20_000), 7, 30, 500, seed=2, first=30_000)
    targets = torch.cat([batches.batch(step)[1] for step in range(6)])
    places = torch.bincount((targets == 30_010).nonzero()[:, 1], minlength=15)
    assert len(places) == 15 and places.sum() == 3000
    assert float(((places - 200) ** 2 / 200).sum()) < 36.1, "chi squared with 14 degrees of freedom, p = 0.001"


def test_a_needle_is_beyond_reach_if_its_first_token_is_when_the_answer_begins():
    task = NeedleTask(
        NeedleConfig(depths=85, draws=1), TEXT, 7, FIRST, "test", "abc"
    )  # at 100 tokens: every place
    for length, reach in ((64, 64), (100, 64), (100, 30)):
        seen = [list(item.input_ids[: length - 3][-reach:]) for item in task.items(length)]
        assert task.in_reach(length, reach).tolist() == [FIRST + 10 in tokens for tokens in seen]


def test_a_test_can_have_a_needle_at_every_place():
    task = NeedleTask(NeedleConfig(depths=49, draws=2), TEXT, 7, FIRST, "test", "abc")
    stand = [read(item.target_ids)[0] for item in task.draw(64)]
    assert stand == [place for place in range(49) for _ in range(2)]
    parts = task.parts(64)
    drawn = [
        read(item.target_ids)
        for item in NeedleTask(NeedleConfig(depths=2, draws=8), TEXT, 7, FIRST, "test", "a").draw(64)
    ]
    assert len({tuple(rest) for *_, rest in drawn}) > 12 and len({told for *_, told, _ in drawn}) == 16
    assert len(parts) == 49 and list(parts)[:2] == ["0.0", "0.021"] and list(parts["0.021"]) == [2, 3]


class Retriever(Toy):
    """Finds needles up to a distance, by reading the sequence; knows nothing else."""

    def right(self, inputs, targets):
        found = torch.zeros_like(targets, dtype=torch.bool)
        for row, (before, after) in enumerate(zip(inputs, targets, strict=True)):
            place = int((before == FIRST + 10).nonzero()[0])
            if len(before) - place <= self.reach:
                found[row, -4:] = after[-4:] == before[place + 4 : place + 8]
        return found


def test_retrieval_is_told_by_depth(tmp_path: Path):
    task = NeedleTask(NeedleConfig(draws=3), TEXT, 7, FIRST, "validation", "abc")
    for reach, shares in ((1000, [1.0] * 11), (60, [0.0] * 5 + [1.0] * 6)):
        (row,) = measure(
            Passes(Retriever(reach=reach), task, tokens_per_forward=500),
            100,
            tmp_path,
            position="toy",
            train_length=50,
        )
        assert row.n == 33 and list(row.extra["by_part"].values()) == shares
        assert row.value == pytest.approx(np.mean(shares))
    assert list(row.extra["by_part"])[::5] == ["0.0", "0.5", "1.0"]
    again = NeedleTask(NeedleConfig(draws=3), TEXT, 7, FIRST, "validation", "abc")
    assert all(
        np.array_equal(a.input_ids, b.input_ids) for a, b in zip(task.items(50), again.items(50), strict=True)
    )
    assert {path.name for path in draw(tmp_path)} >= {"depths.png", "depths.svg"}
    for length, message in ((FRAME, "need 17 tokens"), (901, "no window of 901")):
        assert message in measure(Passes(Retriever(reach=9), task), length, position="toy")[0].reason


def test_a_language_model_with_needles_is_scored_on_text_and_on_needles(tmp_path: Path, write_text, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "text")
    tiny = [
        "experiment=needle", "data=wikitext2", "tokenizer=word", f"data.path={tmp_path / 'text'}", "device=cpu",
        "train_length=24", "steps=4", "tokens_per_step=96", "validate_every=4", "task.draws=2", "task.depths=11",
        "model.model_dim=16", "model.ffn_dim=16", "evaluation.lengths=[24,48]", "threads=1", "task.share=0.5",
        f"data.cache_dir={tmp_path / 'cache'}",
    ]  # fmt: skip
    folder = Path("outputs/needle/runs/alibi_L24_s1_needle")
    train(compose([*tiny, "position=alibi"]), folder)
    rows = list(evaluate(EvaluateConfig("curve", "needle", device="cpu")))
    assert {(r.task, r.metric) for r in rows} == {("text", "perplexity"), ("needle", "accuracy")}
    by_task = {r.task: r for r in rows if r.inference_length == 48}
    assert (
        by_task["text"].perplexity and by_task["needle"].n == 22 and len(by_task["needle"].extra["by_part"]) == 11
    )
    assert len(read_rows("outputs/needle/extrapolation/results.jsonl")) == len(rows)
    only = list(evaluate(EvaluateConfig("curve", "needle", device="cpu", task="text")))
    assert {r.task for r in only} == {"text"}
    with pytest.raises(
        ValueError, match="task = sort: alibi_L24_s1_needle was trained on needle, and can be asked text"
    ):
        list(evaluate(EvaluateConfig("curve", "needle", device="cpu", task="sort")))
    with pytest.raises(ValueError, match="train_length = 16 with task=needle: a needle and its question need 17"):
        train(compose([*tiny, "position=alibi", "train_length=16"]), tmp_path / "short")
    with pytest.raises(ValueError, match=r"task\.share = 0"):
        NeedleConfig(share=0)
    with pytest.raises(ValueError, match=r"task\.training_depths = 1\. Use a whole number >= 2"):
        NeedleConfig(training_depths=1)


def test_a_passkey_is_told_twice_and_asked_for():
    tokenizer = BPEConfig(vocab_size=300).train(["The pass key is 12345. The grass is green.\n"] * 3)
    task = PasskeyTask(tokenizer, "validation")
    depths = set()
    for item in task.items(900):
        text = tokenizer.decode(item.input_ids[1:])
        answer = tokenizer.decode(item.target_ids[item.counted])
        key = answer.strip()
        assert 895 - task.sizes[1] < len(item.input_ids) <= 900 and 1 <= int(key) <= 50_000
        assert text.count(f"The pass key is {key}. Remember it. {key} is the pass key.") == 1
        assert text[: text.rindex("The pass key is")].endswith("What is the pass key? ")
        depths.add(text.index("The pass key is") // 100)
    assert len(task.items(900)) == 20 and len(depths) > 2
    other = PasskeyTask(tokenizer, "test")
    assert other.identity != task.identity and other.corpus != task.corpus, "stored results are not mixed up"
    assert not np.array_equal(other.items(900)[0].input_ids, task.items(900)[0].input_ids)
    assert "needs" in task.refuses(50)
    assert PasskeyTask(word_tokenizer(["green"]), "test").refuses(900) == (
        "the tokenizer has no words for the passkey task"
    )
