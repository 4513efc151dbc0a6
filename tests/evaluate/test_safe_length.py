"""The verdict: at which length a loss has risen by more than one percent, and how sure that is."""

import numpy as np
import pytest

from alibi_lm.evaluate.passes import Passes
from alibi_lm.evaluate.safe_length import safe_length
from alibi_lm.evaluate.views import Group
from alibi_lm.tasks.text import TextTask


class Given(Passes):
    """Passes whose nats are given by length: 2 a token, times 1 + rise, with noise of its own per document."""

    def __init__(self, rises, documents=20, noise=0.0, limit=None):
        model = type("Model", (), {"label": "given", "max_length": limit, "refuses": lambda self, what: ""})()
        starts = np.arange(documents) * 50
        super().__init__(model, TextTask(np.zeros(documents * 50, np.int32), 0, documents=starts))
        self.rises, self.noise = rises, noise

    def nats(self, length, stride=None, window=None):
        tokens = len(self.text.tokens)
        draw = np.random.default_rng(length).normal(0, self.noise, len(self.text.documents))
        document = np.repeat(draw, tokens // len(draw))
        return (2 * (1 + self.rises.get(length, 0.0) + document)).astype(np.float32)


def found(rises, lengths=(16, 32, 64, 128), **more):
    told = safe_length(Group("alibi", 16, [Given(rises, **more)]), lengths)
    return told, told["points"]


def test_within_a_percent_at_every_length():
    told, points = found({32: 0.009, 64: -0.3, 128: 0.0099})
    assert told["safe_length"] == told["safe_length_low"] == told["safe_length_high"] == 128
    assert "May be read up to 128 tokens, the longest length tested" in told["verdict"]
    assert points[1]["excess"]["share"] == pytest.approx(0.009, abs=1e-6)


def test_the_first_length_that_is_worse_ends_it():
    told, _ = found({32: 0.002, 64: 0.0101, 128: 0.0})
    assert told["safe_length"] == told["safe_length_high"] == 32
    assert "up to 32 tokens" in told["verdict"] and "At 64 its loss is 1.0% higher" in told["verdict"]
    told, _ = found({32: 0.5, 64: 0.6})
    assert (
        told["safe_length"] == 16 and "Is not known to be safe beyond its training length of 16" in told["verdict"]
    )
    assert "At 32 its loss is 50.0% higher" in told["verdict"]


def test_what_is_not_settled_is_said():
    told, points = found({32: 0.0, 64: 0.008, 128: 0.2}, noise=0.01)
    low, high = points[2]["excess"]["low"], points[2]["excess"]["high"]
    assert low < 0.008 < high and high > 0.01
    assert (told["safe_length_low"], told["safe_length_high"]) == (32, 64)
    assert "not settled" in told["verdict"] and "at 128 it is" in told["verdict"]


def test_one_document_and_a_limit():
    told, _ = found({64: 0.02}, documents=1, lengths=(16, 32))
    assert "without an interval" in told["verdict"] and told["safe_length"] == 32
    told, _ = found({}, limit=32)
    assert told["safe_length"] == 32 and "At 64 it cannot be read: given has 32 positions" in told["verdict"]
    told, _ = found({}, limit=16)
    assert told["safe_length"] is None and told["verdict"].startswith("At 32 it cannot be read")
