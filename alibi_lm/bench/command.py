"""The benchmark from settings to results file."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from alibi_lm import runtime
from alibi_lm.bench import report
from alibi_lm.bench.config import BenchConfig
from alibi_lm.bench.measure import Round, repeat
from alibi_lm.bench.peer_process import PeerProcess
from alibi_lm.bench.profile import profile_step, profile_table
from alibi_lm.bench.subjects import Implementation, Task, ours

EPILOGUE = "Settings are given as name=value, for example: lengths=[256,1024] positions=[none,alibi] peers=false"


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark; returns the exit status."""
    if any(a in ("-h", "--help", "help") for a in arguments):
        print(f"Speed and memory per scheme, backend and length.\n{EPILOGUE}\n")
        print(OmegaConf.to_yaml(OmegaConf.structured(BenchConfig)))
        return 0
    try:
        bench(parse(arguments))
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def parse(arguments: Sequence[str]) -> BenchConfig:
    """Settings from name=value arguments.

    Raises:
        ValueError: an unknown name, a value of the wrong type, or one out of range.
    """
    for argument in arguments:
        if "=" not in argument:
            raise ValueError(f"{argument!r} is no setting. {EPILOGUE}")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(BenchConfig), OmegaConf.from_dotlist(list(arguments)))
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ValueError(f"{str(error).splitlines()[0]}. {EPILOGUE}") from error
    assert isinstance(config, BenchConfig)
    return config


def bench(config: BenchConfig) -> list[dict[str, Any]]:
    """Measure, print the tables, write results.jsonl; returns its rows."""
    if config.show is not None:
        known = report.read(Path(config.show))
        print(report.table(known))
        short = (report.ratios_markdown(known), report.speedups_markdown(known))
        print("".join(f"\n{part}\n" for part in short if part), end="")
        return known
    device = runtime.start(config.device, threads=config.threads)
    on_gpu = device.type == "cuda"
    config.lengths = config.lengths or ([512, 1024, 3072] if on_gpu else [256, 1024, 4096])
    config.eval_lengths = [16384] if config.eval_lengths is None else config.eval_lengths
    tokens = config.tokens or (9216 if on_gpu else 2048)
    sizes = config.model_config(device.type)
    vocab_size = config.vocab_size or (267744 if sizes.adaptive_cutoffs else 8192)

    subjects = list(ours(config, sizes, vocab_size, device))
    if config.profile:
        for n in config.lengths:
            task = Task(max(1, tokens // n), n, vocab_size, trains=True, clock=config.clock, first=False)
            shares = {f"{s.label} {s.backend}": profile_step(s, task) for s in subjects}
            print(f"\nlength {n}\n\n{profile_table(shares)}")
        return []
    with ExitStack() as stack:
        others: list[Implementation] = []
        if config.peers:
            process = stack.enter_context(PeerProcess(config, sizes, vocab_size, device))
            others += process.subjects
            for line in process.missing:
                print(line, file=sys.stderr)
        rounds = [
            Round(n, max(1, tokens // n), [*subjects, *others], vocab_size, True, config.clock)
            for n in config.lengths
        ]
        rounds += [
            Round(n, max(1, tokens // n), [s for s in subjects if not s.compiled], vocab_size, False, config.clock)
            for n in config.eval_lengths
            if n not in config.lengths
        ]
        print(f"{len(subjects) + len(others)} implementations, about {config.seconds:.0f} s", file=sys.stderr)

        def keep(done: Round) -> None:
            # What is measured stays, whatever becomes of the rest.
            report.write(Path(config.output_dir), report.rows(rounds, sizes, vocab_size))
            print(f"length {done.length}: round {len(done.seconds)}, {done.seconds[-1]:.1f} s", file=sys.stderr)

        repeat(rounds, config.seconds, keep)
    measured = report.rows(rounds, sizes, vocab_size)
    path = report.write(Path(config.output_dir), measured)
    print(report.table(measured))
    if on_gpu or sizes.adaptive_cutoffs:
        print(report.table_1(measured))
    print(f"\n{path}")
    return measured


__all__ = ["bench", "main", "parse"]
