"""Items of tasks: against answers worked out in another way, and the same for the same seed and number."""

from collections import Counter

import numpy as np
import pytest
import torch
from toy_models import Toy

from alibi_lm.evaluate.passes import Passes
from alibi_lm.evaluate.rows import describe, measure
from alibi_lm.evaluate.store import TokenStore
from alibi_lm.results.curves import items_of
from alibi_lm.results.documents import read_documents
from alibi_lm.tasks import TASKS
from alibi_lm.tasks.board import BOARD, BOS, EOS, FIRST, SEP
from alibi_lm.tasks.items import ItemBatches, ItemTask, Synthetic
from alibi_lm.tasks.recall import MQAR, Induction, MQARExtrapolate

NAMES = [name for name, kind in TASKS.items() if issubclass(kind, Synthetic)]


def right_answer(name, symbols):
    """From the symbols of the input, by brute force."""
    if name in ("bin_majority", "majority"):
        ((best, count), *others) = Counter(symbols).most_common()
        assert all(other < count for _, other in others), "a tie has no answer"
        return [best]
    if name == "interleaved_majority":
        assert len(symbols) % 3 == 0
        return [right_answer("bin_majority", symbols[k::3])[0] for k in range(3)]
    if name in ("unique_copy", "repeat_copy"):
        return list(symbols)
    if name == "sort":
        return sorted(symbols)
    if name == "parity":
        return [2 + symbols.count(1) % 2]
    assert name == "addition"
    text = "".join("01+"[s] for s in symbols)
    first, second = text.split("+")
    assert all(part == "0" or part[0] == "1" for part in (first, second)), "no leading zeros"
    return [int(digit) for digit in bin(int(first, 2) + int(second, 2))[2:]]


def check_board(task, items=300):
    """Every token of some items: layout, answer by brute force, mask, and which lengths there are."""
    seen = Counter()
    for number in range(items):
        item = task.draw([0, 1, number], 21)
        whole = [*item.input_ids, item.target_ids[-1]]
        assert list(item.target_ids[:-1]) == list(item.input_ids[1:]), "target t follows input t"
        assert whole[0] == BOS and whole[-1] == EOS
        border = whole.index(SEP)
        symbols = [int(t) - FIRST for t in whole[1:border]]
        answer = [int(t) - FIRST for t in whole[border + 1 : -1]]
        assert answer == right_answer(task.name, symbols)
        assert list(np.flatnonzero(item.counted)) == list(range(border, len(item.input_ids)))
        assert all(0 <= t < task.vocab_size for t in whole) and len(item.input_ids) <= task.width(21)
        if task.name in ("unique_copy", "sort"):
            assert len(set(symbols)) == len(symbols)
        seen[len(symbols) + (task.name == "addition")] += 1
    wanted = range(3, 22, 3) if task.name == "interleaved_majority" else range(task.least, 22)
    assert set(seen) == set(wanted), "all lengths of a training, and no others"


@pytest.mark.parametrize("kind", BOARD, ids=lambda k: k().name)
def test_the_board_asks_what_it_says_and_counts_the_answer_alone(kind):
    check_board(kind())


def test_a_test_beyond_the_training_lengths_begins_where_the_last_ended():
    for length, wanted in ((5, range(1, 6)), (10, range(6, 11)), (12, range(8, 13))):
        items = ItemTask(TASKS["repeat_copy"](items=200), 5).items(length)
        assert {int(item.counted.sum()) - 1 for item in items} == set(wanted)


@pytest.mark.parametrize("kind", BOARD, ids=lambda k: k().name)
def test_a_test_just_beyond_the_training_has_no_lengths_below_the_least(kind):
    task = kind(items=60)
    assert min(task.lengths(13, 12)) >= task.least  # before items are drawn: some would never come
    for item in ItemTask(task, 12).items(13):
        whole = [*item.input_ids, item.target_ids[-1]]
        border = whole.index(SEP)
        symbols, answer = ([int(t) - FIRST for t in part] for part in (whole[1:border], whole[border + 1 : -1]))
        assert answer == right_answer(task.name, symbols)
        assert task.least <= len(symbols) + (task.name == "addition") <= 13


def test_bits_are_uniform_in_their_number_and_a_tie_is_drawn_anew():
    ones = Counter()
    for number in range(3000):
        item = TASKS["bin_majority"]().item(np.random.default_rng([7, number]), 4)
        ones[int((item.input_ids[1:5] == FIRST + 1).sum())] += 1
    assert set(ones) == {0, 1, 3, 4} and all(abs(count - 750) < 100 for count in ones.values())


