"""The compiled step equals the eager one, and says what to do where nothing can be compiled."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from alibi_lm.attention.native import why_not

ROOT = Path(__file__).resolve().parents[2]
STEP = """
import sys, torch
torch.manual_seed(0)
from alibi_lm.model.compiled import CompiledNats
from alibi_lm.model.transformer import ModelConfig, TransformerLM
from alibi_lm.positions import POSITIONS
config = ModelConfig(num_layers=2, model_dim=24, num_heads=3, ffn_dim=48)
for name in sys.argv[2:]:
    model = TransformerLM(config, POSITIONS[name](), sys.argv[1], 50, 64)
    tokens, targets = torch.randint(0, 50, (2, 301)), torch.randint(0, 50, (2, 301))
    results = []
    for nats in (model.nats, CompiledNats(model)):
        model.zero_grad()
        value = nats(tokens, targets)
        value.sum().backward()
        results.append([value.detach(), *(p.grad.clone() for p in model.parameters())])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)
    print(name, "equal")
"""


SCHEMES = {"sdpa": ["none", "rotary", "alibi", "t5", "cope"], "native": ["none", "rotary", "alibi", "t5"]}


def run(backend: str, schemes: list[str], tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, "-c", STEP, backend, *schemes], env=variables, capture_output=True, text=True, timeout=500
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend", ["sdpa", pytest.param("native", marks=pytest.mark.skipif(bool(why_not()), reason=why_not()))]
)
def test_equal_to_eager(tmp_path, backend):
    done = run(backend, SCHEMES[backend], tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == [f"{name} equal" for name in SCHEMES[backend]]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own modules, at their import
@pytest.mark.parametrize(("backend", "name"), [(b, name) for b in SCHEMES for name in SCHEMES[b]])
def test_the_layers_are_one_graph(tiny_model, backend, name):
    if backend == "native" and why_not():
        pytest.skip(why_not())
    torch.compiler.reset()
    model, tokens = tiny_model(name, backend), torch.randint(0, 50, (2, 301))
    hidden = torch.compile(model.hidden, backend="aot_eager", dynamic=False, fullgraph=True)
    torch.testing.assert_close(hidden(tokens), model.hidden(tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_no_compiler_is_a_clear_error(tmp_path):
    done = run("sdpa", ["none"], tmp_path, CXX="/no/such/compiler", PATH="/nonexistent")
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()
    message = "\n".join(last[-3:])
    assert "ValueError: compile = true, but torch.compile failed here" in message
    assert "use compile=false" in " ".join(message.split())
