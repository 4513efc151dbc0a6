"""Turn a checkpoint of the ALiBi authors' fairseq into a run folder like any other.

The run's weights are float32 and its words are those of the checkpoint's own dictionary. The user must say which
positions the model was trained with: the tensors of an ALiBi and of a sinusoidal model have the same names.

fairseq is not needed, and nothing in a checkpoint can run: it is read with `weights_only=True`. Besides tensors
and plain values it may hold `argparse.Namespace`, in which older checkpoints keep their settings, and numbers and
arrays of numpy, which are read here without numpy's own unpickling.
"""

from __future__ import annotations

import argparse
import ast
import math
import pickle
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alibi_lm import runtime
from alibi_lm.attention import ATTENTION
from alibi_lm.checkpoint import CheckpointStore
from alibi_lm.config import CONFIG_FILE, TrainConfig, to_yaml
from alibi_lm.data.config import DataConfig
from alibi_lm.data.tokenizers import Tokenizer, WordConfig
from alibi_lm.files import sha256_of, write_json, write_text
from alibi_lm.model.transformer import ACTIVATIONS, ModelConfig, TransformerLM
from alibi_lm.optim import FairseqCosineConfig, NAGConfig
from alibi_lm.positions.alibi import AlibiConfig
from alibi_lm.positions.sinusoidal import SinusoidalConfig
from alibi_lm.runs import delete_run, finished, mark_finished, run_identity, run_lock
from alibi_lm.settings import listing, require
from alibi_lm.tracking import TRACKING

POSITIONS = ("alibi", "sinusoidal")


@dataclass
class ImportConfig:
    """What to import, with which scheme, and where to."""

    checkpoint: str
    """The .pt file that fairseq wrote."""
    dictionary: str
    """The dict.txt of the data it was trained on."""
    position: str
    """The scheme that the model was trained with: alibi or sinusoidal (fairseq's variant)."""
    output_dir: str
    """The run folder to create."""
    overwrite: bool = False
    """Replace an existing imported run."""

    def __post_init__(self) -> None:
        require(
            self.position in POSITIONS,
            f"position = {self.position!r}. Allowed: {', '.join(POSITIONS)}. A checkpoint does not say which "
            "positions its model uses; give the scheme that it was trained with.",
        )


def import_fairseq(config: ImportConfig) -> Path:
    """Import one checkpoint and return the run folder; nothing is written before everything was checked.

    Raises:
        ValueError: a file that is missing, unreadable or refused, a model unlike the paper's, a dictionary that
            does not fit, or an output folder that holds something else.
    """
    folder = Path(config.output_dir).expanduser()
    _check_output(folder, config.overwrite)
    tokenizer = Tokenizer.from_fairseq_dictionary(Path(config.dictionary).expanduser())
    path = Path(config.checkpoint).expanduser()
    checkpoint = read_checkpoint(path)
    if checkpoint.marked_alibi not in (None, config.position == "alibi"):
        has, other = ("has", "an ALiBi") if checkpoint.marked_alibi else ("lacks", "a sinusoidal")
        print(
            f"warning: position = {config.position}, but the model's settings {has} max_tokens, as those of "
            f"{other} model do. With the wrong scheme the run gives wrong numbers without further notice.",
            file=sys.stderr,
        )
    run = train_config(checkpoint, config.position, tokenizer.vocab_size)
    model = build(checkpoint, run, tokenizer.vocab_size)

    best = None if checkpoint.best_loss is None else checkpoint.best_loss * math.log(2)
    own = {"run": run_identity(run, {}), "run_name": folder.name}
    delete_run(folder)
    with run_lock(folder):
        write_text(folder / CONFIG_FILE, to_yaml(run))
        write_json(folder / "environment.json", runtime.environment(torch.device("cpu")))
        tokenizer.save(folder / "tokenizer.json")
        store = CheckpointStore(folder / "checkpoints")
        store.save(run.steps, model, None, {"vocab_size": tokenizer.vocab_size, **own})
        store.mark_best(run.steps, {"validation_loss": best, **own})
        record = {
            "from": "fairseq",
            "checkpoint": str(path.resolve()),
            "sha256": sha256_of(path),
            "updates": checkpoint.num_updates,
            "settings": {
                name: value
                for name, value in sorted(checkpoint.settings.values.items())
                if value is None or isinstance(value, str | int | float | bool)
            },
        }
        write_json(folder / "import.json", record)
        mark_finished(
            folder,
            {
                "steps": run.steps,
                "tokens_seen": None,
                "train_length": run.train_length,
                "position": config.position,
                "num_parameters": model.num_parameters(),
                "validation_loss": None,
                "best_validation_loss": best,
                "corpus": None,
                **own,
            },
        )
    return folder


