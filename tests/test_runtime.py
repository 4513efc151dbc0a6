"""Peak memory is that of what was measured, not of what ran before; freed memory is used again."""

import itertools
import os
import platform
import subprocess
import sys
from pathlib import Path

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


@pytest.mark.slow
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


# --- cores, threads, output, commit --------------------------------------------------------------


def test_allowed_cores_are_the_fewest_that_anyone_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)))
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(runtime, "_container_cores", lambda: [])
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    assert runtime.allowed_cores() == 6
    for slurm, cores in (("4", 4), ("0", 1), ("many", 6), ("12", 6)):
        monkeypatch.setenv("SLURM_CPUS_PER_TASK", slurm)
        assert runtime.allowed_cores() == cores, slurm
    monkeypatch.setattr(runtime, "_container_cores", lambda: [2.5])
    assert runtime.allowed_cores() == 2
    monkeypatch.setattr(runtime, "_container_cores", lambda: [0.5])
    assert runtime.allowed_cores() == 1


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, []),
        ({"cpu.max": "max 100000\n"}, []),
        ({"cpu.max": "150000 100000\n"}, [1.5]),
        ({"cpu.max": "rubbish"}, []),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, []),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, [3.0]),
    ],
    ids=str,
)
def test_limits_of_control_groups(tmp_path: Path, files: dict[str, str], cores: list[float]) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert runtime._container_cores(tmp_path) == cores


@pytest.mark.parametrize("threads", [0, -1, 1025, 100_000, 2**70])
def test_numbers_of_threads_out_of_range(threads: int) -> None:
    with pytest.raises(ValueError, match=f"threads = {threads}. Use 1 to 1024"):
        runtime.start("cpu", threads=threads)


def test_the_commit_where_there_is_no_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("no git")))
    for value, commit in (("abc123", "abc123"), ("", None)):
        runtime.code_version.cache_clear()
        monkeypatch.setenv("ALIBI_LM_COMMIT", value)
        assert runtime.code_version() == (commit, None)
    runtime.code_version.cache_clear()


def test_gpus_do_without_the_attention_of_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        assert runtime.start("cuda", 1) == torch.device("cuda", 1)
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_each_seed_step_and_process_draws_its_own_numbers() -> None:
    cases = list(itertools.product((0, 1, 2, 2**31), range(40), range(8)))
    seeds = {runtime.step_seed(*case) for case in cases}
    assert len(seeds) == len(cases) and all(0 <= seed < 2**63 for seed in seeds)
    assert runtime.step_seed(3, 5) == runtime.step_seed(3, 5, 0)
