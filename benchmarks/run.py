"""The benchmark from its settings to the file of results."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from alibi_lm import runtime
from alibi_lm.attention import ATTENTION
from alibi_lm.model.transformer import ModelConfig
from alibi_lm.positions import POSITIONS
from alibi_lm.results.speeds import PAIRS
from alibi_lm.runtime import DEVICES, PRECISIONS
from alibi_lm.settings import require, require_at_least, require_one_of
from benchmarks import report
from benchmarks.measure import Contest, measure
from benchmarks.peers import PeerProcess
from benchmarks.profile import profile_step, profile_table
from benchmarks.subjects import Implementation, Setup, Task, matmul_flops_per_second, ours

MODELS = Path(__file__).resolve().parents[1] / "configs" / "model"


@dataclass
class BenchConfig:
    """Speed and memory per scheme, backend and length."""

    model: str = "auto"
    """A name in configs/model, or `auto`: wiki103_base on a GPU; on a CPU 4 layers of width 256 with 8 heads, FFN
    1024 and 8,192 words."""
    vocab_size: int | None = None
    """Number of words; null: 8192, or with an adaptive vocabulary WikiText-103's 267744."""
    dropout: bool = False
    """Keep the dropout of a named model, as in the paper's Table 1; otherwise it is 0, to compare kernels."""
    positions: list[str] = field(default_factory=lambda: ["none", "alibi", "sinusoidal", "rotary", "t5"])
    """Our schemes to measure. `none` is always measured, because ratios refer to it."""
    backends: list[str] = field(default_factory=lambda: ["auto"])
    """Attention backends to measure the schemes with."""
    compile: bool = False
    """Also measure our schemes with torch.compile."""
    peers: bool = True
    """Measure other libraries if they are installed (pip install 'alibi_lm[bench]')."""
    flush_peers: bool = False
    """Flush denormal floats to zero for other libraries too; by default their users do not."""
    lengths: list[int] | None = None
    """Lengths of training and evaluation; null: 256 and 1024 on a CPU, the paper's 512, 1024, 3072 on a GPU."""
    eval_lengths: list[int] | None = None
    """Lengths of evaluation only, of our schemes; null: 4096 and 16384 on a CPU, 16384 on a GPU."""
    tokens: int | None = None
    """Tokens per step, at least one sequence; null: 1024 on a CPU and the paper's 9216 on a GPU."""
    seconds: float = 300.0
    """Time limit in seconds: no pair of steps begins that would end later, except the first of each
    implementation and length."""
    show: str | None = None
    """A file of results: print its tables and measure nothing."""
    profile: bool = False
    """Instead of speeds, report where the time of our training steps goes on the CPU, at each length."""
    device: str = "auto"
    precision: str = "auto"
    """Precision of training. auto: bfloat16 on a GPU, else float32. Evaluation is always in float32."""
    threads: int | None = None
    """CPU threads; null: torch's choice."""
    clock: str = "wall"
    """`wall`, or `cpu`: CPU time of the computing process, for busy machines; only with threads=1 and on a
    CPU."""
    output_dir: str = "outputs/bench"
    """The folder for results.jsonl."""

    def __post_init__(self) -> None:
        names = ["auto", *sorted(path.stem for path in MODELS.glob("*.yaml"))]
        require_one_of("model", self.model, names)
        for setting, allowed in (("positions", POSITIONS), ("backends", ATTENTION)):
            chosen = getattr(self, setting)
            require(bool(chosen), f"{setting} = []. Name at least one of {', '.join(allowed)}.")
            for name in chosen:
                require(name in allowed, f"{setting} = {chosen}. Allowed: {', '.join(allowed)}.")
        require(self.lengths != [] or bool(self.eval_lengths), "lengths = []. Give one, like lengths=[256].")
        for length in [*(self.lengths or []), *(self.eval_lengths or [])]:
            require(2 <= length <= 1 << 20, f"lengths hold {length}. Use whole numbers from 2 to 1048576.")
        for setting, least in (("tokens", 2), ("vocab_size", 8), ("threads", 1)):
            require_at_least(setting, getattr(self, setting), least)
        require_one_of("device", self.device, DEVICES)
        require_one_of("precision", self.precision, PRECISIONS)
        require_one_of("clock", self.clock, ("wall", "cpu"))
        require(
            self.clock == "wall" or (self.threads == 1 and self.device != "cuda"),
            f"clock = cpu with threads = {self.threads}. CPU time gives the speed of one thread: use threads=1.",
        )
        require(0 < self.seconds < float("inf"), f"seconds = {self.seconds}. Use a number > 0.")

    def model_config(self, device_type: str) -> ModelConfig:
        """Sizes of the measured model on this type of device."""
        from omegaconf import OmegaConf

        name = self.model
        if name == "auto":
            if device_type == "cpu":
                return ModelConfig(num_layers=4, model_dim=256, num_heads=8, ffn_dim=1024)
            name = "wiki103_base"
        settings = OmegaConf.to_container(OmegaConf.load(MODELS / f"{name}.yaml"))
        assert isinstance(settings, dict)
        settings.pop("defaults", None)
        if not self.dropout:
            settings |= {k: 0.0 for k in settings if str(k).endswith("dropout")}
        return ModelConfig(**{str(k): v for k, v in settings.items()})


