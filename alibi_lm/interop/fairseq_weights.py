"""The architecture and the weights of a fairseq checkpoint in our terms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from alibi_lm.interop.fairseq_checkpoint import FairseqCheckpoint, FairseqSettings
from alibi_lm.model.transformer import ACTIVATIONS, ModelConfig

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
