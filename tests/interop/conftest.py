"""Small fairseq checkpoints made here, and their log-probabilities by a plain float64 account of fairseq."""

import argparse
import math
from typing import Any

import pytest
import torch

VOCAB = 40
WORDS = [f"word{i}" for i in range(VOCAB - 4)]
SETTINGS: dict[str, Any] = {
    "_name": "transformer_lm_wiki103",
    "activation_fn": "relu",
    "dropout": 0.3,
    "attention_dropout": 0.1,
    "activation_dropout": 0.1,
    "relu_dropout": 0.0,
    "decoder_embed_dim": 24,
    "decoder_output_dim": 24,
    "decoder_input_dim": 24,
    "decoder_ffn_embed_dim": 20,
    "decoder_layers": 2,
    "decoder_attention_heads": 6,
    "decoder_normalize_before": True,
    "no_decoder_final_norm": True,
    "adaptive_softmax_cutoff": "10,22",
    "adaptive_softmax_dropout": 0.2,
    "adaptive_softmax_factor": 4.0,
    "no_token_positional_embeddings": False,
    "character_embeddings": False,
    "adaptive_input": True,
    "adaptive_input_factor": 4.0,
    "adaptive_input_cutoff": "10,22",
    "tie_adaptive_weights": True,
    "tie_adaptive_proj": True,
    "decoder_learned_pos": False,
    "layernorm_embedding": False,
    "no_scale_embedding": False,
    "decoder_layers_to_keep": None,
    "base_layers": 0,
    "quant_noise_pq": 0.0,
    "quant_noise_scalar": 0.0,
    "add_bos_token": False,
    "max_tokens": 128,
    "tokens_per_sample": 16,
    "max_target_positions": 16,
}