def _check_output(folder: Path, overwrite: bool) -> None:
    require(not folder.exists() or folder.is_dir(), f"output_dir = {folder} is a file. Give a folder.")
    if not folder.is_dir() or all(entry.name == ".lock" for entry in folder.iterdir()):
        return
    require(
        (folder / "import.json").is_file(),
        f"output_dir = {folder} holds something other than an imported run. Give another folder.",
    )
    require(
        finished(folder) is None or overwrite,
        f"output_dir = {folder} holds an imported run already. Use overwrite=true to replace it, or another "
        "output_dir.",
    )


# --- the model ------------------------------------------------------------------------------------


def train_config(checkpoint: FairseqCheckpoint, position: str, vocab_size: int) -> TrainConfig:
    """The run's config. Model, train_length, seed and steps are the checkpoint's; the rest is the paper's recipe.

    Raises:
        ValueError: see `model_config`.
    """
    settings = checkpoint.settings
    scheme = AlibiConfig() if position == "alibi" else SinusoidalConfig(variant="fairseq")
    length = settings.whole("tokens_per_sample")
    if position == "sinusoidal" and settings.peek("no_token_positional_embeddings"):
        raise ValueError(
            f"position = sinusoidal, but {settings.source} has no_token_positional_embeddings = True: "
            "the model was not given such vectors. Use position=alibi if it was trained with it."
        )
    return TrainConfig(
        model=model_config(settings, vocab_size, has_final_norm(checkpoint)),
        position=scheme,
        attention=ATTENTION["auto"](),
        data=DataConfig(name="wikitext103"),
        tokenizer=WordConfig(),
        optimizer=NAGConfig(),
        schedule=FairseqCosineConfig(),
        tracking=TRACKING["jsonl"](),
        experiment="imported",
        train_length=length,
        seed=int(settings.number("seed")),
        steps=max(1, checkpoint.num_updates),
        tokens_per_step=max(length, 8 * (9216 // length) * length),
        clip_norm=0.1,
    )


FIXED: dict[str, Any] = {
    "adaptive_input": True,
    "tie_adaptive_weights": True,
    "tie_adaptive_proj": True,
    "decoder_normalize_before": True,
    "character_embeddings": False,
    "decoder_learned_pos": False,
    "layernorm_embedding": False,
    "add_bos_token": False,
    "decoder_layers_to_keep": None,
    "base_layers": 0,
    "quant_noise_pq": 0,
    "quant_noise_scalar": 0,
}
"""Settings of fairseq that have one value in all of the paper's models; any other value is another model."""


def model_config(settings: FairseqSettings, vocab_size: int, final_norm: bool) -> ModelConfig:
    """The architecture of a checkpoint.

    Args:
        settings: the checkpoint's settings.
        vocab_size: size of its dictionary.
        final_norm: see `has_final_norm`.

    Raises:
        ValueError: a setting that the paper's models do not have; the message names it.
    """
    source = settings.source
    for name, value in FIXED.items():
        found = settings.peek(name)
        if (found or None) != (value or None):
            raise ValueError(
                f"{source}: {name} = {found!r}. Only models as in the paper are imported, with {name} = {value}."
            )
    cutoffs = settings.cutoffs("adaptive_softmax_cutoff")
    for one, other in (
        ("adaptive_input_cutoff", "adaptive_softmax_cutoff"),
        ("adaptive_input_factor", "adaptive_softmax_factor"),
        ("decoder_input_dim", "decoder_embed_dim"),
        ("decoder_output_dim", "decoder_embed_dim"),
    ):
        read = settings.cutoffs if one.endswith("cutoff") else settings.number
        if one in settings.values and read(one) != read(other):
            raise ValueError(
                f"{source}: {one} = {settings.get(one)!r} and {other} = {settings.get(other)!r} differ. "
                "Only models in which they agree are imported."
            )
    activation = str(settings.get("activation_fn"))
    if activation not in ACTIVATIONS or activation == "silu":
        raise ValueError(f"{source}: activation_fn = {activation!r}. Only relu and gelu are imported.")
    return ModelConfig(
        num_layers=settings.whole("decoder_layers"),
        model_dim=settings.whole("decoder_embed_dim"),
        num_heads=settings.whole("decoder_attention_heads"),
        ffn_dim=settings.whole("decoder_ffn_embed_dim"),
        activation=activation,
        dropout=settings.number("dropout"),
        attention_dropout=settings.number("attention_dropout"),
        activation_dropout=settings.number("activation_dropout") or settings.number("relu_dropout"),
        final_norm=final_norm,
        scale_embeddings=not settings.get("no_scale_embedding"),
        # fairseq appends the vocabulary's end unless it is given.
        adaptive_cutoffs=[c for c in cutoffs if c != vocab_size],
        adaptive_factor=settings.number("adaptive_softmax_factor"),
        adaptive_dropout=settings.number("adaptive_softmax_dropout"),
        initialisation="fairseq",
    )


def has_final_norm(checkpoint: FairseqCheckpoint) -> bool:
    """Whether fairseq would apply a norm after the last layer, including its rule for old checkpoints."""
    version = checkpoint.tensors.get("decoder.version")
    return not checkpoint.settings.get("no_decoder_final_norm") and version is not None and float(version[0]) > 2


def build(checkpoint: FairseqCheckpoint, run: TrainConfig, vocab_size: int) -> TransformerLM:
    """The model of `train_config` with the checkpoint's weights, in evaluation mode, float32, on the CPU.

    Raises:
        ValueError: weights that are missing, unknown or of the wrong shape; a dictionary of another size.
    """
    weights = convert_weights(checkpoint, run.model)
    words = sum(w.shape[0] for name, w in weights.items() if name.startswith("vocabulary.embeddings."))
    if words != vocab_size:
        raise ValueError(
            f"{checkpoint.source} has vectors for {words} words, the dictionary has {vocab_size} "
            "(4 of them special). Give the dict.txt of the data that the checkpoint was trained on."
        )
    model = TransformerLM(run.model, run.position, run.attention.name, vocab_size, run.train_length)
    for name, parameter in model.state_dict().items():
        if weights[name].shape != parameter.shape:
            raise ValueError(
                f"{checkpoint.source}: {name} has shape {tuple(weights[name].shape)}, but by its settings it "
                f"should have {tuple(parameter.shape)}."
            )
    model.load_state_dict(weights)
    return model.eval()


def convert_weights(checkpoint: FairseqCheckpoint, config: ModelConfig) -> dict[str, Tensor]:
    """The weights by our names, in float32.

    Raises:
        ValueError: missing or unknown keys, a shape that does not fit, tied weights that differ, or weights that
            are NaN or infinite.
    """
    source, tensors = checkpoint.source, dict(checkpoint.tensors)
    for name in list(tensors):
        # Counters of the format, and scratch tensors that were never initialised.
        if name.endswith("._float_tensor") or name in ("decoder.version", "decoder.adaptive_softmax.version"):
            del tensors[name]
    wanted = _wanted(config)
    ties = _ties(len(config.adaptive_cutoffs))
    expected = {name for names in wanted.values() for name in names} | set(ties)
    missing, unknown = sorted(expected - tensors.keys()), sorted(tensors.keys() - expected)
    if missing or unknown:
        raise ValueError(
            f"{source} does not fit its own settings: missing {listing(missing)}; unknown {listing(unknown)}. "
            "Only complete models as in the paper are imported."
        )
    for name, original in ties.items():
        if not torch.equal(tensors[name], tensors[original]):
            raise ValueError(
                f"{source}: {name} and {original} differ, but the settings tie them. "
                "The file was altered after training."
            )
    weights = {ours: torch.cat([tensors[n].float() for n in names]) for ours, names in wanted.items()}
    for ours, weight in weights.items():
        if not bool(torch.isfinite(weight).all()):
            raise ValueError(f"{source}: {' + '.join(wanted[ours])} holds NaN or infinite values.")
    return weights


def _wanted(config: ModelConfig) -> dict[str, list[str]]:
    """Our parameter names -> the fairseq parameters that are stacked to form each."""
    bands = range(len(config.adaptive_cutoffs) + 1)
    wanted = {
        "vocabulary.clusters": ["decoder.adaptive_softmax.head.class_proj.weight"],
        **{f"vocabulary.embeddings.{i}": [f"decoder.embed_tokens.embeddings.{i}.0.weight"] for i in bands},
        **{f"vocabulary.projections.{i}": [f"decoder.embed_tokens.embeddings.{i}.1.weight"] for i in bands},
    }
    parts = {
        "attention_norm": ["self_attn_layer_norm"],
        "attention.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "attention.out": ["self_attn.out_proj"],
        "ffn_norm": ["final_layer_norm"],  # the layer's, not the model's
        "ffn.up": ["fc1"],
        "ffn.down": ["fc2"],
    }
    for kind in ("weight", "bias"):
        for layer in range(config.num_layers):
            for ours, theirs in parts.items():
                wanted[f"blocks.{layer}.{ours}.{kind}"] = [f"decoder.layers.{layer}.{t}.{kind}" for t in theirs]
        if config.final_norm:
            wanted[f"final_norm.{kind}"] = [f"decoder.layer_norm.{kind}"]
    return wanted


def _ties(num_tails: int) -> dict[str, str]:
    """The output layer's names for weights of the input layer."""
    inputs, outputs = "decoder.embed_tokens.embeddings", "decoder.adaptive_softmax"
    ties = {f"{outputs}.head.word_proj.weight": f"{inputs}.0.0.weight"}
    for i in range(num_tails):
        ties[f"{outputs}.tail.{i}.0.weight"] = f"{inputs}.{i + 1}.1.weight"
        ties[f"{outputs}.tail.{i}.2.weight"] = f"{inputs}.{i + 1}.0.weight"
    return ties


# --- reading -------------------------------------------------------------------------------------

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
"""fairseq's defaults for settings that an older checkpoint does not have."""


class FairseqSettings:
    """The settings of a checkpoint, in `cfg` (nested dicts) or in `args` (a Namespace) at its top level.

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
                # An unresolved reference to another setting looks like ${task.tokens_per_sample}.
                reference = isinstance(value, str) and value.startswith("${")
                if not reference and (value is not None or name not in self.values):
                    self.values[name] = value
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
            ValueError: it is absent and has no default.
        """
        value = self.peek(name)
        if value is None:
            raise ValueError(f"{self.source} does not say {name}. It is not a checkpoint of a transformer_lm.")
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
        """A list of whole numbers, which fairseq stores as text ("20000,60000")."""
        value = self.get(name)
        try:
            value = ast.literal_eval(value) if isinstance(value, str) else value
            return [int(v) for v in (value if isinstance(value, list | tuple) else [value])]
        except (TypeError, ValueError, SyntaxError):
            raise ValueError(f"{self.source}: {name} = {self.get(name)!r} is not a list of numbers.") from None


@dataclass
class FairseqCheckpoint:
    """A checkpoint that passed the checks of `read_checkpoint`."""

    source: str
    settings: FairseqSettings
    tensors: dict[str, Tensor]
    """The model's state dict, as stored."""
    num_updates: int
    """Optimizer updates done; 0 if the checkpoint does not say."""
    best_loss: float | None
    """Lowest validation loss in bits per token, if the checkpoint says."""
    marked_alibi: bool | None
    """Whether the model's settings have `max_tokens`, which the ALiBi authors' fork adds; None: not known."""


class _Dtype:
    """Replaces `numpy.dtype` while a checkpoint is read; only numbers, booleans and strings are known."""

    def __init__(self, code: str, *_: Any) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"[biufc?SU]\d{0,9}", code):
            raise pickle.UnpicklingError(f"numpy dtype {code!r}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Replaces `numpy.ndarray`: created empty, then given its content."""

    def __init__(self, *_: Any) -> None:
        self.values: Any = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, by_columns, content = state
        self.values = np.ndarray(shape, kind.dtype, content, order="F" if by_columns else "C").tolist()


def _scalar(kind: _Dtype, content: bytes) -> Any:
    return np.ndarray((), kind.dtype, content).item()


def _no_bytes() -> bytes:
    """Replaces `bytes`, which the pickles of empty arrays call without arguments."""
    return b""


def _plain_values(value: Any) -> Any:
    """The same with lists instead of numpy arrays."""
    if isinstance(value, _Array):
        return value.values
    if isinstance(value, argparse.Namespace):
        return argparse.Namespace(**_plain_values(vars(value)))
    if type(value) is dict:
        return {key: _plain_values(part) for key, part in value.items()}
    return [_plain_values(part) for part in value] if type(value) in (list, tuple) else value


# What a checkpoint may contain besides what torch allows, and its replacements. numpy's own functions trust what
# they read.
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
            f"{source} is not a fairseq checkpoint: it has no `model` with named tensors. "
            "Give the .pt file that fairseq wrote."
        )
    model = content.pop("model")
    content = _plain_values(content)
    updates = _found(content, "optimizer_history", -1, "num_updates")
    best = _found(content, "extra_state", "best")
    # A Namespace holds all settings together, including max_tokens of the data loader.
    settings = _found(content, "cfg", "model")
    return FairseqCheckpoint(
        source,
        FairseqSettings(content, source),
        dict(model),
        num_updates=updates if isinstance(updates, int) and updates > 0 else 0,
        best_loss=float(best) if isinstance(best, int | float) else None,
        marked_alibi="max_tokens" in settings if isinstance(settings, dict) else None,
    )


def _found(content: Any, *names: Any) -> Any:
    """The value at a path in nested dicts and lists, or None."""
    for name in names:
        try:
            content = content[name]
        except (KeyError, IndexError, TypeError):
            return None
    return content


def _plain(group: Any) -> dict[str, Any]:
    return vars(group) if isinstance(group, argparse.Namespace) else group if isinstance(group, dict) else {}


def _is_state_dict(value: Any) -> bool:
    names_and_tensors = isinstance(value, dict) and all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items()
    )
    return names_and_tensors and bool(value)


def _refusal(source: str, error: Exception) -> str:
    found = re.search(r"GLOBAL ([\w.]+)|(numpy dtype .*)", str(error))
    if isinstance(error, pickle.UnpicklingError) and found:
        return (
            f"{source} holds an object of class {found[1] or found[2]}, and loading such objects can run code. "
            "Accepted are tensors, plain values, numbers and arrays of numpy, and argparse.Namespace. If you "
            "trust the file, load it with fairseq once and save it again with its settings as plain data."
        )
    return f"{source} is not a readable torch checkpoint ({type(error).__name__}). Is it complete?"
