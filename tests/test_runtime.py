"""Peak memory is that of what was measured, not of what ran before."""

import sys

import pytest
import torch

from alibi_lm import runtime

CPU = torch.device("cpu")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_a_peak_is_forgotten_when_it_is_reset():
    def peak_of(megabytes: int) -> int:
        before = runtime.reset_peak_memory(CPU)
        torch.ones(megabytes << 18).sum()
        peak = runtime.peak_memory_bytes(CPU)
        assert before > 0 and peak is not None
        return (peak - before) >> 20

    assert 350 < peak_of(400) < 450
    assert 50 < peak_of(100) < 150
