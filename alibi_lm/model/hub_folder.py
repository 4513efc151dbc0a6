"""A Hugging Face model as a folder on this machine: found or downloaded, and checked before anything is loaded.

Nothing in the folder is executed, unless the user asks for it (`trust_remote_code=true`), and pickled weights are
refused: a pickle runs code when it is read.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alibi_lm.files import fingerprint, read_json
from alibi_lm.settings import require

PREFIX = "hf:"
WANTED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.tiktoken", "*.jinja")
LEFT_OUT = ("original/*", "onnx/*", "consolidated*", "*/*.safetensors")
"""Files with copies of the weights in other formats."""
TRAIN_LENGTH_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")
"""Config keys for the length of a training sequence, most reliable first."""


@dataclass
class HubFolder:
    """What is known about a Hugging Face model before its weights are read."""

    source: str
    """The model as it was requested: `hf:<folder or hub name>`."""
    folder: Path
    config: Any
    """The transformers config, with the changes applied."""
    changes: dict[str, Any]
    """Changed keys of the config by dotted name, as rows record them: `model.rope_theta`."""
    train_length: int
    train_length_from: str
    """The config key that gives the training length, or `train_length` if the user gave it."""
    trust_remote_code: bool

    @property
    def name(self) -> str:
        """Last part of the folder or of the hub name; the model's name in rows and figures."""
        name = self.source.removeprefix(PREFIX).rstrip("/").split("/")[-1]
        return self.folder.resolve().name if name in ("", ".", "..") else name

    @property
    def files(self) -> dict[str, str]:
        """Fingerprints of the weights and of the config, by file name."""
        paths = [*sorted(self.folder.glob("*.safetensors")), self.folder / "config.json"]
        return {path.name: fingerprint(path) for path in paths}


def open_hub_folder(
    source: str, changes: dict[str, Any], train_length: int | None, trust_remote_code: bool
) -> HubFolder:
    """Find a model and read its config.

    Args:
        source: `hf:<folder>` or `hf:<owner>/<name>`.
        changes: keys of its config to change for the test; nested ones are merged into existing values.
        train_length: tokens per training sequence, if the config does not say or is wrong.
        trust_remote_code: whether Python code that comes with the model may run.

    Raises:
        ValueError: no such model, no network, not a causal language model, missing shards, pickled weights,
            foreign code, or changes that do not fit the config.
    """
    require(
        source.startswith(PREFIX) and bool(source.removeprefix(PREFIX).strip()),
        f"model = {source}. Use model=hf:<folder or hub name>; runs of alibi_lm are given by runs=<folder>.",
    )
    folder = _find(source, trust_remote_code)
    path = folder / "config.json"
    require(path.is_file(), f"model = {source}: {folder} has no config.json. Give the folder of a saved model.")
    raw = read_json(path)
    _check_weights(source, folder)
    config = _read_config(source, folder, raw, trust_remote_code)
    known = {key: raw.get(key, getattr(config, key, None)) for key in TRAIN_LENGTH_KEYS}
    own = next((key for key, value in known.items() if isinstance(value, int)), "")
    length = train_length or known.get(own)
    require(
        length is not None,
        f"model = {source}: its config does not say how long its training sequences were. "
        "Give it: train_length=<tokens>.",
    )
    if changes:
        config = _changed(source, config, raw, changes)
    recorded = {f"model.{name}": value for name, value in dotted(changes)}
    told_by = "train_length" if train_length else own
    return HubFolder(source, folder, config, recorded, int(length or 0), told_by, trust_remote_code)


def _find(source: str, code: bool) -> Path:
    """The model's folder; a model of the hub is taken from the cache, or downloaded."""
    name = source.removeprefix(PREFIX)
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    local = name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/") or path.exists()
    require(
        not local,
        f"model = {source}: there is no such folder. Give a folder, or a name on the hub: hf:<owner>/<name>.",
    )
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    wanted = [*WANTED, *(["*.py"] if code else [])]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=list(LEFT_OUT)))
    except HFValidationError as error:
        raise ValueError(f"model = {source} is neither a folder nor a name on the hub ({error}).") from None
    except LocalEntryNotFoundError:
        offline = " HF_HUB_OFFLINE is set." if constants.HF_HUB_OFFLINE else ""
        raise ValueError(
            f"model = {source}: there is no such folder, it is not in the cache, and the hub cannot be reached."
            f"{offline} Give a folder with config.json and *.safetensors, or get it on a machine with a network."
        ) from None
    except Exception as error:  # a dozen kinds from three libraries
        raise ValueError(f"model = {source} could not be fetched from the hub: {_line(error)}") from None


