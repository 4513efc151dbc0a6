"""One checkpoint on disk: tensors, a JSON record with their hashes, and nothing that can run code.

    weights.safetensors      state dict by plain name, tied tensors once
    optimizer.safetensors    `<parameter name>/<entry>`; absent without optimizer
    state.json               step, the trainer's state, optimizer options, sizes and hashes

`Checkpoint` exists only for a folder in which every file has the size and hash that were written.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from alibi_lm.files import read_json, sync_folder, write_bytes_synced

WEIGHTS_FILE = "weights.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
FORMAT = 1


class Checkpoint:
    """One whole checkpoint: made only if every file has the size and hash that were written.

    Attributes:
        path: its folder.
        step: optimizer steps done.
        state: what the trainer gave to `CheckpointStore.save`.

    Raises:
        ValueError: a file is missing, cut short or altered; the message names it.
    """

    def __init__(self, path: Path, step: int | None = None):
        self.path = Path(path)
        self._record = _read_record(self.path)
        self.step: int = self._record["step"]
        self.state: dict[str, Any] = self._record["state"]
        if step is not None and self.step != step:
            raise ValueError(f"{self.path / STATE_FILE} says step {self.step}, its folder says step {step}")
        for name, entry in self._record["files"].items():
            _verify(self.path / name, entry)

    @property
    def weights_sha256(self) -> str:
        """Hex SHA-256 of the weights' file, as it was written and is now."""
        return str(self._record["files"][WEIGHTS_FILE]["sha256"])

    def load_weights(self) -> dict[str, Tensor]:
        """All weights on the CPU by state dict name; tied names share one tensor.

        Raises:
            ValueError: the file is no safetensors file.
        """
        weights = _read_tensors(self.path / WEIGHTS_FILE)
        for alias, kept in self._record["tied"].items():
            if kept not in weights:
                raise ValueError(f"{self.path / STATE_FILE} ties {alias} to {kept}, which {WEIGHTS_FILE} lacks")
            weights[alias] = weights[kept]
        return weights

    def load_into(self, model: nn.Module) -> None:
        """Weights into `model` for evaluation, cast to the model's dtypes.

        Raises:
            ValueError: names or shapes differ from the model's, or a weight is NaN or infinite.
        """
        weights = self.load_weights()
        for name, tensor in weights.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
                raise ValueError(
                    f"{self.path / WEIGHTS_FILE}: {name} holds NaN or infinite values, so no result of it "
                    "would mean anything. Use another checkpoint (checkpoint=best or checkpoint=last), "
                    "or train again with a lower learning rate."
                )
        _copy_weights(model, weights, self.path / WEIGHTS_FILE, same_dtype=False)

    def restore(self, model: nn.Module, optimizer: Optimizer | None) -> None:
        """Weights and optimizer state, bit for bit, to train on.

        Raises:
            ValueError: names, shapes, dtypes or parameter groups differ; the message names the file.
        """
        if optimizer is not None and self._record["optimizer"] is None:
            raise ValueError(f"{self.path} holds no optimizer state. It can be evaluated, not trained on.")
        weights = self.load_weights()
        entries = _read_tensors(self.path / OPTIMIZER_FILE) if optimizer is not None else {}
        _copy_weights(model, weights, self.path / WEIGHTS_FILE, same_dtype=True)
        if optimizer is not None:
            _restore_optimizer(model, optimizer, self._record["optimizer"], entries, self.path / OPTIMIZER_FILE)


# --- writing -------------------------------------------------------------------------------------


def write_checkpoint(
    folder: Path, step: int, model: nn.Module, optimizer: Optimizer | None, state: Mapping[str, Any]
) -> None:
    """Writes the files of one checkpoint into an existing, empty folder and waits for the disk.

    Raises:
        OSError: as from the system.
        TypeError: `state` holds something that JSON cannot.
        ValueError: the optimizer holds a parameter that is not one of the model's.
    """
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
    text = json.dumps(record, indent=1, default=_plain)
    record = json.loads(text)
    record["sha256"] = _record_hash(record)
    for name, content in files.items():
        write_bytes_synced(folder / name, content)
    write_bytes_synced(folder / STATE_FILE, (json.dumps(record, indent=1) + "\n").encode())
    sync_folder(folder)


