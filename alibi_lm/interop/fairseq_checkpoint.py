"""Read a language model of the ALiBi authors' fairseq, and say what it is in our terms.

Nothing of fairseq is needed, and nothing in a checkpoint can run: it is read with `weights_only=True`. Beside
tensors and plain values it may hold `argparse.Namespace`, in which older checkpoints keep their settings, and
numbers and arrays of numpy, which are read here without numpy's own unpickling.
"""

from __future__ import annotations

import argparse
import ast
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alibi_lm.settings import require

_DEFAULTS = {
    "decoder_normalize_before": True,
    "no_decoder_final_norm": False,
    "no_scale_embedding": False,
    "activation_fn": "relu",
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "relu_dropout": 0.0,
    "adaptive_softmax_dropout": 0.0,
    "seed": 1,
}
"""What fairseq takes where an older checkpoint does not have the setting."""


class FairseqSettings:
    """The settings of a checkpoint, whichever way it keeps them.

    Args:
        checkpoint: the loaded top level, with `cfg` (nested dicts) or `args` (a Namespace).
        source: what messages call it.

    Raises:
        ValueError: there are no settings.
    """

    def __init__(self, checkpoint: dict[str, Any], source: str) -> None:
        self.source = source
        nested, args = checkpoint.get("cfg"), checkpoint.get("args")
        parts: list[dict[str, Any]] = []
        if isinstance(nested, dict):
            parts = [_plain(nested.get(group)) for group in ("model", "task", "common", "dataset")]
        elif isinstance(args, argparse.Namespace):
            parts = [vars(args)]
        if not any(parts):
            raise ValueError(
                f"{source} holds no model settings, neither `cfg` nor `args`. Give a checkpoint that fairseq "
                "itself has saved (checkpoint_best.pt)."
            )
        # The first part that has a name wins: the model's own, then the task's.
        self.values: dict[str, Any] = {}
        for part in reversed(parts):
            for name, value in part.items():
                if not _is_reference(value) and (value is not None or name not in self.values):
                    self.values[name] = value
        self.values.setdefault("arch", self.values.get("_name"))
        self._old_names()

    def _old_names(self) -> None:
        # fairseq's own rules for checkpoints from before these options were renamed.
        if "no_tie_adaptive_proj" in self.values:
            self.values["no_decoder_final_norm"] = True
            self.values.setdefault("tie_adaptive_proj", not self.values["no_tie_adaptive_proj"])
        if "decoder_final_norm" in self.values:
            self.values["no_decoder_final_norm"] = not self.values["decoder_final_norm"]

    def peek(self, name: str) -> Any:
        """A setting, or fairseq's default for it, or None."""
        return self.values.get(name, _DEFAULTS.get(name))

    def get(self, name: str) -> Any:
        """A setting, or fairseq's default for it.

        Raises:
            ValueError: absent, and without a default.
        """
        value = self.peek(name)
        if value is None:
            raise ValueError(f"{self.source} does not say {name}. It is no checkpoint of a transformer_lm.")
        return value

    def whole(self, name: str) -> int:
        """A setting that must be a whole number >= 1."""
        try:
            value = int(self.get(name))
        except (TypeError, ValueError):
            value = 0
        if value < 1:
            raise ValueError(f"{self.source}: {name} = {self.get(name)!r} is not a whole number >= 1.")
        return value

    def number(self, name: str) -> float:
        """A setting that must be a number."""
        try:
            return float(self.get(name))
        except (TypeError, ValueError):
            raise ValueError(f"{self.source}: {name} = {self.get(name)!r} is not a number.") from None

    def cutoffs(self, name: str) -> list[int]:
        """A list of whole numbers, which fairseq keeps as text ("20000,60000")."""
        value = self.get(name)
        try:
            value = ast.literal_eval(value) if isinstance(value, str) else value
            return [int(v) for v in (value if isinstance(value, list | tuple) else [value])]
        except (TypeError, ValueError, SyntaxError):
            raise ValueError(f"{self.source}: {name} = {self.get(name)!r} is no list of numbers.") from None


@dataclass
class FairseqCheckpoint:
    """A checkpoint that passed the checks of `read_checkpoint`."""

    source: str
    settings: FairseqSettings
    tensors: dict[str, Tensor]
    """The model's state dict, as stored."""
    num_updates: int
    """Optimizer updates done; 0 where the checkpoint does not say."""
    best_loss: float | None
    """Lowest validation loss in bits per token, where the checkpoint says."""
    marked_alibi: bool | None
    """Whether the model's settings have `max_tokens`, which the ALiBi authors' fork adds; None: cannot tell."""