def check_recall(task, length, items=200):
    """Pairs, queries, values and mask of some items of MQAR; returns (tokens, pairs) of each, and the gaps."""
    kinds, gaps = set(), []
    for number in range(items):
        item = task.draw([0, 1, number], length, 64 if length > 64 else None)
        size, pairs = len(item.input_ids), int(item.counted.sum())
        kinds.add((size, pairs))
        keys, values = item.input_ids[: 2 * pairs : 2], item.input_ids[1 : 2 * pairs : 2]
        known = dict(zip(keys, values, strict=True))
        assert len(known) == pairs == len(set(values)) and keys.max() < 32 <= values.min() and keys.min() > 0
        places = np.flatnonzero(item.counted)
        assert (places >= 2 * pairs).all() and (places % 2 == 0).all()
        assert sorted(item.input_ids[places]) == sorted(keys)
        assert all(item.target_ids[p] == known[item.input_ids[p]] for p in places)
        gaps += [(p - 2 * pairs) / (size - 2 * pairs) for p in places]
    return kinds, gaps


@pytest.mark.parametrize(("kind", "length"), [(MQAR, 64), (MQARExtrapolate, 64), (MQARExtrapolate, 200)])
def test_each_query_of_mqar_has_the_value_of_its_key(kind, length):
    kinds, gaps = check_recall(kind(vocabulary=64), length)
    assert kinds == ({(32, 4), (64, 8)} if kind is MQARExtrapolate and length == 64 else {(length, 8)})
    assert np.mean(gaps) < 0.4, "near slots are more likely"


def check_induction(task, items=200):
    """The sign twice, the mask at the end, and the answer after the first sign."""
    for number in range(items):
        item = task.draw([0, 1, number], 12)
        where = np.flatnonzero(item.input_ids == 0)
        assert len(where) == 2 and where[1] == 11 and list(np.flatnonzero(item.counted)) == [11]
        assert item.target_ids[11] == item.input_ids[where[0] + 1] != 0


def test_induction_asks_for_what_followed_the_sign():
    check_induction(Induction())


def read_from_the_end(name, symbols, reach):
    """What someone says who sees only the last symbols; None for nothing that can be right."""
    seen = symbols[-reach:]
    if len(seen) == len(symbols):
        return right_answer(name, symbols)
    if name == "interleaved_majority":
        # A window may begin with any of the three strings: each symbol keeps its own.
        three = [
            [s for at, s in enumerate(symbols) if at % 3 == k and at >= len(symbols) - reach] for k in range(3)
        ]
        size = min(len(one) for one in three)
        return [int(2 * sum(one[-size:]) > size) for one in three]
    if name == "bin_majority":
        return [int(2 * sum(seen) > len(seen))]
    if name == "majority":
        counts = Counter(seen)
        return [min(counts, key=lambda letter: (-counts[letter], letter))]
    return {"parity": [2 + sum(seen) % 2]}.get(name)


@pytest.mark.parametrize("kind", [k for k in BOARD if k.name != "addition"], ids=lambda k: k().name)
def test_what_the_board_gives_to_a_reader_of_the_end(kind):
    task, reach, length = ItemTask(kind(items=300), 10), 10, 30
    expected = []
    for item in task.items(length):
        whole = [*item.input_ids, item.target_ids[-1]]
        border = whole.index(SEP)
        symbols, answer = ([int(t) - FIRST for t in part] for part in (whole[1:border], whole[border + 1 : -1]))
        expected.append(read_from_the_end(kind.name, symbols, reach) == answer)
    found = task.in_reach(length, reach)
    assert found.tolist() == expected
    assert found.any() == ("majority" in kind.name or kind.name == "parity") and not found.all()
    assert task.in_reach(10, 10).all()


def test_what_recall_gives_to_a_reader_of_the_end():
    for kind, reach in ((MQAR, 40), (MQARExtrapolate, 40), (Induction, 40)):
        task = ItemTask(kind(items=200, **({} if kind is Induction else {"vocabulary": 64})), 40)
        expected = []
        for item in task.items(120):
            for at in np.flatnonzero(item.counted):
                seen = list(item.input_ids[: at + 1])
                first = seen.index(seen[at])  # of the key, or of the sign
                expected.append(seen[at] in seen[-reach:][:-1] and first >= len(seen) - reach)
        assert task.in_reach(120, reach).tolist() == expected and 0.1 < np.mean(expected) < 0.9


class Nearsighted(Toy):
    """Answers what a perfect reader of the last `reach` inputs can."""

    def right(self, inputs, targets):
        found = torch.zeros_like(targets, dtype=torch.bool)
        for row, tokens in enumerate(inputs.tolist()):
            for at, token in enumerate(tokens):
                found[row, at] = tokens.index(token) > at - self.reach
        return found


def test_accuracy_beyond_the_last_tokens_is_told_apart():
    task = ItemTask(MQARExtrapolate(vocabulary=64, items=200), 40)
    (near,) = measure(Passes(Nearsighted(reach=40), task), 120, position="toy", train_length=40)
    assert near.value == pytest.approx(near.extra["in_reach"]) and near.extra["beyond"] == 0
    (further,) = measure(Passes(Nearsighted(reach=80), task), 120, position="toy", train_length=40)
    inside, wider = task.in_reach(120, 40), task.in_reach(120, 80)
    assert further.extra["beyond"] == pytest.approx(wider[~inside].mean()) and 0 < further.extra["beyond"] < 1
    assert further.extra["items_beyond"] == (~inside).reshape(200, 8).any(axis=1).sum() < 200
    (trained,) = measure(Passes(Nearsighted(reach=40), task), 40, position="toy", train_length=40)
    assert "in_reach" not in trained.extra