def _collect_weights(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Weights by plain name, one name for each tensor, and the other names of tied ones."""
    kept: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    names: dict[Any, str] = {}
    for name, tensor in _plain_names(model.state_dict()).items():
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device)
        if tensor.numel() and place in names:
            tied[name] = names[place]
        else:
            names[place] = name
            kept[name] = _storable(tensor)
    return kept, tied


def _collect_optimizer(model: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Options for JSON and tensors by `<parameter name>/<entry>` (a group's own: `/<group>/<option>`)."""
    names = {id(parameter): name for name, parameter in _plain_names(dict(model.named_parameters())).items()}
    groups: list[dict[str, Any]] = []
    values: dict[str, dict[str, Any]] = {}
    tensors: dict[str, Tensor] = {}
    for index, group in enumerate(optimizer.param_groups):
        if any(id(parameter) not in names for parameter in group["params"]):
            raise ValueError("the optimizer holds a parameter that is not one of the model's")
        plain: dict[str, Any] = {"params": [names[id(parameter)] for parameter in group["params"]]}
        for option, value in group.items():
            if isinstance(value, Tensor):
                tensors[f"/{index}/{option}"] = _storable(value)
            elif option != "params":
                plain[option] = value
        groups.append(plain)
        for parameter in group["params"]:
            name = names[id(parameter)]
            for entry, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"{name}/{entry}"] = _storable(value)
                else:
                    values.setdefault(name, {})[entry] = value
    return {"class": type(optimizer).__name__, "groups": groups, "values": values}, tensors


def _storable(tensor: Tensor) -> Tensor:
    """A contiguous CPU tensor with a storage of its own, as the file format wants it."""
    tensor = tensor.detach().cpu().contiguous()
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone()


def _plain_names(named: Mapping[str, Any]) -> dict[str, Any]:
    """Names without what `torch.compile` (`_orig_mod`) and data parallel wrappers (`module`) add."""
    plain = {
        ".".join(part for part in name.split(".") if part != "_orig_mod"): value for name, value in named.items()
    }
    if plain and all(name.startswith("module.") for name in plain):
        plain = {name.removeprefix("module."): value for name, value in plain.items()}
    return plain


def _plain(value: Any) -> Any:
    """NumPy scalars and tensors of one element in the trainer's state, for JSON."""
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"a checkpoint's state holds plain values only, not a {type(value).__name__}")


# --- reading -------------------------------------------------------------------------------------


def _read_record(folder: Path) -> dict[str, Any]:
    """`state.json`, checked: own hash, the fields and the two file names that it may name."""
    path = folder / STATE_FILE
    try:
        record = read_json(path)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: the checkpoint was never finished") from None
    if record.get("format") != FORMAT:
        raise ValueError(f"{path} has format {record.get('format')!r}; this version reads format {FORMAT}")
    claimed = record.pop("sha256", None)
    if claimed != _record_hash(record):
        raise ValueError(f"{path} was altered after it was written: its hash does not match")
    kinds = {"step": int, "state": dict, "tied": dict, "files": dict, "optimizer": (dict, type(None))}
    for field, kind in kinds.items():
        if field not in record or not isinstance(record[field], kind):  # type: ignore[arg-type]
            raise ValueError(f"{path}: {field} is missing or of the wrong type")
    if record["optimizer"] is not None and not _is_optimizer_record(record["optimizer"]):
        raise ValueError(f"{path}: optimizer is not what this version writes")
    expected = {WEIGHTS_FILE} | ({OPTIMIZER_FILE} if record["optimizer"] is not None else set())
    if set(record["files"]) != expected:
        raise ValueError(f"{path}: files are {sorted(record['files'])}, should be {sorted(expected)}")
    return record


