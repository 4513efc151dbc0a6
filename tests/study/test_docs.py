"""The page about ALiBi names tests that exist, and what it says that no other test covers is pinned here."""

import ast
import re
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from alibi_lm.model.transformer import ModelConfig, TransformerLM
from alibi_lm.positions import POSITIONS
from alibi_lm.positions.base import PositionShape

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "what_alibi_is.md").read_text()
NODE_IDS = sorted(set(re.findall(r"(tests/[\w/]+\.py)::(\w+)", PAGE)))


def test_every_test_that_the_page_names_exists():
    assert len(NODE_IDS) >= 20
    for file, name in NODE_IDS:
        tree = ast.parse((ROOT / file).read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, (file, name)


def test_every_mistake_has_a_test_or_says_that_there_is_nothing_to_test():
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| what ")]
    rows = [line for line in rows if not set(line) <= set("| -")]
    assert len(rows) == 18
    for line in rows:
        assert "::test_" in line or "nothing to test" in line, line


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