@pytest.mark.parametrize("name", NAMES)
def test_an_item_is_a_function_of_its_seed_and_number(name):
    task = TASKS[name]()
    batches, again = (ItemBatches(task, 40, 4, seed=3) for _ in range(2))
    late = again.batch(5)
    for step in range(6):
        whole = batches.batch(step)
    assert all(torch.equal(a, b) for a, b in zip(whole, late, strict=True))
    assert batches.targets(5) == int(whole[2].sum())
    halves = [again.batch(5, rows) for rows in (slice(0, 2), slice(2, 4))]
    assert all(torch.equal(torch.cat(parts), a) for parts, a in zip(zip(*halves, strict=True), whole, strict=True))
    other = ItemBatches(task, 40, 4, seed=4).batch(5)
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(whole, other, strict=True))
    # A training never sees the items of a test.
    tests = {item.input_ids.tobytes() for item in ItemTask(task, 40).items(40)}
    seen = [row.tobytes() for row in whole[0].numpy()]
    assert name in ("bin_majority", "parity", "repeat_copy") or not tests & set(seen)


class Oracle(Toy):
    """Answers by looking at the targets, or says the same token everywhere."""

    says = None

    def right(self, inputs, targets):
        return torch.ones_like(targets, dtype=torch.bool) if self.says is None else targets == self.says


class BestConstant(Oracle):
    """Says a symbol at the first place of an answer and the layout's end after it."""

    def right(self, inputs, targets):
        return (targets == self.says) | (targets == EOS)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_that_knows_the_future_has_everything_right(name):
    task = ItemTask(TASKS[name](items=50), 40)
    (row,) = measure(Passes(Oracle(), task, tokens_per_forward=200), 80, position="toy")
    assert (row.task, row.metric, row.mode, row.value) == (name, "accuracy", "items", 1.0)
    assert row.n == 50 * (8 if "mqar" in name else 1) and items_of(row) == 50
    (blind,) = measure(Passes(Oracle(says=0), task, tokens_per_forward=200), 80, position="toy")
    assert blind.value == 0


CONSTANTS = [
    ("bin_majority", FIRST), ("majority", FIRST + 3), ("parity", FIRST + 2), ("induction", EOS),
    ("mqar", 5000), ("mqar_extrapolate", 5000),
]  # fmt: skip


@pytest.mark.parametrize(("name", "says"), CONSTANTS)
def test_a_constant_answer_has_the_accuracy_of_chance(name, says):
    task = ItemTask(TASKS[name](), 40)
    (row,) = measure(Passes(BestConstant(says=says), task), 80, position="toy")
    assert row.value == pytest.approx(task.task.chance, abs=0.04)


class Both(ItemTask):
    metrics = ("perplexity", "accuracy")


def test_an_item_is_right_where_every_target_is_and_is_scored_once(tmp_path):
    task = Both(TASKS["repeat_copy"](items=300), 3)
    passes = Passes(
        BestConstant(says=FIRST, identity="weights"), task, TokenStore(tmp_path / "tokens"), tokens_per_forward=50
    )
    loss, row = measure(passes, 3, tmp_path, position="toy")
    items = task.items(3)
    blank = np.mean([(item.target_ids[item.counted][:-1] == FIRST).all() for item in items])
    assert 0.1 < row.value == blank < 0.6 and row.n == 300 and row.perplexity is None
    assert row.tokens == loss.n == sum(int(item.counted.sum()) for item in items) and loss.value == 1
    assert f"repeat_copy: accuracy {blank:.3f}" in describe(row) and set(read_documents(tmp_path)) == {loss.key}
    passes.model.says = EOS  # what is stored is not made again
    assert measure(passes, 3, tmp_path, position="toy") == [loss, row]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MQAR(vocabulary=16, pairs=8), "task.vocabulary = 16 has no 8 different keys and values"),
        (lambda: MQAR(pairs=0), "task.pairs = 0"),
        (lambda: MQARExtrapolate(pairs=1), "task.pairs = 1"),
        (lambda: Induction(vocabulary=2), "task.vocabulary = 2"),
        (lambda: TASKS["sort"](items=0), "task.items = 0"),
    ],
)
def test_settings_that_cannot_hold_an_answer_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("name", "length", "message"),
    [("sort", 151, "150 symbols"), ("addition", 3, "length of 4"), ("mqar", 31, "needs 32 tokens"),
     ("interleaved_majority", 2, "length of 3")],
)  # fmt: skip
def test_lengths_without_items_are_refused(name, length, message):
    (row,) = measure(Passes(Oracle(), ItemTask(TASKS[name](), 40)), length, position="toy")
    assert row.value is None and message in row.reason