def bench(config: BenchConfig) -> list[dict[str, Any]]:
    """Measure, print the tables, write results.jsonl; returns its rows.

    Raises:
        ValueError: settings that do not fit together, or a file for `show` that holds no rows.
        RuntimeError: the process of the other libraries died.
    """
    if config.show is not None:
        known = report.read(Path(config.show))
        parts = (report.table(known), report.ratios_markdown(known), report.speedups_markdown(known))
        print("\n\n".join(part.rstrip() for part in parts if part))
        return known
    device = runtime.start(config.device, threads=config.threads)
    on_gpu = device.type == "cuda"
    lengths = ([512, 1024, 3072] if on_gpu else [256, 1024]) if config.lengths is None else config.lengths
    eval_lengths = ([16384] if on_gpu else [4096, 16384]) if config.eval_lengths is None else config.eval_lengths
    tokens = config.tokens or (9216 if on_gpu else 1024)
    sizes = config.model_config(device.type)
    vocab_size = config.vocab_size or (267744 if sizes.adaptive_cutoffs else 8192)
    precision = config.precision
    if precision == "auto":
        precision = "bfloat16" if on_gpu and torch.cuda.is_bf16_supported() else "float32"
    longest = max([*lengths, *eval_lengths])
    setup = Setup(
        sizes,
        vocab_size,
        max(lengths or [longest]),
        longest,
        device,
        precision,
        config.clock,
        tuple(config.positions),
    )
    subjects = ours(setup, config.positions, config.backends, config.compile)
    tasks = [Task(max(1, tokens // n), n) for n in dict.fromkeys(lengths)]
    if config.profile:
        for task in tasks:
            shares = {subject.label: profile_step(subject, task) for subject in subjects}
            print(f"\nlength {task.length}\n\n{profile_table(shares)}")
        return []

    with ExitStack() as stack:
        others: list[Implementation] = []
        if config.peers and lengths:
            process = stack.enter_context(PeerProcess(setup, config.flush_peers))
            others += process.subjects
            print("".join(f"{line}\n" for line in process.missing), end="", file=sys.stderr)
        reference, *own = subjects
        contests = [Contest(reference, one, task) for task in tasks for one in [*own, *others] or [reference]]
        for n in dict.fromkeys(n for n in eval_lengths if n not in lengths):
            task = Task(max(1, tokens // n), n, trains=False)
            uncompiled = [one for one in own if not one.compiled]
            contests += [Contest(reference, one, task) for one in uncompiled or [reference]]

        path = Path(config.output_dir) / "results.jsonl"
        began = written = time.monotonic()
        with tqdm(total=round(config.seconds), unit="s", disable=None) as bar:

            def after(contest: Contest) -> None:
                nonlocal written
                now = time.monotonic()
                bar.set_description(f"{contest.subject.label} at {contest.task.length}, pair {len(contest.pairs)}")
                bar.update(round(now - began) - bar.n)
                if now > written + 10:  # keep what is measured, even if the rest fails
                    written = now
                    report.write(path, report.rows(contests, config.model, setup))

            try:
                measure(
                    contests,
                    config.seconds,
                    partial(matmul_flops_per_second, setup),
                    after,
                    turn=PAIRS if on_gpu else 1,
                )
            finally:
                measured = report.rows(contests, config.model, setup)
                if measured:
                    report.write(path, measured)
    print(report.table(measured))
    if on_gpu or sizes.adaptive_cutoffs:
        print(report.table_1(measured))
    print(f"\n{path}")
    return measured