def _is_optimizer_record(value: dict[str, Any]) -> bool:
    groups, values = value.get("groups"), value.get("values")
    return (
        isinstance(value.get("class"), str)
        and isinstance(groups, list)
        and all(isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups)
        and isinstance(values, dict)
        and all(isinstance(entries, dict) for entries in values.values())
    )


def _record_hash(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _verify(path: Path, entry: Any) -> None:
    if not isinstance(entry, dict) or not path.is_file():
        raise ValueError(f"{path} is missing")
    if path.stat().st_size != entry.get("bytes"):
        raise ValueError(f"{path} has {path.stat().st_size} bytes, should have {entry.get('bytes')}")
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != entry.get("sha256"):
            raise ValueError(f"{path} was altered after it was written: its hash does not match")
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


def _copy_weights(model: nn.Module, weights: dict[str, Tensor], path: Path, same_dtype: bool) -> None:
    """Copies after everything was compared, so that a refused file leaves the model as it was."""
    targets = _plain_names(model.state_dict())
    missing, unexpected = sorted(targets.keys() - weights.keys()), sorted(weights.keys() - targets.keys())
    if missing or unexpected:
        raise ValueError(
            f"{path} does not fit the model: it lacks {_listing(missing)} and has {_listing(unexpected)} "
            "that the model has not. Use the configuration that the checkpoint was trained with."
        )
    for name, target in targets.items():
        found = weights[name]
        if found.shape != target.shape or (same_dtype and found.dtype != target.dtype):
            raise ValueError(
                f"{path} does not fit the model: {name} is {tuple(found.shape)} {found.dtype}, "
                f"the model's is {tuple(target.shape)} {target.dtype}. "
                "Use the configuration that the checkpoint was trained with."
            )
    with torch.no_grad():
        for name, target in targets.items():
            assert not target.is_meta, "a model on the meta device has no storage to load into"
            target.copy_(weights[name])


def _restore_optimizer(
    model: nn.Module, optimizer: Optimizer, record: dict[str, Any], entries: dict[str, Tensor], path: Path
) -> None:
    parameters = _plain_names(dict(model.named_parameters()))
    names = {id(parameter): name for name, parameter in parameters.items()}
    expected = [[names.get(id(p)) for p in group["params"]] for group in optimizer.param_groups]
    if record["class"] != type(optimizer).__name__ or [g["params"] for g in record["groups"]] != expected:
        raise ValueError(
            f"{path} is the state of {record['class']} over other parameter groups than this run's "
            f"{type(optimizer).__name__}. Use the optimizer settings that it was trained with."
        )
    # What belongs to a parameter and, under `/<index>`, to a group; all of it placed before any is used.
    places: dict[str, dict[str, Any]] = {str(name): {} for group in expected for name in group}
    places |= {f"/{index}": {} for index in range(len(expected))}
    values = {f"{name}/{entry}": v for name, of_one in record["values"].items() for entry, v in of_one.items()}
    for key, value in (values | entries).items():
        name, _, entry = key.rpartition("/")
        if name not in places or (name.startswith("/") and entry == "params"):
            raise ValueError(f"{path} has {key}, which belongs to nothing that this optimizer trains")
        places[name][entry] = value

    optimizer.state.clear()
    for index, (group, saved) in enumerate(zip(optimizer.param_groups, record["groups"], strict=True)):
        for option, value in (saved | places[f"/{index}"]).items():
            if option != "params":
                group[option] = tuple(value) if isinstance(group.get(option), tuple) else value
        # Step counters stay on the CPU unless the optimizer's kernel reads them on the device.
        on_device = bool(group.get("capturable") or group.get("fused"))
        for parameter in group["params"]:
            for entry, value in places[names[id(parameter)]].items():
                moves = isinstance(value, Tensor) and (entry != "step" or on_device)
                optimizer.state[parameter][entry] = value.to(parameter.device) if moves else value


def _listing(names: list[str]) -> str:
    shown = ", ".join(names[:4]) or "nothing"
    return shown + (f" and {len(names) - 4} more" if len(names) > 4 else "")
