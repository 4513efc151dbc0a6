"""A window of 65,536 tokens fits: the peak of a fresh process, so that nothing else counts."""

import subprocess
import sys

import pytest

from alibi_lm.attention.native import why_not

SCORE = """
import resource, sys
import numpy as np
from alibi_lm import runtime
runtime.start("cpu")
from alibi_lm.evaluate.score import score_tokens
from alibi_lm.model.transformer import ModelConfig, TransformerLM
from alibi_lm.positions import POSITIONS
length = int(sys.argv[2])
sizes = ModelConfig(num_layers=4, model_dim=256, num_heads=8, ffn_dim=1024)
model = TransformerLM(sizes, POSITIONS[sys.argv[1]](), sys.argv[3], 8192, 1024, length)
tokens = np.random.default_rng(0).integers(0, 8192, length)
assert np.isfinite(score_tokens(model, tokens, 0, length)).all()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
"""

BACKENDS = ["sdpa", pytest.param("native", marks=pytest.mark.skipif(bool(why_not()), reason=why_not()))]


def peak(scheme: str, length: int, backend: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", SCORE, scheme, str(length), backend], capture_output=True, text=True, timeout=590
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_of_65536_tokens_in_4_gigabytes(backend):
    assert peak("alibi", 65536, backend) < 4e9


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["sinusoidal", "rotary", "t5"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_grows_no_faster_than_the_length(scheme, backend):
    short, long = peak(scheme, 4096, backend), peak(scheme, 16384, backend)
    # One (H, T, T) tensor would take 0.5 GB at 4096 tokens and 8.6 GB at 16384.
    assert long - short < 4e9 * 12288 / 65536
