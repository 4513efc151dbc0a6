"""Training batches and scoring windows against their definitions, on streams small enough to write down."""

import numpy as np
import pytest

from alibi_lm.data.windows import TrainingBatches, positions_in_window, scoring_windows

START = 99


def stream(n):
    return np.arange(n, dtype=np.uint16)


def test_training_inputs_are_the_tokens_before_the_targets_in_the_stream():
    batches = TrainingBatches(stream(50), START, length=4, rows=3, seed=1)
    for step in range(12):
        inputs, targets = batches.batch(step)
        assert inputs.shape == targets.shape == (3, 4)
        assert (inputs[:, 1:] == targets[:, :-1]).all()
        for row_inputs, row_targets in zip(inputs.tolist(), targets.tolist(), strict=True):
            first = row_targets[0]
            assert first % 4 == 0, "blocks have fixed borders"
            assert row_inputs[0] == (START if first == 0 else first - 1)


def test_an_epoch_uses_each_block_once_and_each_epoch_has_its_own_order():
    batches = TrainingBatches(stream(48), START, length=4, rows=3, seed=1)
    assert batches.batches_per_epoch == 4
    epochs = [[tuple(batches.blocks(4 * e + i)) for i in range(4)] for e in range(3)]
    for epoch in epochs:
        assert sorted(b for batch in epoch for b in batch) == list(range(12))
    # The authors' order: which blocks share a batch is fixed, the order of batches is not.
    assert set(epochs[0]) == set(epochs[1]) == set(epochs[2])
    assert len({tuple(e) for e in epochs}) > 1


def test_a_batch_is_a_function_of_seed_and_step_alone():
    make = lambda seed: TrainingBatches(stream(400), START, 4, 3, seed)  # noqa: E731
    forwards = [make(7).batch(s)[1].tolist() for s in range(70)]
    one = make(7)
    backwards = [one.batch(s)[1].tolist() for s in reversed(range(70))][::-1]
    assert forwards == backwards
    assert forwards != [make(8).batch(s)[1].tolist() for s in range(70)]


def test_rows_of_a_batch_can_be_taken_apart():
    batches = TrainingBatches(stream(400), START, 4, 6, seed=1)
    whole, part = batches.batch(3)[0], batches.batch(3, slice(2, 5))[0]
    assert (whole[2:5] == part).all()


def test_a_text_shorter_than_a_batch_is_refused():
    with pytest.raises(ValueError, match=r"tokens_per_step = 12 is more than .* 8 tokens"):
        TrainingBatches(stream(11), START, length=4, rows=3, seed=1)


@pytest.mark.parametrize(
    ("num_tokens", "length", "stride"),
    [(10, 4, None), (10, 4, 4), (10, 4, 1), (10, 4, 3), (3, 8, 2), (1, 1, 1), (12, 4, 2), (7, 100, None)],
)
def test_windows_and_positions_are_those_of_the_definition(num_tokens, length, stride):
    step, positions = stride or length, positions_in_window(num_tokens, length, stride)
    starts, scored, ends = (part.tolist() for part in scoring_windows(num_tokens, length, stride))
    assert scored == list(range(0, num_tokens, step)) and ends == [*scored[1:], num_tokens]
    assert starts == [max(0, k * step - (length - step)) for k in range(len(scored))]
    for start, first, end in zip(starts, scored, ends, strict=True):
        assert positions[first:end].tolist() == [target - start + 1 for target in range(first, end)]


def test_counts_of_the_paper():
    """217,646 targets: 426 blocks of 512 (the last 46 long), 71 of 3072 (2,606)."""
    for length, blocks, last in ((512, 426, 46), (1024, 213, 558), (2048, 107, 558), (3072, 71, 2606)):
        starts, scored, ends = scoring_windows(217_646, length, None)
        assert len(starts) == blocks and ends[-1] - starts[-1] == last
        assert (starts == scored).all()


@pytest.mark.parametrize(("length", "stride"), [(0, None), (4, 0), (4, 5), (-1, None)])
def test_lengths_and_strides_out_of_range(length, stride):
    with pytest.raises(ValueError, match="inference length"):
        scoring_windows(10, length, stride)