def _check_weights(source: str, folder: Path) -> None:
    """Refuse pickles, and missing shards by name."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        wanted = sorted(set(read_json(index).get("weight_map", {}).values()))
        missing = [name for name in wanted if not (folder / name).is_file()]
        require(
            not missing,
            f"model = {source}: {len(missing)} of {len(wanted)} files of its weights are missing from {folder}: "
            f"{', '.join(missing[:4])}. Copy or download them again.",
        )
        return
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(pattern))
    require(
        not pickles,
        f"model = {source}: its weights are pickled ({', '.join(pickles[:3])}), and reading a pickle runs code. "
        "If you trust them, convert them once: load the model with transformers and save it elsewhere with "
        "save_pretrained(<folder>), which writes safetensors; then use model=hf:<folder>.",
    )
    raise ValueError(f"model = {source}: {folder} holds no weights (*.safetensors). Copy or download them again.")


def _read_config(source: str, folder: Path, raw: dict[str, Any], code: bool) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind, architectures = raw.get("model_type"), raw.get("architectures") or []
    known = kind in CONFIG_MAPPING  # includes what packages have added
    foreign = bool(raw.get("auto_map")) and not known
    require(
        code or not foreign,
        f"model = {source} (model_type {kind}) needs Python code that comes with it. Read it, and if you trust "
        "it, allow it to run with trust_remote_code=true.",
    )
    require(
        known or foreign,
        f"model = {source}: this version of transformers knows no model_type {kind!r}. Upgrade it, or give "
        "another model.",
    )
    causal = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures)
    require(
        not raw.get("is_encoder_decoder") and (causal or not architectures),
        f"model = {source} is not a causal language model ({', '.join(architectures) or kind}). Give one that "
        "AutoModelForCausalLM loads, such as a GPT, Llama or BLOOM model.",
    )
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=code, local_files_only=True)
    except Exception as error:  # validation errors of several libraries
        raise ValueError(f"model = {source}: its config.json cannot be used: {_line(error)}") from error


def _changed(source: str, config: Any, raw: dict[str, Any], changes: dict[str, Any]) -> Any:
    """The config with some keys changed, built again so that everything derived from them changes too."""
    rotary = {"rope_scaling", "rope_theta"} if hasattr(config, "rope_parameters") else set()
    known = {*config.to_dict(), *raw, *rotary}
    for key in changes:
        require(
            key in known,
            f"+model.{key}: the config of {source} has no such key. Did you mean "
            f"{' or '.join(difflib.get_close_matches(key, known, cutoff=0)) or 'another'}?",
        )
    # A saved config may use another name for a setting than the class does (rope_scaling, rope_parameters).
    if rotary & set(changes) and "rope_parameters" in raw:
        theta = {"rope_theta": changes["rope_theta"]} if "rope_theta" in changes else {}
        scaling = {**changes.get("rope_scaling", {}), **theta}
        changes = {k: v for k, v in changes.items() if k not in rotary} | {"rope_parameters": scaling}
    try:
        changed = type(config).from_dict(_merged(raw, changes))
    except Exception as error:
        raise ValueError(
            f"+model.{next(iter(changes))}: the config of {source} refuses it: {_line(error)}"
        ) from error
    require(
        changed.to_dict() != type(config).from_dict(raw).to_dict(),
        f"+model.{next(iter(changes))} changes nothing in the config of {source}. Leave it out, or give another "
        "value.",
    )
    return changed


def _merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    nested = {k: v for k, v in changes.items() if isinstance(v, dict) and isinstance(values.get(k), dict)}
    return values | changes | {key: _merged(values[key], value) for key, value in nested.items()}


def dotted(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested settings by dotted name."""
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        found += dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return found


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
