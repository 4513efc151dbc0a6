"""Cards of schemes: what their files say, and how far a bias lets a query see."""

import json
import math
import sys
from functools import partial

import pytest

from alibi_lm.evaluate import cards
from alibi_lm.evaluate.cards import receptive_field, told, write_cards
from alibi_lm.evaluate.config import EvaluateConfig
from alibi_lm.positions import POSITIONS, PositionShape

SHAPE = PositionShape(32, 8, 4, 2, 16, 16)


@pytest.mark.parametrize("name", sorted(POSITIONS))
def test_the_file_of_every_scheme_has_what_its_card_shows(name):
    config = POSITIONS[name]
    card = told(sys.modules[config.__module__].__doc__, config.__doc__)
    assert card["title"].endswith((".", ":")), card["title"]
    if card["source"]:
        assert card["formula"] and card["beyond"] and "\n" not in card["source"]
    else:
        assert name == "none"


def test_the_receptive_field_is_the_distance_that_holds_99_percent_of_the_weight():
    """ALiBi: a geometric series, so the weight within r distances is 1 - exp(-m r)."""
    scheme = POSITIONS["alibi"]().build(SHAPE)
    expected = [math.ceil(math.log(0.01) / -m) for m in (2.0**-2, 2.0**-8)]
    shortest, longest = receptive_field(scheme, 16)
    assert shortest == expected[0]
    whole = 1 - math.exp(-(2.0**-8) * 64 * 16)  # the sum ends at 64 L
    assert longest == math.ceil(math.log(1 - 0.99 * whole) / -(2.0**-8))
    assert receptive_field(POSITIONS["rotary"]().build(SHAPE), 16) is None


def test_cards_are_written_for_each_scheme_of_the_runs_once(trained_runs, tmp_path, monkeypatch):
    monkeypatch.setattr(cards, "seconds_per_token", partial(cards.seconds_per_token, passes=1))
    write_cards(EvaluateConfig(runs=f"{trained_runs}/outputs/smoke/runs/*", output_dir=str(tmp_path), threads=1))
    alibi, learned = json.loads((tmp_path / "cards.json").read_text())["cards"]
    assert (alibi["run"], learned["run"]) == ("alibi_L8_s1", "learned_L8_s1")
    assert (alibi["parameters"], learned["parameters"]) == (0, 8 * 16)
    assert alibi["acts_on"] == ["scores, by distance"] and learned["acts_on"] == ["word embeddings"]
    assert set(alibi["seconds_per_token"]) == {"train", "evaluate"}
    assert set(learned["seconds_per_token"]) == {"train"}, "it has no positions at 8 L"
