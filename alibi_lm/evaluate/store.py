"""Per-target results on disk: the nats of every target, written once and reused by every analysis.

    <folder>/<run>/<split>_<mode>_<length>-<hash>.nats     float32, one number per target, in order
    <folder>/<run>/<split>_<mode>_<length>-<hash>.hits     one byte per target, for tasks that ask for hits
    <folder>/<run>/<split>_<mode>_<length>-<hash>.json     what the results depend on, and fingerprints

The hash covers everything that the numbers depend on: weights, settings of model and scheme, backend,
precision, targets, and how they are scored. So different results lie side by side and never replace each
other. Every file is whole or absent, and files that do not belong together count as absent, so that an
interruption costs one pass at most. The folder may be deleted at any time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alibi_lm.files import fingerprint, read_json, whole_file

FORMAT = 2
"""Increased when the same inputs would give other numbers: results of another format are not used."""

log = logging.getLogger("alibi_lm")


@dataclass(frozen=True)
class Scoring:
    """How every target of a split gets its context."""

    split: str
    mode: str
    """nonoverlapping, sliding, items, or the name of another protocol (`fixed`)."""
    length: int
    """Tokens per window."""
    stride: int | None = None
    """In sliding mode, targets scored per window; in other modes, the spacing of the scored targets."""
    window: int | None = None
    """Limit of the attention distance in every layer; None for no limit."""
    first: int | None = None
    """First scored target, if it is not the stream's first."""
    task: str = "text"

    @property
    def slug(self) -> str:
        """For file names: `validation_sliding32_128`."""
        task = "" if self.task == "text" else f"{self.task}_"
        stride = "" if self.stride is None else str(self.stride)
        window = "" if self.window is None else f"_window{self.window}"
        first = "" if self.first is None else f"_from{self.first}"
        return f"{task}{self.split}_{self.mode}{stride}_{self.length}{window}{first}"


@dataclass(frozen=True)
class Stored:
    """The result of a pass.

    Attributes:
        nats: (targets,) float32, natural-log units; a read-only memory map if it was read from disk.
        hits: (targets,) bool, or None if they were not asked for.
        seconds: how long the pass took when it was computed.
        peak_memory_bytes: peak memory of that pass.
        commit: commit of the code that computed it.
    """

    nats: np.ndarray
    hits: np.ndarray | None
    seconds: float
    peak_memory_bytes: int | None
    commit: str | None


class TokenStore:
    """The per-target results of any number of runs, in a folder that the first `write` creates."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def path(self, run: str, scoring: Scoring, identity: dict[str, Any]) -> Path:
        """Path of the nats of a pass (the hits, and the record with the suffix `.json`, are beside it)."""
        name = re.sub(r"[^A-Za-z0-9_.+=-]", "_", run)
        if name != run or len(name) > 120:  # names that were changed must stay apart
            name = f"{name[:100]}-{hashlib.sha256(os.fsencode(run)).hexdigest()[:8]}"
        digest = hashlib.sha256(json.dumps(_plain(identity, scoring), sort_keys=True).encode()).hexdigest()
        return self.folder / name / f"{scoring.slug}-{digest[:12]}.nats"

    def read(self, run: str, scoring: Scoring, identity: dict[str, Any], hits: bool = False) -> Stored | None:
        """The stored result of a pass; None if there is none (or none with hits, if wanted), or it is damaged."""
        path = self.path(run, scoring, identity)
        try:
            record = read_json(path.with_suffix(".json"))
            if record["identity"] != _plain(identity, scoring):
                return None
            found = []
            for suffix, dtype in ((".nats", "<f4"), (".hits", "|b1"))[: 1 + hits]:
                file, digest = path.with_suffix(suffix), record["fingerprints"].get(suffix)
                if digest is None:
                    return None
                size = np.dtype(dtype).itemsize * record["targets"]
                if file.stat().st_size != size or fingerprint(file) != digest:
                    log.warning("%s is damaged; it is made again", file)
                    return None
                found.append(np.memmap(file, dtype=dtype, mode="r"))
            details = (record[name] for name in ("seconds", "peak_memory_bytes", "commit"))
            return Stored(found[0], found[1] if hits else None, *details)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def write(self, run: str, scoring: Scoring, identity: dict[str, Any], result: Stored) -> None:
        """Keep a result, replacing what is there.

        Raises:
            OSError: as raised by the system, also for a full disk; no part of the result stays.
        """
        path = self.path(run, scoring, identity)
        path.parent.mkdir(parents=True, exist_ok=True)
        contents = {".nats": result.nats.astype("<f4")}
        if result.hits is not None:
            contents[".hits"] = result.hits.astype("|b1")
        for suffix, array in contents.items():
            with whole_file(path.with_suffix(suffix)) as file:
                file.write(array.tobytes())
        record = {
            "identity": _plain(identity, scoring),
            "targets": len(result.nats),
            "fingerprints": {suffix: fingerprint(path.with_suffix(suffix)) for suffix in contents},
            "seconds": result.seconds,
            "peak_memory_bytes": result.peak_memory_bytes,
            "commit": result.commit,
        }
        with whole_file(path.with_suffix(".json")) as file:
            file.write((json.dumps(record, indent=1) + "\n").encode())


def _plain(identity: dict[str, Any], scoring: Scoring) -> dict[str, Any]:
    """The identity as JSON would return it."""
    everything = {"format": FORMAT, "scoring": dataclasses.asdict(scoring), **identity}
    return json.loads(json.dumps(everything, default=str))
