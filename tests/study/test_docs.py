"""The pages on ALiBi and on reported bugs name tests that exist; what no other test covers is pinned here."""

import ast
import functools
import re
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from alibi_lm.model.transformer import ModelConfig, TransformerLM
from alibi_lm.positions import POSITIONS
from alibi_lm.positions.base import PositionShape

ROOT = Path(__file__).parents[2]


@functools.cache
def functions_of(file):
    return {node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize(("page", "least"), [("what_alibi_is.md", 18), ("field_bugs.md", 40)])
def test_every_row_names_tests_that_exist_or_says_that_there_is_nothing_to_test(page, least):
    text = (ROOT / "docs" / page).read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ") and not re.match(r"\| (what |---)", line)]
    assert len(rows) >= least
    for row in rows:
        assert "::test_" in row or "nothing to test" in row, row
    for file, name in re.findall(r"(tests/[\w/]+\.py)::(\w+)", text):
        assert name in functions_of(file), (file, name)


def built(name):
    return POSITIONS[name]().build(PositionShape(128, 16, 8, 2, 64, 64))


def test_alibi_saves_no_parameters_over_sinusoidal_or_rotary():
    counts = {name: sum(p.numel() for p in built(name).parameters()) for name in POSITIONS}
    assert counts["alibi"] == counts["sinusoidal"] == counts["rotary"] == counts["none"] == 0
    assert counts["learned"] == 64 * 128


def test_attention_with_alibi_is_as_quadratic_as_without():
    """Counted, not timed: twice the length quadruples what attention computes, with ALiBi as without positions."""
    sizes = ModelConfig(num_layers=1, model_dim=32, num_heads=2, ffn_dim=64)
    quadratic = {}
    for name in ("alibi", "none"):
        counts = []
        for length in (64, 128, 256):
            model = TransformerLM(sizes, POSITIONS[name](), "eager", 20, length)
            tokens = torch.zeros(1, length, dtype=torch.int64)
            with FlopCounterMode(display=False) as counter:
                model.log_prob(tokens, tokens)
            counts.append(counter.get_total_flops())
        # What grows with the length alone cancels in f(2n) - 2 f(n).
        quadratic[name] = [counts[1] - 2 * counts[0], counts[2] - 2 * counts[1]]
    assert quadratic["alibi"] == quadratic["none"] == [quadratic["none"][0], 4 * quadratic["none"][0]]
    assert quadratic["none"][0] > 0
