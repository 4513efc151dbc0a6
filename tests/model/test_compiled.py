"""The compiled step equals the eager one, and says what to do where nothing can be compiled."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from alibi_lm.attention.native import why_not
from alibi_lm.model.compiled import CompiledNats

ROOT = Path(__file__).resolve().parents[2]
STEP = """
import torch
from alibi_lm.model.compiled import CompiledNats
from alibi_lm.model.transformer import ModelConfig, TransformerLM
from alibi_lm.positions import POSITIONS
config = ModelConfig(num_layers=1, model_dim=8, num_heads=1, ffn_dim=8)
tokens = torch.zeros(1, 9, dtype=torch.int64)
CompiledNats(TransformerLM(config, POSITIONS["none"](), "sdpa", 50, 64))(tokens, tokens)
"""
SCHEMES = {"sdpa": ["none", "rotary", "alibi", "t5", "cope"], "native": ["none", "rotary", "alibi", "t5"]}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own modules, at their import
@pytest.mark.parametrize(("backend", "name"), [(b, name) for b in SCHEMES for name in SCHEMES[b]])
def test_one_graph_equals_the_eager_step(tiny_model, tmp_path, monkeypatch, backend, name):
    from torch._dynamo.utils import counters

    if backend == "native" and why_not():
        pytest.skip(why_not())
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.compiler.reset()
    counters.clear()
    model, results = tiny_model(name, backend), []
    tokens, targets = torch.randint(0, 50, (2, 2, 301))
    for nats in (model.nats, CompiledNats(model)):
        model.zero_grad()
        value = nats(tokens, targets)
        value.sum().backward()
        results.append([value.detach(), *(p.grad.clone() for p in model.parameters())])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.slow
def test_no_compiler_is_a_clear_error(tmp_path):
    variables = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    variables |= {"CXX": "/no/such/compiler", "PATH": "/nonexistent"}
    done = subprocess.run(
        [sys.executable, "-c", STEP], env=os.environ | variables, capture_output=True, text=True, timeout=500
    )
    assert done.returncode != 0
    message = "\n".join(done.stderr.strip().splitlines()[-3:])
    assert "ValueError: compile = true, but torch.compile failed here" in message
    assert "use compile=false" in " ".join(message.split())
