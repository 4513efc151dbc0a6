"""Other libraries' models in a process of their own, set up as their users have it.

Our own process keeps freed memory and flushes denormal floats to zero (`runtime.start`), which would make the
peers faster than they are elsewhere.
"""

from __future__ import annotations

import multiprocessing
import sys
import traceback
import warnings
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import torch

from alibi_lm.bench.config import BenchConfig
from alibi_lm.bench.peers import peers
from alibi_lm.bench.subjects import Implementation, Measurement, Subject, Task
from alibi_lm.model.transformer import ModelConfig


@dataclass
class RemoteSubject(Implementation):
    """A subject that lives in the peers' process."""

    parameters: int
    index: int
    process: PeerProcess

    @property
    def num_parameters(self) -> int:
        """Trained numbers."""
        return self.parameters

    def measure(self, task: Task) -> Measurement:
        """Have the process do a task; where that fails, a line on standard error and no times.

        Raises:
            RuntimeError: the process is gone.
        """
        measured = self.process.ask((self.index, task))
        if isinstance(measured, str):
            print(f"{self.label} at length {task.length}: {measured}", file=sys.stderr)
            return Measurement(None, None)
        return measured


class PeerProcess:
    """The process, which ends with the `with` block.

    Attributes:
        subjects: the peers found there.
        missing: a line for each that is not measured, and why.

    Args:
        config: what to measure.
        sizes: of the models.
        vocab_size: words.
        device: where to measure.

    Raises:
        RuntimeError: the process ended before it had built its models.
    """

    def __init__(self, config: BenchConfig, sizes: ModelConfig, vocab_size: int, device: torch.device) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, config, sizes, vocab_size, device, torch.get_num_threads()), daemon=True
        )
        self._process.start()
        theirs.close()
        found, self.missing = self.ask(None)
        self.subjects = [
            RemoteSubject(
                name,
                position,
                backend,
                False,
                device,
                config.precision,
                config.flush_peers,
                parameters,
                index,
                self,
            )
            for index, ((name, position, backend), parameters) in enumerate(found)
        ]

    def ask(self, request: tuple[int, Task] | None) -> Any:
        """One answer of the process.

        Raises:
            RuntimeError: it is gone.
        """
        try:
            self._connection.send(request)
            return self._connection.recv()
        except (EOFError, OSError) as error:
            self._process.join(10)
            raise RuntimeError(
                f"the process of the other libraries ended with status {self._process.exitcode}, most likely for "
                "want of memory. Use shorter lengths, or peers=false."
            ) from error

    def __enter__(self) -> PeerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()


def _serve(
    connection: Connection,
    config: BenchConfig,
    sizes: ModelConfig,
    vocab_size: int,
    device: torch.device,
    threads: int,
) -> None:
    """Build the peers, then answer one request after the other until the other side is gone."""
    torch.set_flush_denormal(config.flush_peers)
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")  # peers' own
    subjects: list[Subject] = []
    missing: list[str] = []
    for peer in peers(config, sizes, vocab_size, device):
        missing.append(peer) if isinstance(peer, str) else subjects.append(peer)
    described = [((s.implementation, s.position, s.backend), s.num_parameters) for s in subjects]
    while True:
        try:
            request = connection.recv()
        except (EOFError, OSError):
            return
        connection.send((described, missing) if request is None else _measure(subjects[request[0]], request[1]))


def _measure(subject: Subject, task: Task) -> Measurement | str:
    """What a task took, or what went wrong in a line."""
    try:
        return subject.measure(task)
    except Exception as error:
        return traceback.format_exception_only(error)[-1].strip()
