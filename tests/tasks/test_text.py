"""The token stream as a task: which targets there are, in both modes, and where there are none."""

import numpy as np
import pytest

from alibi_lm.data.windows import positions_in_window
from alibi_lm.distributed import World
from alibi_lm.tasks.text import TextTask

TOKENS = np.arange(10, 33)


def pairs(batches):
    """(number, input before the target, target) of every scored target."""
    found = []
    for one in batches:
        for row, numbers in enumerate(one.numbers):
            inputs, targets = one.input_ids[row, one.score_from :], one.target_ids[row, one.score_from :]
            found += zip(numbers.tolist(), inputs.tolist(), targets.tolist(), strict=True)
    return sorted(found)


@pytest.mark.parametrize("tokens_per_forward", [1, 16, 1000])
@pytest.mark.parametrize(("length", "stride"), [(5, None), (5, 2), (5, 5), (23, None), (40, 7)])
def test_every_token_is_a_target_once_after_the_token_before_it(length, stride, tokens_per_forward):
    text = TextTask(TOKENS, 7, stride)
    expected = [(k, [7, *TOKENS][k], TOKENS[k]) for k in range(len(TOKENS))]
    batches = list(text.batches(length, tokens_per_forward))
    assert pairs(batches) == expected
    positions = positions_in_window(len(TOKENS), length, stride)
    for one in batches:
        rows, width = one.input_ids.shape
        assert rows == 1 or rows * width <= tokens_per_forward
        # The input reaches back to the window's first token: as many tokens as the target's position says.
        assert (positions[one.numbers] == np.arange(one.score_from, width) + 1).all()
        assert (one.input_ids[:, 1:] == one.target_ids[:, :-1]).all()
    shares = [one for rank in range(3) for one in text.batches(length, tokens_per_forward, World(rank, 3))]
    assert pairs(shares) == expected and text.num_targets(length) == len(expected)


def test_windows_may_lie_anywhere_and_are_numbered_one_after_another():
    text = TextTask(TOKENS, 7)
    found = pairs(text.windows(np.array([4, 0, 18]), 5, 3, tokens_per_forward=10))
    targets = [17, 18, 13, 14, 31, 32]
    assert found == [(number, target - 1, target) for number, target in enumerate(targets)]
    with pytest.raises(ValueError, match="windows of 5 tokens reach from 19 to 24, but the split has 23 tokens"):
        list(text.windows(np.array([19]), 5))


def test_a_length_of_which_the_split_has_no_window_is_refused_whatever_its_size():
    assert TextTask(TOKENS, 7).refuses(23) == ""
    for length in (24, 10**10):
        assert TextTask(TOKENS, 7).refuses(length) == f"the split has 23 tokens: no window of {length:,} is full"
    assert TextTask(TOKENS, 7, 8).refuses(5) == "stride = 8 is longer than the window"


def test_identity_is_that_of_tokens_and_start():
    same = TextTask(TOKENS.copy(), 7, stride=3)  # the mode is part of how it is scored, not of what
    assert same.identity == TextTask(TOKENS, 7).identity
    assert len({TextTask(TOKENS, 7).identity, TextTask(TOKENS, 8).identity, TextTask(TOKENS + 1, 7).identity}) == 3


def test_documents_are_its_groups():
    assert TextTask(TOKENS, 7, documents=np.array([0, 9])).groups(5).tolist() == [0, 9]
    assert TextTask(TOKENS, 7).groups(5).tolist() == [0]
