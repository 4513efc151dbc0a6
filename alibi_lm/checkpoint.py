"""The checkpoints of a run: which one is newest, which is best, which may go.

    checkpoints/step-00000100/     one checkpoint, see checkpoint_format.py
    checkpoints/best.json          which step has the best validation loss

A checkpoint is written beside its place, forced to disk and renamed, so a process that dies at any
moment leaves a whole checkpoint or a `.tmp-` folder that nobody reads. Reading checks the hash of
every file; what does not match is reported and the next older one is taken.
"""

import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from alibi_lm.checkpoint_format import Checkpoint, write_checkpoint
from alibi_lm.files import read_json, sync_folder, write_json

BEST_FILE = "best.json"

_FOLDER = re.compile(r"step-(\d{8,})(\.old)?")

log = logging.getLogger("alibi_lm")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written. Those written before are untouched."""


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: `<run folder>/checkpoints`; made by the first `save`.
        keep_last: how many of the newest checkpoints to keep, 1 or more.
        keep_every: checkpoints at multiples of this step are kept for good; 0 for none.

    The best one is always kept. One process writes; any number may read meanwhile.
    """

    def __init__(self, folder: Path, keep_last: int = 1, keep_every: int = 0):
        if keep_last < 1:
            raise ValueError(f"keep_last = {keep_last}: at least 1 checkpoint must be kept to resume from.")
        if keep_every < 0:
            raise ValueError(f"keep_every = {keep_every}: give a number of steps, or 0 to keep none for good.")
        self.folder = Path(folder)
        self.keep_last = keep_last
        self.keep_every = keep_every

    def save(self, step: int, model: nn.Module, optimizer: Optimizer | None, state: Mapping[str, Any]) -> Path:
        """Writes the checkpoint of `step` and removes those that the policy no longer keeps.

        Args:
            step: optimizer steps done, 0 or more.
            model: parameters and persistent buffers of any dtype; prefixes that `torch.compile` and
                data parallel wrappers add are left out.
            optimizer: over parameters of `model`, or None.
            state: values that JSON can hold; given back as `Checkpoint.state`.

        Returns:
            The checkpoint's folder.

        Raises:
            CheckpointError: the disk is full or cannot be written; nothing of this checkpoint stays
                and the earlier ones are untouched.
        """
        target = self._path(step)
        partial = self.folder / f".tmp-{target.name}"
        try:
            self._remove_leftovers()
            partial.mkdir(parents=True)
            write_checkpoint(partial, step, model, optimizer, state)
            # A checkpoint of the same step steps aside until the new one is in place.
            if target.exists():
                aside = target.with_name(target.name + ".old")
                _remove(aside)
                os.rename(target, aside)
            os.rename(partial, target)
            sync_folder(self.folder)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if not isinstance(error, OSError):
                raise
            newest = self.steps()[-1:]
            kept = f"The checkpoint of step {newest[0]} is kept" if newest else "There is no earlier checkpoint"
            raise CheckpointError(
                f"The checkpoint of step {step} could not be written to {self.folder} "
                f"({error.strerror or error}). {kept}. "
                "Make room or give an output_dir that can be written, then give the same command again."
            ) from error
        self._prune(step)
        return target

    def mark_best(self, step: int, state: Mapping[str, Any]) -> None:
        """Names the checkpoint of `step` the best one, with what the caller wants to note (its loss).

        Raises:
            ValueError: there is no checkpoint of that step.
            CheckpointError: the disk is full or cannot be written.
        """
        if not self._path(step).is_dir():
            raise ValueError(f"there is no checkpoint of step {step} in {self.folder} to be the best one")
        try:
            write_json(self.folder / BEST_FILE, {"step": step, **state})
        except OSError as error:
            raise CheckpointError(
                f"{self.folder / BEST_FILE} could not be written ({error.strerror or error}). "
                "Make room, then give the same command again."
            ) from error

    def steps(self) -> list[int]:
        """Steps of the checkpoints that lie here, whole or not, ascending."""
        return sorted({step for step, _ in self._candidates()})

    def latest(self) -> "Checkpoint | None":
        """The newest whole checkpoint, or None; torn and altered ones are reported and skipped."""
        for step, path in self._candidates():
            checkpoint = self._open(step, path)
            if checkpoint is not None:
                return checkpoint
        return None

    def best(self) -> "Checkpoint | None":
        """The checkpoint marked best, or None when none was marked or it is not whole any more."""
        best_step = self._best_step()
        for step, path in self._candidates():
            if step == best_step:
                checkpoint = self._open(step, path)
                if checkpoint is not None:
                    return checkpoint
        return None

    def get(self, which: str) -> "Checkpoint":
        """The best or the last whole checkpoint.

        Raises:
            ValueError: another word, or there is no such checkpoint.
        """
        if which not in ("best", "last"):
            raise ValueError(f"checkpoint = {which!r} is not known. Use best or last.")
        checkpoint = self.best() if which == "best" else self.latest()
        if checkpoint is None:
            other = " Use checkpoint=last." if which == "best" and self.steps() else ""
            raise ValueError(
                f"checkpoint = {which}: {self.folder} holds no whole {which} checkpoint.{other} "
                "Give the training command again to write one."
            )
        return checkpoint

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _candidates(self) -> list[tuple[int, Path]]:
        """(step, folder) of what looks like a checkpoint, newest first, `.old` after its successor."""
        if not self.folder.is_dir():
            return []
        matches = [(_FOLDER.fullmatch(path.name), path) for path in self.folder.iterdir()]
        found = [(int(match[1]), match[2] is not None, path) for match, path in matches if match]
        return [(step, path) for step, _, path in sorted(found, key=lambda item: (-item[0], item[1]))]

    def _open(self, step: int, path: Path) -> "Checkpoint | None":
        try:
            return Checkpoint(path, step)
        except (ValueError, OSError) as error:
            log.warning("Skipping the checkpoint %s: %s", path, error)
            return None

    def _best_step(self) -> int | None:
        try:
            step = read_json(self.folder / BEST_FILE).get("step")
        except FileNotFoundError:
            return None
        except ValueError as error:
            log.warning("%s; taken as absent", error)
            return None
        return step if type(step) is int else None

    def _remove_leftovers(self) -> None:
        for path in self.folder.glob(".tmp-*"):
            _remove(path)

    def prune(self) -> None:
        """Removes what the policy does not keep. `save` does that too, unless it was killed on the way."""
        newest = self.latest()
        if newest is not None:
            self._prune(newest.step)

    def _prune(self, newest: int) -> None:
        """Counts from `newest`, which is known to be whole; later ones are torn, or training had gone on there."""
        steps = [step for step in self.steps() if step <= newest]
        keep = {*steps[-self.keep_last :], self._best_step()}
        if self.keep_every:
            keep |= {step for step in steps if step % self.keep_every == 0}
        try:
            self._remove_leftovers()
            for step, path in self._candidates():
                superseded = path.suffix == ".old" and self._path(step).is_dir()
                if superseded or step not in keep:
                    # Renamed first: a kill while files vanish leaves no torn checkpoint to report.
                    doomed = self.folder / f".tmp-{path.name}"
                    os.rename(path, doomed)
                    shutil.rmtree(doomed)
        except OSError as error:
            log.warning("An old checkpoint in %s could not be removed: %s", self.folder, error)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.exists() or path.is_symlink():
        path.unlink()


__all__ = ["Checkpoint", "CheckpointError", "CheckpointStore"]
