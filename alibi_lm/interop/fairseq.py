"""Turn a checkpoint of the ALiBi authors' fairseq into a run folder that everything else takes.

The run's weights are float32 and its words are those of the checkpoint's own dictionary. Which positions the
model was trained with has to be told: the tensors of an ALiBi and of a sinusoidal model have the same names.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from alibi_lm import runtime
from alibi_lm.attention import ATTENTION
from alibi_lm.checkpoint import CheckpointStore
from alibi_lm.config import TrainConfig
from alibi_lm.data.text import DataConfig
from alibi_lm.data.tokenizers import Tokenizer, WordConfig
from alibi_lm.files import sha256_of, write_json, write_text
from alibi_lm.interop.fairseq_checkpoint import FairseqCheckpoint, FairseqSettings, read_checkpoint
from alibi_lm.model.transformer import ACTIVATIONS, ModelConfig, TransformerLM
from alibi_lm.optim import FairseqCosineConfig, NAGConfig
from alibi_lm.positions.alibi import AlibiConfig
from alibi_lm.positions.sinusoidal import SinusoidalConfig
from alibi_lm.runs import finished, mark_finished, run_identity, run_lock
from alibi_lm.settings import require
from alibi_lm.tracking import TRACKING

POSITIONS = ("alibi", "sinusoidal")


@dataclasses.dataclass
class ImportConfig:
    """What to import, as what, and where to."""

    checkpoint: str
    """The .pt file as fairseq wrote it."""
    dictionary: str
    """The dict.txt of the data it was trained on."""
    position: str
    """alibi or sinusoidal (fairseq's variant): what the model was trained with."""
    output_dir: str
    """The run folder to be made."""
    overwrite: bool = False
    """Replace an imported run that lies there."""

    def __post_init__(self) -> None:
        require(
            self.position in POSITIONS,
            f"position = {self.position!r}. Allowed: {', '.join(POSITIONS)}. A checkpoint does not tell how "
            "its model was given positions; say what it was trained with.",
        )


def import_fairseq(config: ImportConfig) -> Path:
    """Import one checkpoint; nothing is written before all of it was checked.

    Args:
        config: the files and the position scheme.

    Returns:
        The run folder.

    Raises:
        ValueError: a file that is missing, unreadable or refused, a model that is not one of the paper's kind, a
            dictionary that does not fit, or an output folder that holds something else.
    """
    folder = Path(config.output_dir).expanduser()
    _check_output(folder, config.overwrite)
    tokenizer = Tokenizer.from_fairseq_dictionary(Path(config.dictionary).expanduser())
    path = Path(config.checkpoint).expanduser()
    checkpoint = read_checkpoint(path)
    doubt = _doubt(checkpoint, config.position)
    if doubt is not None:
        print(doubt, file=sys.stderr)
    run = train_config(checkpoint, config.position, tokenizer.vocab_size)
    model = build(checkpoint, run, tokenizer.vocab_size)

    best = None if checkpoint.best_loss is None else checkpoint.best_loss * math.log(2)
    own = {"run": run_identity(run, {}), "run_name": folder.name}
    with run_lock(folder):
        _empty(folder)
        settings = OmegaConf.create(dataclasses.asdict(run))
        write_text(folder / "config.yaml", OmegaConf.to_yaml(settings))
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
            "settings": {k: v for k, v in sorted(checkpoint.settings.values.items()) if _is_plain(v)},
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


def train_config(checkpoint: FairseqCheckpoint, position: str, vocab_size: int) -> TrainConfig:
    """The run's config. Model, train_length, seed and steps are the checkpoint's; the rest is the paper's recipe.

    Args:
        checkpoint: as read.
        position: alibi or sinusoidal.
        vocab_size: of the dictionary.

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


def build(checkpoint: FairseqCheckpoint, run: TrainConfig, vocab_size: int) -> TransformerLM:
    """The model with the checkpoint's weights, in evaluation mode, float32, on the CPU.

    Args:
        checkpoint: as read.
        run: the value of `train_config`.
        vocab_size: of the dictionary.

    Raises:
        ValueError: weights that are missing, unknown or of other shapes; a dictionary of another size.
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


def _doubt(checkpoint: FairseqCheckpoint, position: str) -> str | None:
    """What speaks against the scheme that was named, if anything does."""
    if checkpoint.marked_alibi is None or checkpoint.marked_alibi == (position == "alibi"):
        return None
    has, other = ("has", "an ALiBi") if checkpoint.marked_alibi else ("lacks", "a sinusoidal")
    return (
        f"warning: position = {position}, but the model's settings {has} max_tokens, as those of {other} "
        "model do. With the wrong scheme the run gives wrong numbers without further notice."
    )


def _check_output(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir = {folder} is a file. Give a folder.")
    entries = [p for p in folder.iterdir() if p.name != ".lock"] if folder.is_dir() else []
    if not entries:
        return
    if not (folder / "import.json").is_file():
        raise ValueError(f"output_dir = {folder} holds something else than an imported run. Give another folder.")
    if finished(folder) is not None and not overwrite:
        raise ValueError(
            f"output_dir = {folder} holds an imported run already. Use overwrite=true to replace it, or another "
            "output_dir."
        )


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.name != ".lock":
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float | bool)


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
"""Settings of fairseq that have one value in the paper's models; any other makes another model."""


def model_config(settings: FairseqSettings, vocab_size: int, final_norm: bool) -> ModelConfig:
    """The architecture of a checkpoint.

    Args:
        settings: of the checkpoint.
        vocab_size: of its dictionary.
        final_norm: whether the checkpoint's weights include a norm after the last layer in use.

    Raises:
        ValueError: a setting that the paper's models do not have, naming it.
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
    """Whether fairseq would apply a norm after the last layer: its rule for old checkpoints included."""
    version = checkpoint.tensors.get("decoder.version")
    return not checkpoint.settings.get("no_decoder_final_norm") and version is not None and float(version[0]) > 2


def convert_weights(checkpoint: FairseqCheckpoint, config: ModelConfig) -> dict[str, Tensor]:
    """The weights by our names, in float32.

    Raises:
        ValueError: a key too many or too few, a shape that does not fit, tied weights that differ, or weights
            that are no numbers.
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
            f"{source} does not fit its own settings: missing {_listing(missing)}; unknown {_listing(unknown)}. "
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
    """Our parameter names, and which of fairseq's make each up, one above the other."""
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
        "ffn_norm": ["final_layer_norm"],  # of the layer, not of the model
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


def _listing(names: list[str]) -> str:
    shown = ", ".join(names[:4]) or "nothing"
    return shown + (f" and {len(names) - 4} more" if len(names) > 4 else "")
