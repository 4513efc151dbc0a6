"""Peak memory is that of what was measured, not of what ran before; freed memory is used again."""

import os
import platform
import subprocess
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


STEPS = """
import resource, torch
from alibi_lm import runtime
runtime.start("cpu")
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(10 << 20) for _ in range(4)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print([faults() for _ in range(8)][-1])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told")
def test_a_step_uses_the_memory_of_the_step_before_unless_the_environment_says_otherwise():
    def page_faults(**variables: str) -> int:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
        ran = subprocess.run(
            [sys.executable, "-c", STEPS], env=environment | variables, capture_output=True, text=True, check=True
        )
        return int(ran.stdout)

    kept = page_faults()
    assert kept < 50
    # 160 MiB anew: 40,960 pages, or 80 huge ones.
    assert page_faults(MALLOC_TRIM_THRESHOLD_="131072") > kept + 60
