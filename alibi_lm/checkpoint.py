"""The checkpoints of a run: tensors, a JSON record with their hashes, and nothing that can run code.

    checkpoints/step-00000100/          one checkpoint, after step 100
        weights.safetensors             state dict, tied tensors once
        optimizer.safetensors           `<parameter name>/<entry>`; absent without optimizer
        state.json                      step, the trainer's state, optimizer options, sizes and hashes
    checkpoints/best.json               which step has the best validation loss

A checkpoint is written beside its place, forced to disk and renamed, so a process that dies at any moment leaves
a whole checkpoint or a `.tmp-` folder that nobody reads. Reading checks the size and hash of every file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from alibi_lm.files import read_json, read_json_if_whole, sha256_of, sync_folder, whole_file, write_json
from alibi_lm.settings import listing, require

WEIGHTS_FILE = "weights.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
BEST_FILE = "best.json"
FORMAT = 1

_FOLDER = re.compile(r"step-(\d{8,})(\.old)?")

log = logging.getLogger("alibi_lm")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written. Those written before are untouched."""


class CheckpointStore:
    """The checkpoints of one run. One process writes; any number may read meanwhile.

    Args:
        folder: `<run folder>/checkpoints`; made by the first `save`.
        keep_last: how many of the newest checkpoints to keep beside the best one, 1 or more.
        keep_every: checkpoints at multiples of this step are kept for good; 0 for none.
    """

    def __init__(self, folder: Path, keep_last: int = 1, keep_every: int = 0) -> None:
        assert keep_last >= 1 and keep_every >= 0
        self.folder, self.keep_last, self.keep_every = Path(folder), keep_last, keep_every

    def save(self, step: int, model: nn.Module, optimizer: Optimizer | None, state: Mapping[str, Any]) -> Path:
        """Write the checkpoint of `step` and remove those that are not to be kept any more.

        Args:
            step: optimizer steps done, 0 or more.
            model: parameters and persistent buffers of any dtype.
            optimizer: over parameters of `model`, or None.
            state: values that JSON can hold; given back as `Checkpoint.state`.

        Returns:
            The checkpoint's folder.

        Raises:
            CheckpointError: it cannot be written; nothing of it stays and the earlier ones are untouched.
            TypeError: `state` holds something that JSON cannot.
        """
        target = self._path(step)
        partial = self.folder / f".tmp-{target.name}"
        try:
            self._remove_leftovers()
            partial.mkdir(parents=True)
            _write(partial, step, model, optimizer, state)
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
                f"({error.strerror or error}). {kept}. Make room or give an output_dir that can be written, "
                "then give the same command again."
            ) from error
        self.prune(step)
        return target

    def mark_best(self, step: int, state: Mapping[str, Any]) -> None:
        """Name the checkpoint of `step` the best one, with what the caller wants to note (its loss)."""
        assert self._path(step).is_dir(), f"there is no checkpoint of step {step} in {self.folder}"
        write_json(self.folder / BEST_FILE, {"step": step, **state})

    def steps(self) -> list[int]:
        """Steps of the checkpoints that lie here, whole or not, ascending."""
        return sorted({step for step, _ in self._candidates()})

    def find(self, which: str) -> Checkpoint | None:
        """A whole checkpoint, or None; torn and altered ones are reported and skipped.

        Args:
            which: `best`, `last` (the newest whole one) or `step:<number>`.

        Raises:
            ValueError: `which` is none of these.
        """
        number = re.fullmatch(r"step:(\d+)", which)
        require(
            which in ("best", "last") or number is not None,
            f"checkpoint = {which!r} is not known. Use best, last or step:<number>.",
        )
        wanted = int(number[1]) if number else self._best_step() if which == "best" else None
        for step, path in self._candidates():
            if which == "last" or step == wanted:
                try:
                    return Checkpoint(path, step)
                except (ValueError, OSError) as error:
                    log.warning("Skipping the checkpoint %s: %s", path, error)
        return None

    def get(self, which: str) -> Checkpoint:
        """The checkpoint that `find` gives, or an error where there is none.

        Raises:
            ValueError: `which` is not a checkpoint's name, or there is no such whole checkpoint.
        """
        checkpoint = self.find(which)
        if checkpoint is None:
            other = " Use checkpoint=last." if which == "best" and self.steps() else ""
            raise ValueError(
                f"checkpoint = {which}: {self.folder} holds no whole {which} checkpoint.{other} Steps that lie "
                f"here: {', '.join(map(str, self.steps())) or 'none'}. To write one, give the training command "
                "again, with overwrite=true if the run is finished."
            )
        return checkpoint

    def prune(self, newest: int) -> None:
        """Remove what is not to be kept. `save` does so too, but may have been killed before.

        Args:
            newest: step of a checkpoint that is known to be whole. Later ones are torn, or from training that was
                continued elsewhere.
        """
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

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _candidates(self) -> list[tuple[int, Path]]:
        """(step, folder) of what looks like a checkpoint, newest first, `.old` after its successor."""
        if not self.folder.is_dir():
            return []
        matches = [(_FOLDER.fullmatch(path.name), path) for path in sorted(self.folder.iterdir())]
        return sorted(((int(match[1]), path) for match, path in matches if match), key=lambda found: -found[0])

    def _best_step(self) -> int | None:
        step = (read_json_if_whole(self.folder / BEST_FILE) or {}).get("step")
        return step if type(step) is int else None

    def _remove_leftovers(self) -> None:
        for path in self.folder.glob(".tmp-*"):
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class Checkpoint:
    """One whole checkpoint. It can be made only if every file has the size and hash that were written.

    Attributes:
        path: its folder.
        step: optimizer steps done.
        state: what the trainer gave to `CheckpointStore.save`.
        weights_sha256: hex SHA-256 of the weights' file.

    Raises:
        ValueError: a file is missing, cut short or altered; the message names it.
    """

    def __init__(self, path: Path, step: int | None = None) -> None:
        self.path = Path(path)
        self._record = _read_record(self.path)
        self.step: int = self._record["step"]
        self.state: dict[str, Any] = self._record["state"]
        require(
            step in (None, self.step),
            f"{self.path / STATE_FILE} says step {self.step}, its folder says step {step}",
        )
        for name, entry in self._record["files"].items():
            _verify(self.path / name, entry)
        self.weights_sha256: str = self._record["files"][WEIGHTS_FILE]["sha256"]

    def load_weights(self) -> dict[str, Tensor]:
        """All weights on the CPU by state dict name; tied names share one tensor."""
        weights = _read_tensors(self.path / WEIGHTS_FILE)
        for alias, kept in self._record["tied"].items():
            where = self.path / STATE_FILE
            require(kept in weights, f"{where} ties {alias} to {kept}, which {WEIGHTS_FILE} lacks")
            weights[alias] = weights[kept]
        return weights

    def load_into(self, model: nn.Module) -> None:
        """Load the weights into `model` for evaluation, cast to the model's dtypes.

        Raises:
            ValueError: names or shapes differ from the model's, or a weight is NaN or infinite.
        """
        weights = self.load_weights()
        for name, tensor in weights.items():
            require(
                bool(torch.isfinite(tensor).all()),
                f"{self.path / WEIGHTS_FILE}: {name} holds NaN or infinite values, so no result of it would mean "
                "anything. Use checkpoint=best or checkpoint=last, or train again with a lower learning rate.",
            )
        self._copy(weights, model, same_dtype=False)

    def restore(self, model: nn.Module, optimizer: Optimizer | None) -> None:
        """Load weights and optimizer state, bit for bit, to continue training.

        Raises:
            ValueError: names, shapes, dtypes or parameter groups differ; the message names the file.
        """
        require(
            optimizer is None or self._record["optimizer"] is not None,
            f"{self.path} holds no optimizer state. It can be evaluated, not trained on.",
        )
        state = None if optimizer is None else self._optimizer_state(model, optimizer)
        self._copy(self.load_weights(), model, same_dtype=True)
        if optimizer is not None and state is not None:
            optimizer.load_state_dict(state)

    def _copy(self, weights: dict[str, Tensor], model: nn.Module, same_dtype: bool) -> None:
        """Copy the weights once all were compared, so that a refused file leaves the model unchanged."""
        refusal = f"{self.path / WEIGHTS_FILE} does not fit the model:"
        advice = "Use the configuration that the checkpoint was trained with."
        targets = model.state_dict()
        missing, unexpected = sorted(targets.keys() - weights.keys()), sorted(weights.keys() - targets.keys())
        require(
            not missing and not unexpected,
            f"{refusal} it lacks {listing(missing)} and has {listing(unexpected)} that the model has not. "
            f"{advice}",
        )
        for name, target in targets.items():
            found = weights[name]
            require(
                found.shape == target.shape and (found.dtype == target.dtype or not same_dtype),
                f"{refusal} {name} is {tuple(found.shape)} {found.dtype}, "
                f"the model's is {tuple(target.shape)} {target.dtype}. {advice}",
            )
        model.load_state_dict(weights)

    def _optimizer_state(self, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
        """The saved state in the form of the optimizer's own state dict."""
        path, record = self.path / OPTIMIZER_FILE, self._record["optimizer"]
        names = {parameter: name for name, parameter in model.named_parameters()}
        expected = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
        require(
            record["class"] == type(optimizer).__name__ and [g["params"] for g in record["groups"]] == expected,
            f"{path} is the state of {record['class']} over other parameter groups than this run's "
            f"{type(optimizer).__name__}. Use the optimizer settings that it was trained with.",
        )
        numbers = {name: number for number, name in enumerate(name for group in expected for name in group)}
        entries: dict[int, dict[str, Tensor]] = {}
        for key, value in _read_tensors(path).items():
            name, _, entry = key.rpartition("/")
            require(name in numbers, f"{path} has {key}, which belongs to nothing that this optimizer trains")
            entries.setdefault(numbers[name], {})[entry] = value
        groups = []
        for group, saved in zip(optimizer.param_groups, record["groups"], strict=True):
            options = {k: tuple(v) if isinstance(group.get(k), tuple) else v for k, v in saved.items()}
            groups.append({**group, **options, "params": [numbers[name] for name in saved["params"]]})
        return {"state": entries, "param_groups": groups}


# --- writing -------------------------------------------------------------------------------------


def _write(
    folder: Path, step: int, model: nn.Module, optimizer: Optimizer | None, state: Mapping[str, Any]
) -> None:
    """Write the files of one checkpoint into an existing, empty folder and wait for the disk."""
    from safetensors.torch import save

    weights, tied = _collect_weights(model)
    files = {WEIGHTS_FILE: save(weights)}
    options = None
    if optimizer is not None:
        options, entries = _collect_optimizer(model, optimizer)
        files[OPTIMIZER_FILE] = save(entries)
    record: dict[str, Any] = {
        "format": FORMAT,
        "step": step,
        "state": dict(state),
        "tied": tied,
        "optimizer": options,
        "files": {
            name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in files.items()
        },
    }
    record["sha256"] = record_hash(record)
    files[STATE_FILE] = (json.dumps(record, indent=1) + "\n").encode()
    for name, content in files.items():
        with whole_file(folder / name) as file:
            file.write(content)


def _collect_weights(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Weights by name, one name for each tensor, and the other names of tied ones."""
    kept: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    names: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        first = names.setdefault(id(tensor), name)
        if first == name:
            kept[name] = _storable(tensor)
        else:
            tied[name] = first
    return kept, tied


def _collect_optimizer(model: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Each group's options for JSON, and the tensors of all parameters by `<parameter name>/<entry>`."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    groups = [{**g, "params": [names[parameter] for parameter in g["params"]]} for g in optimizer.param_groups]
    tensors = {
        f"{names[parameter]}/{entry}": _storable(value)
        for parameter, entries in optimizer.state.items()
        for entry, value in entries.items()
    }
    return {"class": type(optimizer).__name__, "groups": groups}, tensors


def _storable(tensor: Tensor) -> Tensor:
    """A contiguous CPU tensor with its own storage, as the file format needs it."""
    tensor = tensor.detach().cpu().contiguous()
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone()


# --- reading -------------------------------------------------------------------------------------


def _read_record(folder: Path) -> dict[str, Any]:
    """`state.json` after checking its own hash, its fields and the two file names that it may list."""
    path = folder / STATE_FILE
    try:
        record = read_json(path)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: the checkpoint was never finished") from None
    found = record.get("format")
    require(found == FORMAT, f"{path} has format {found!r}; this version reads format {FORMAT}")
    claimed = record.pop("sha256", None)
    require(claimed == record_hash(record), f"{path} was altered after it was written: its hash does not match")
    kinds = {"step": int, "state": dict, "tied": dict, "files": dict, "optimizer": dict | None}
    for name, kind in kinds.items():
        known = name in record and isinstance(record[name], kind)
        require(known, f"{path}: {name} is missing or of the wrong type")
    options = record["optimizer"]
    if options is not None:
        groups = options.get("groups")
        known = isinstance(options.get("class"), str) and isinstance(groups, list)
        known = known and all(isinstance(g, dict) and isinstance(g.get("params"), list) for g in groups)
        require(known, f"{path}: optimizer is not what this version writes")
    files, expected = sorted(record["files"]), [OPTIMIZER_FILE, WEIGHTS_FILE][options is None :]
    require(files == expected, f"{path}: files are {files}, should be {expected}")
    return record


def record_hash(record: Mapping[str, Any]) -> str:
    """The value that the field `sha256` of state.json must have, from the record without that field."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _verify(path: Path, entry: Any) -> None:
    require(isinstance(entry, dict) and path.is_file(), f"{path} is missing")
    size, expected = path.stat().st_size, entry.get("bytes")
    require(size == expected, f"{path} has {size} bytes, should have {expected}")
    whole = sha256_of(path) == entry.get("sha256")
    require(whole, f"{path} was altered after it was written: its hash does not match")
    _open_tensors(path)


def _open_tensors(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file ({error}). Nothing in it was executed.") from error


def _read_tensors(path: Path) -> dict[str, Tensor]:
    with _open_tensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}
