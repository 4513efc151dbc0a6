"""Per-token results on disk: the nats of every target, written once and used again by every analysis.

    <folder>/<run>/<split>_<mode>_<length>.nats     float32, one number a target, in stream order
    <folder>/<run>/<split>_<mode>_<length>.json     what they are the result of, how long it took, a fingerprint

The `.json` holds the hashes of everything that the numbers depend on: weights, settings of model and scheme,
token stream, precision. Results are used again only if all of it is the same; otherwise they are computed anew
and replaced. Both files are whole or absent, and a pair that does not belong together counts as absent, so
that an interruption at any moment costs one pass at most. The folder may be deleted at any time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alibi_lm import runtime
from alibi_lm.checkpoint import STATE_FILE, WEIGHTS_FILE, CheckpointStore
from alibi_lm.config import TrainConfig
from alibi_lm.data.corpus import Corpus
from alibi_lm.distributed import World, gather_objects
from alibi_lm.files import fingerprint, read_json, whole_file

FORMAT = 1
"""Raised when the same inputs would give other numbers: the results of another format are not used."""

log = logging.getLogger("alibi_lm")


@dataclass(frozen=True)
class Scoring:
    """One way of giving every target of a split its context."""

    split: str
    mode: str
    """nonoverlapping, sliding, or the name of another protocol (`fixed`)."""
    length: int
    """Tokens of a window."""
    stride: int | None = None
    """Targets scored in a window, in sliding mode; every how many targets one is scored, in others."""
    window: int | None = None
    """Limit of the attention distance in every layer; None for no limit."""
    first: int | None = None
    """First scored target, where it is not the stream's first."""

    @property
    def slug(self) -> str:
        """For file names: `validation_sliding32_128`."""
        stride = "" if self.stride is None else str(self.stride)
        window = "" if self.window is None else f"_window{self.window}"
        first = "" if self.first is None else f"_from{self.first}"
        return f"{self.split}_{self.mode}{stride}_{self.length}{window}{first}"


@dataclass(frozen=True)
class Stored:
    """Nats of a pass.

    Attributes:
        nats: (targets,) float32, natural-log units; a read-only memory map where it came from the disk.
        seconds: that the pass took when it was made.
        peak_memory_bytes: of that pass.
        commit: of the code that made it.
        reused: whether it was on the disk already.
    """

    nats: np.ndarray
    seconds: float
    peak_memory_bytes: int | None
    commit: str | None
    reused: bool


class TokenStore:
    """The per-token results of any number of runs.

    Args:
        folder: made by the first `write`.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def path(self, run: str, scoring: Scoring) -> Path:
        """Where the nats of a pass lie (its record has the suffix `.json`)."""
        name = re.sub(r"[^A-Za-z0-9_.+=-]", "_", run)
        if name != run or len(name) > 120:  # names that were changed must stay apart
            name = f"{name[:100]}-{hashlib.sha256(run.encode()).hexdigest()[:8]}"
        return self.folder / name / f"{scoring.slug}.nats"

    def read(self, run: str, scoring: Scoring, identity: dict[str, Any]) -> Stored | None:
        """The stored result of a pass, or None where there is none, or it is damaged or of something else."""
        path = self.path(run, scoring)
        try:
            record = read_json(path.with_suffix(".json"))
            if record.get("identity") != _plain(identity, scoring):
                return None
            if path.stat().st_size != 4 * record["targets"] or fingerprint(path) != record["fingerprint"]:
                log.warning("%s is damaged; it is made again", path)
                return None
            nats = np.memmap(path, dtype="<f4", mode="r")
            return Stored(nats, record["seconds"], record["peak_memory_bytes"], record["commit"], True)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, run: str, scoring: Scoring, identity: dict[str, Any], result: Stored) -> None:
        """Keep a result, replacing what is there.

        Raises:
            OSError: as from the system, a full disk included; no part of the result stays.
        """
        path = self.path(run, scoring)
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            file.write(result.nats.astype("<f4").tobytes())
        record = {
            "identity": _plain(identity, scoring),
            "targets": len(result.nats),
            "fingerprint": fingerprint(path),
            "seconds": result.seconds,
            "peak_memory_bytes": result.peak_memory_bytes,
            "commit": result.commit,
        }
        with whole_file(path.with_suffix(".json")) as file:
            file.write((json.dumps(record, indent=1) + "\n").encode())

    def get(
        self,
        run: str,
        scoring: Scoring,
        identity: dict[str, Any],
        compute: Callable[[], np.ndarray],
        memory: Callable[[], int | None] = lambda: None,
        world: World | None = None,
    ) -> Stored:
        """The stored result, or a new one, which is then kept.

        Args:
            run: label of the run, with its test-time changes.
            scoring: the pass.
            identity: everything else that the result depends on, see `identity`.
            compute: makes the pass: () -> (targets,) floats. All processes enter it, or none.
            memory: asked for the peak memory in bytes after `compute`.
            world: processes that share the pass.
        """
        world = world or World()
        found = self.read(run, scoring, identity)
        # Processes may see different disks; `compute` needs all of them.
        if all(gather_objects(found is not None, world)):
            assert found is not None
            return found
        started = time.perf_counter()
        nats = compute()
        seconds = time.perf_counter() - started
        result = Stored(nats.astype(np.float32), seconds, memory(), runtime.code_version()[0], False)
        # What is not finite must not be believed again: its cause may be gone by the next call.
        if world.is_main and bool(np.isfinite(result.nats).all()):
            self.write(run, scoring, identity, result)
        return result


def identity(
    config: TrainConfig,
    run_folder: Path,
    checkpoint: str,
    overrides: dict[str, Any],
    corpus: Corpus,
    split: str,
    attention: str,
    precision: str,
) -> dict[str, Any]:
    """What the nats of a run depend on, beside the way in which they are scored.

    Args:
        config: of the run.
        run_folder: its folder.
        checkpoint: `best` or `last`.
        overrides: test-time changes of the scheme's settings.
        corpus: the evaluated text.
        split: its evaluated split.
        attention: backend.
        precision: of the forward pass.

    Returns:
        Plain JSON values.

    Raises:
        ValueError: there is no whole checkpoint.
    """
    found = CheckpointStore(Path(run_folder) / "checkpoints").get(checkpoint)
    assert found is not None
    settings = {
        "model": dataclasses.asdict(config.model),
        "position": dataclasses.asdict(config.position),
        "train_length": config.train_length,
    }
    stream = corpus.split(split)
    return {
        "weights": read_json(found.path / STATE_FILE)["files"][WEIGHTS_FILE]["sha256"],
        "settings": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
        "position": overrides,
        "tokens": stream.sha256,
        "start_id": corpus.start_id,
        "attention": attention,
        "precision": precision,
    }


def _plain(identity: dict[str, Any], scoring: Scoring) -> dict[str, Any]:
    """As it comes back from JSON."""
    everything = {"format": FORMAT, "scoring": dataclasses.asdict(scoring), **identity}
    return json.loads(json.dumps(everything, default=str))
