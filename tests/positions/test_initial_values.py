"""How the parameters of each scheme start, beside the numbers of its docstring and its source."""

import pytest
import torch

from alibi_lm.positions import POSITIONS, PositionShape

SHAPE = PositionShape(model_dim=400, head_dim=50, num_heads=8, num_layers=2, train_length=64, context_length=256)
LECUN = 400**-0.5
"""1 / sqrt(model_dim)."""


def normal(std):
    return "normal", std


def uniform(limit):
    return "uniform", limit


STARTS = {
    "learned": {"table": normal(LECUN)},
    "t5": {"table": normal(LECUN)},
    "cope": {"table": 0.0, "weight": normal(LECUN)},
    "fox": {"weight": normal(LECUN), "gate_bias": 3.0},
    "fire": {
        "c": 0.1, "multiplier": 1.0,
        "w1": uniform(1.0), "b1": uniform(1.0), "w2": uniform(0.05), "b2": uniform(0.05),
    },
    "transformer_xl": {"w_r": normal(LECUN), "u": normal(0.02), "v": normal(0.02)},
    "shaw": {"table_k": uniform((6 / 251) ** 0.5), "table_v": uniform((6 / 251) ** 0.5)},
    "pope": {"phase": 0.0},
    "path": {
        "down": normal(LECUN), "up": normal(32**-0.5), "weight": normal(LECUN),
        "taps": uniform(3**-0.5), "start": 0.0,
    },
    "wall": {"weight": normal(LECUN), "gate_bias": 8.0},
    "grape_ap": {"weight": normal(LECUN)},
    "dape": {"w1": uniform(0.25), "b1": uniform(0.25), "w2": uniform(32**-0.5), "b2": uniform(32**-0.5)},
}  # fmt: skip
SETTINGS = {
    "cope": {"gate_keys": True},
    "fox": {"start_bias": 3.0},
    "fire": {"hidden": 400},
    "shaw": {"clip": 100},
}


@pytest.mark.parametrize("name", sorted(STARTS))
def test_parameters_start_as_documented(name):
    parameters = dict(POSITIONS[name](**SETTINGS.get(name, {})).build(SHAPE).named_parameters())
    for key, start in STARTS[name].items():
        values = parameters[key].detach()
        if isinstance(start, float):
            assert torch.equal(values, torch.full_like(values, start)), key
            continue
        kind, size = start
        if kind == "normal":
            assert values.std().item() == pytest.approx(size, rel=0.12), key
        else:
            assert values.abs().max() <= size, key
            assert values.std().item() == pytest.approx(size / 3**0.5, rel=0.35), key
