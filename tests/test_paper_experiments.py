"""The paper's WikiText-103 experiments are the paper's: sizes, recipe, lengths."""

import math

import pytest
import torch

from alibi_lm.config import TrainConfig
from alibi_lm.experiment import compose
from alibi_lm.load import build_model

LENGTHS = [64, 128, 256, 512, 1024, 1536, 2048, 3072]
WORDS = 267_744
FOUR_SCHEMES = (512, 1024, 3072)


@pytest.fixture(scope="module")
def experiments() -> dict[int, TrainConfig]:
    return {length: compose([f"experiment=paper_L{length}"]) for length in LENGTHS}


@pytest.mark.parametrize(
    ("position", "extra"), [("none", 0), ("sinusoidal", 0), ("rotary", 0), ("alibi", 0), ("t5", 32 * 8)]
)
def test_the_model_has_the_papers_number_of_parameters(position: str, extra: int) -> None:
    config = compose(["experiment=paper_L512", f"position={position}"])
    assert position != "sinusoidal" or config.position.variant == "fairseq"
    with torch.device("meta"):
        model = build_model(config, WORDS)
    assert model.num_parameters() == 246_933_504 + extra


def test_sequences_of_a_step_follow_the_authors_floor_rule(experiments: dict[int, TrainConfig]) -> None:
    rows = {length: config.rows_per_step for length, config in experiments.items()}
    per_gpu = dict(zip(LENGTHS, [144, 72, 36, 18, 9, 6, 4, 3], strict=True))
    assert rows == {length: 8 * sequences for length, sequences in per_gpu.items()}
    assert {length: rows[length] * length for length in LENGTHS} == {
        length: 65_536 if length == 2048 else 73_728 for length in LENGTHS
    }


@pytest.mark.parametrize("length", LENGTHS)
def test_the_recipe(experiments: dict[int, TrainConfig], length: int) -> None:
    config = experiments[length]
    assert config.train_length == length
    assert (config.steps, config.clip_norm, config.seed) == (286_000, 0.1, 1)
    assert (config.data.name, config.tokenizer.name, config.tokenizer.pad_to_multiple) == (
        "wikitext103",
        "word",
        8,
    )
    optimizer = config.optimizer
    assert (optimizer.name, optimizer.lr, optimizer.momentum, optimizer.weight_decay) == ("nag", 1.0, 0.99, 0.0)

    def rate(step: int) -> float:
        return config.schedule.lr(step, config.steps, optimizer.lr)

    assert rate(0) == 1e-7
    assert rate(16_000) == 1.0
    assert rate(16_000 + 90_000) == pytest.approx(1e-4 + (1 - 1e-4) * 0.75)
    assert rate(285_999) == pytest.approx(1e-4 + 0.5 * (1 - 1e-4) * (1 + math.cos(math.pi * 269_999 / 270_000)))


@pytest.mark.parametrize("length", LENGTHS)
def test_schemes_and_lengths_of_the_tables(experiments: dict[int, TrainConfig], length: int) -> None:
    config = experiments[length]
    assert set(config.evaluation.lengths) >= {v for v in LENGTHS if v >= length}
    assert min(config.evaluation.lengths) == length
    assert (config.evaluation.mode, config.evaluation.split) == ("nonoverlapping", "validation")
    schemes = {"alibi", "sinusoidal"} | ({"rotary", "t5"} if length in FOUR_SCHEMES else set())
    runs = [dict(part.split("=") for part in sweep.split()) for sweep in config.study]
    assert {scheme for run in runs for scheme in run["position"].split(",")} == schemes


def test_figure_1_is_covered(experiments: dict[int, TrainConfig]) -> None:
    """Tables 2 to 4 have 35, 35 and 33 lengths; Table 5 adds its own."""
    shortest = {512: 35, 1024: 35, 3072: 33}
    longest = {512: 15_512, 1024: 16_024, 3072: 16_072}
    for length in FOUR_SCHEMES:
        lengths = experiments[length].evaluation.lengths
        assert len(set(lengths) - (set(LENGTHS) - {length})) == shortest[length]
        assert max(lengths) == longest[length]
        assert lengths == sorted(lengths)
