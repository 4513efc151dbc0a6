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
length = 65536
sizes = ModelConfig(num_layers=4, model_dim=256, num_heads=8, ffn_dim=1024)
model = TransformerLM(sizes, POSITIONS["alibi"](), sys.argv[1], 8192, 1024, length)
tokens = np.random.default_rng(0).integers(0, 8192, length)
assert np.isfinite(score_tokens(model, tokens, 0, length)).all()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
"""

BACKENDS = ["sdpa", pytest.param("native", marks=pytest.mark.skipif(bool(why_not()), reason=why_not()))]


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_of_65536_tokens_in_4_gigabytes(backend):
    done = subprocess.run([sys.executable, "-c", SCORE, backend], capture_output=True, text=True, timeout=590)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) < 4e9