class _Dtype:
    """Stands for `numpy.dtype` while a checkpoint is read; numbers, truth values and texts alone are known."""

    def __init__(self, code: str, *_: Any) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"[biufc?SU]\d{0,9}", code):
            raise pickle.UnpicklingError(f"numpy dtype {code!r}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stands for `numpy.ndarray`: made empty, then given its content."""

    def __init__(self, *_: Any) -> None:
        self.values: Any = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, by_columns, content = state
        self.values = np.ndarray(shape, kind.dtype, content, order="F" if by_columns else "C").tolist()


def _scalar(kind: _Dtype, content: bytes) -> Any:
    return np.ndarray((), kind.dtype, content).item()


def _no_bytes() -> bytes:
    """Stands for `bytes`, which the pickles of empty arrays call without arguments."""
    return b""


def _plain_values(value: Any) -> Any:
    """The same with lists in place of arrays of numpy."""
    if isinstance(value, _Array):
        return value.values
    if isinstance(value, argparse.Namespace):
        return argparse.Namespace(**_plain_values(vars(value)))
    if type(value) is dict:
        return {key: _plain_values(part) for key, part in value.items()}
    return [_plain_values(part) for part in value] if type(value) in (list, tuple) else value


# What may stand in a checkpoint beside what torch allows, and what is used in its place. The functions of numpy
# itself trust what they read.
SAFE: list[Any] = [
    argparse.Namespace,
    (_Dtype, "numpy.dtype"),
    (_Array, "numpy.ndarray"),
    (_no_bytes, "builtins.bytes"),
    *((_Array, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    *((_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]


def read_checkpoint(path: Path) -> FairseqCheckpoint:
    """Load a checkpoint file without running anything in it.

    Raises:
        ValueError: no such file, not a checkpoint, or one that holds objects of other classes.
    """
    source = f"checkpoint = {path}"
    require(path.is_file(), f"{source} {'is a folder' if path.is_dir() else 'does not exist'}. Give the .pt file.")
    try:
        with torch.serialization.safe_globals(SAFE):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(_refusal(source, error)) from error
    if not isinstance(content, dict) or not _is_state_dict(content.get("model")):
        raise ValueError(
            f"{source} is no fairseq checkpoint: it has no `model` with named tensors. "
            "Give the .pt file as fairseq wrote it."
        )
    model = content.pop("model")
    content = _plain_values(content)
    return FairseqCheckpoint(
        source,
        FairseqSettings(content, source),
        dict(model),
        _num_updates(content),
        _best_loss(content),
        _marked_alibi(content),
    )


def _plain(group: Any) -> dict[str, Any]:
    return vars(group) if isinstance(group, argparse.Namespace) else group if isinstance(group, dict) else {}


def _is_reference(value: Any) -> bool:
    """Whether a setting is an unresolved reference to another one, like ${task.tokens_per_sample}."""
    return isinstance(value, str) and value.startswith("${")


def _is_state_dict(value: Any) -> bool:
    names_and_tensors = isinstance(value, dict) and all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items()
    )
    return names_and_tensors and bool(value)


def _num_updates(content: dict[str, Any]) -> int:
    history = content.get("optimizer_history")
    last = history[-1] if isinstance(history, list) and history and isinstance(history[-1], dict) else {}
    updates = last.get("num_updates")
    return updates if isinstance(updates, int) and updates > 0 else 0


def _best_loss(content: dict[str, Any]) -> float | None:
    extra = content.get("extra_state")
    best = extra.get("best") if isinstance(extra, dict) else None
    return float(best) if isinstance(best, int | float) else None


def _marked_alibi(content: dict[str, Any]) -> bool | None:
    nested = content.get("cfg")
    model = nested.get("model") if isinstance(nested, dict) else None
    # A Namespace holds the settings of everything, max_tokens of the data loader among them.
    return "max_tokens" in model if isinstance(model, dict) else None


def _refusal(source: str, error: Exception) -> str:
    found = re.search(r"GLOBAL ([\w.]+)|(numpy dtype .*)", str(error))
    if isinstance(error, pickle.UnpicklingError) and found:
        return (
            f"{source} holds an object of class {found[1] or found[2]}, and loading such objects can run code. "
            "Accepted are tensors, plain values, numbers and arrays of numpy, and argparse.Namespace. If you "
            "trust the file, load it with fairseq once and save it again with its settings as plain data."
        )
    return f"{source} is no readable torch checkpoint ({type(error).__name__}). Is it complete?"