def make_tensors(settings, seed=0):
    """A state dict with fairseq's names, duplicates, counters and scratch tensors."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=0.2):
        return torch.randn(*shape, generator=generator) * scale

    dim, ffn = settings["decoder_embed_dim"], settings["decoder_ffn_embed_dim"]
    borders = [0, *map(int, settings["adaptive_softmax_cutoff"].split(",")), VOCAB]
    tensors = {"decoder.version": torch.tensor([3.0])}
    inputs, outputs = "decoder.embed_tokens.embeddings", "decoder.adaptive_softmax"
    for i in range(len(borders) - 1):
        width = int(dim // settings["adaptive_softmax_factor"] ** i)
        tensors[f"{inputs}.{i}.0.weight"] = draw(borders[i + 1] - borders[i], width)
        tensors[f"{inputs}.{i}.1.weight"] = draw(dim, width)
        if i == 0:
            tensors[f"{outputs}.head.word_proj.weight"] = tensors[f"{inputs}.0.0.weight"]
        else:
            tensors[f"{outputs}.tail.{i - 1}.0.weight"] = tensors[f"{inputs}.{i}.1.weight"]
            tensors[f"{outputs}.tail.{i - 1}.2.weight"] = tensors[f"{inputs}.{i}.0.weight"]
    tensors[f"{outputs}.head.class_proj.weight"] = draw(len(borders) - 2, dim)
    tensors[f"{outputs}.version"] = torch.tensor([1])
    for name in ("embed_tokens", "embed_positions", "adaptive_softmax.head"):
        tensors[f"decoder.{name}._float_tensor"] = torch.tensor([math.nan])
    norms = ["self_attn_layer_norm", "final_layer_norm"]
    for layer in range(settings["decoder_layers"]):
        prefix = f"decoder.layers.{layer}"
        shapes = {f"self_attn.{p}_proj": (dim, dim) for p in ("q", "k", "v", "out")}
        shapes |= {"fc1": (ffn, dim), "fc2": (dim, ffn)}
        for name, shape in shapes.items():
            tensors[f"{prefix}.{name}.weight"] = draw(*shape)
            tensors[f"{prefix}.{name}.bias"] = draw(shape[0])
        for name in norms:
            tensors[f"{prefix}.{name}.weight"] = 1 + draw(dim)
            tensors[f"{prefix}.{name}.bias"] = draw(dim)
    if not settings["no_decoder_final_norm"]:
        tensors["decoder.layer_norm.weight"], tensors["decoder.layer_norm.bias"] = 1 + draw(dim), draw(dim)
    return tensors


def reference_log_probs(tensors, settings, position, ids):
    """Log-probabilities of every word after every prefix of one sequence: (T, V) float64."""
    w = {name: tensor.double() for name, tensor in tensors.items()}
    dim, heads = settings["decoder_embed_dim"], settings["decoder_attention_heads"]
    length = len(ids)
    borders = [0, *map(int, settings["adaptive_softmax_cutoff"].split(",")), VOCAB]
    inputs, outputs = "decoder.embed_tokens.embeddings", "decoder.adaptive_softmax"

    rows = []
    for id in ids.tolist():
        band = sum(id >= border for border in borders[1:-1])
        rows.append(w[f"{inputs}.{band}.1.weight"] @ w[f"{inputs}.{band}.0.weight"][id - borders[band]])
    x = torch.stack(rows) * (1.0 if settings["no_scale_embedding"] else math.sqrt(dim))
    if position == "sinusoidal":
        half = dim // 2
        steps = torch.arange(half, dtype=torch.float32) * -(math.log(10000) / (half - 1))
        angles = torch.arange(2, 2 + length, dtype=torch.float32)[:, None] * steps.exp()[None]
        x = x + torch.cat([angles.sin(), angles.cos()], dim=1).double()

    mask = torch.full((length, length), -math.inf, dtype=torch.float64).triu(1).repeat(heads, 1, 1)
    if position == "alibi":
        slopes = {3: [2**-4, 2**-8, 2**-2], 4: [2**-2, 2**-4, 2**-6, 2**-8]}
        slopes[6] = [*slopes[4], 2**-1, 2**-3]
        mask += torch.tensor(slopes[heads])[:, None, None] * torch.arange(length)[None, None]

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    for layer in range(settings["decoder_layers"]):
        name = f"decoder.layers.{layer}"
        y = norm(x, f"{name}.self_attn_layer_norm")
        width = dim // heads
        q, k, v = (linear(y, f"{name}.self_attn.{p}_proj").view(length, heads, width) for p in "qkv")
        scores = torch.einsum("qhd,khd->hqk", q * width**-0.5, k) + mask
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).reshape(length, dim)
        x = x + linear(mixed, f"{name}.self_attn.out_proj")
        x = x + linear(linear(norm(x, f"{name}.final_layer_norm"), f"{name}.fc1").relu(), f"{name}.fc2")
    if not settings["no_decoder_final_norm"]:
        x = norm(x, "decoder.layer_norm")

    words, clusters = w[f"{outputs}.head.word_proj.weight"], w[f"{outputs}.head.class_proj.weight"]
    head = torch.cat([x @ words.T, x @ clusters.T], dim=1).log_softmax(1)
    parts = [head[:, : borders[1]]]
    for i in range(len(borders) - 2):
        scores = x @ w[f"{outputs}.tail.{i}.0.weight"] @ w[f"{outputs}.tail.{i}.2.weight"].T
        parts.append(head[:, borders[1] + i, None] + scores.log_softmax(1))
    return torch.cat(parts, dim=1)


@pytest.fixture(scope="session")
def reference():
    return reference_log_probs


class Maker:
    """Writes checkpoints and dictionaries into a folder."""

    def __init__(self, folder):
        self.folder = folder
        self.dictionary = folder / "dict.txt"
        self.dictionary.write_text("".join(f"{word} {90 - i}\n" for i, word in enumerate(WORDS)))

    def __call__(self, *, as_args=False, dtype=torch.float32, edit=None, drop=(), zip_format=True, **settings):
        """Save a checkpoint; returns its path, its tensors in float32 and its settings.

        Args:
            as_args: settings in a Namespace at `args`, as older versions kept them.
            dtype: of the stored floats.
            edit: changes the content before it is saved.
            drop: settings to leave out.
            zip_format: False for torch's format of before 1.6.
            settings: in place of those of SETTINGS.
        """
        values = {k: v for k, v in {**SETTINGS, **settings}.items() if k not in drop}
        tensors = make_tensors({**SETTINGS, **settings})
        stored: dict[int, torch.Tensor] = {}
        for tensor in tensors.values():  # tied tensors stay tied
            stored[id(tensor)] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        model = {name: stored[id(tensor)] for name, tensor in tensors.items()}
        content: dict[str, Any] = {
            "args": argparse.Namespace(**values, seed=7, arch=values["_name"]) if as_args else None,
            "cfg": None if as_args else {"model": values, "common": {"seed": 7}},
            "model": model,
            "criterion": None,
            "optimizer_history": [{"num_updates": 286_000, "optimizer_name": "FairseqNAG"}],
            "task_state": {},
            "extra_state": {"best": 4.3, "epoch": 205},
        }
        if edit is not None:
            edit(content)
        path = self.folder / "checkpoint.pt"
        torch.save(content, path, _use_new_zipfile_serialization=zip_format)
        return path, {name: tensor.float() for name, tensor in model.items()}, {**SETTINGS, **settings}


@pytest.fixture
def make(tmp_path):
    return Maker(tmp_path)
