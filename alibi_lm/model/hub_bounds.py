"""How far back the heads of an imported ALiBi model must see: BLOOM, MPT and Falcon, from their weights.

The bound is that of `model/bound.py`; this file gets queries, keys, the norm before them and the slopes of each
architecture from its own code. MPT and BLOOM compute biases in float32. In transformers Falcon computes them in
bfloat16, as slope times place of the key: beyond 256 keys neighbours share a bias, and the difference of two is
off by up to slope * keys / 128. This is added to the bound, for texts of up to `length` tokens.

Shape letters: B batch, T tokens, H heads, K head dim, D model dim.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor

from alibi_lm.model.bound import LOST_SHARE, BiasTail, HeadBounds, excess_from_weights
from alibi_lm.model.huggingface import HuggingFaceLM
from alibi_lm.settings import require

FALCON_ROUNDING = 2.0**-7
"""Largest error of a difference of two biases, as a share of slope times keys: each is rounded twice to 8 bits."""


def head_bounds(model: HuggingFaceLM, length: int, lost_share: float = LOST_SHARE) -> list[HeadBounds]:
    """The bounds of every layer's heads.

    Args:
        model: a BLOOM, an MPT or a Falcon with ALiBi, in float32.
        length: longest text for which the bound must hold; it matters only for Falcon.
        lost_share: largest share of a query's attention that may be lost, in (0, 1).

    Raises:
        ValueError: another model, or one of these with a setting that the bound does not cover.
    """
    config, kind = model.model.config, model.model.config.model_type
    require(
        kind in _PARTS and (kind != "falcon" or config.alibi) and model.precision == "float32",
        f"{model.label} ({kind}, {model.precision}) has no ALiBi biases in float32 that are known here. The bound "
        "is for BLOOM, MPT and Falcon with alibi, with precision=float32.",
    )
    slopes, layers = _PARTS[kind](model.model)
    found, tail = [], BiasTail(slopes)
    for w_q, w_k, b_q, norm, scale in layers:
        shift = getattr(norm, "bias", None)
        excess = excess_from_weights(w_q, w_k, b_q, norm.weight, shift, len(slopes), scale=scale)
        if kind == "falcon":
            excess = excess + FALCON_ROUNDING * slopes * length
        found.append(HeadBounds(excess, tail.windows(excess, lost_share)))
    return found


def alibi_slopes(model: HuggingFaceLM) -> Tensor:
    """(H,) float64: how much the bias of each head falls from one key to the next, in the scale of the scores."""
    return _PARTS[model.model.config.model_type](model.model)[0]


Layer = tuple[Tensor, Tensor, Tensor | None, Any, float]
"""Queries (H K, D), keys, the queries' constant, the norm before them, and the scale of the scores."""


def _bloom(model: Any) -> tuple[Tensor, list[Layer]]:
    heads = model.config.n_head
    bias = model.transformer.build_alibi_tensor(torch.ones(1, 2), heads, torch.float32).view(heads, 2)
    layers: list[Layer] = []
    for block in model.transformer.h:
        parts = _split(block.self_attention, block.self_attention._reshape)
        layers.append((*parts, block.input_layernorm, block.self_attention.inv_norm_factor))
    return bias.diff().flatten().double(), layers


def _falcon(model: Any) -> tuple[Tensor, list[Layer]]:
    heads, module = model.config.num_attention_heads, sys.modules[type(model).__module__]
    scale = 1 / math.sqrt(model.config.hidden_size // heads)
    bias = module.build_alibi_tensor(torch.ones(1, 2, dtype=torch.int64), heads, torch.float32).view(heads, 2)

    def split(attention: Any, fused: Tensor) -> tuple[Tensor, ...]:
        return tuple(part.transpose(1, 2) for part in attention._split_heads(fused))

    layers = []
    for block in model.transformer.h:
        attention = block.self_attention
        norm = block.ln_attn if hasattr(block, "ln_attn") else block.input_layernorm
        layers.append((*_split(attention, lambda fused, a=attention: split(a, fused)), norm, scale))
    return bias.diff().flatten().double() * scale, layers  # the sum of score and bias is scaled


def _mpt(model: Any) -> tuple[Tensor, list[Layer]]:
    config = model.config
    require(
        config.attn_config.clip_qkv is None,
        f"clip_qkv = {config.attn_config.clip_qkv}: the bound does not cover clipped queries and keys.",
    )
    most = config.attn_config.alibi_bias_max
    bias = model.transformer.build_mpt_alibi_tensor(config.n_heads, 2, most).view(config.n_heads, 2)
    layers: list[Layer] = []
    for block in model.transformer.blocks:
        w_q, w_k, _ = block.attn.Wqkv.weight.chunk(3)
        layers.append((w_q, w_k, None, block.norm_1, block.attn.softmax_scale))
    return bias.diff().flatten().double(), layers


_PARTS = {"bloom": _bloom, "falcon": _falcon, "mpt": _mpt}


def _split(attention: Any, split: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """Queries and keys of a fused map, split by the model's own code, as if each weight column were a token."""
    fused = attention.query_key_value
    w_q, w_k, _ = split(fused.weight.T[None])  # (1, H, D, K)
    b_q = None if fused.bias is None else split(fused.bias[None, None])[0].flatten()
    return w_q[0].transpose(1, 2).flatten(0, 1), w_k[0].transpose(1, 2).flatten(0, 1), b_q


@torch.inference_mode()
def lost_shares(model: HuggingFaceLM, input_ids: Tensor) -> list[Tensor] | None:
    """The share of any query's attention that keys at each distance and beyond really have, in each layer.

    Args:
        model: a BLOOM or an MPT, or a Falcon.
        input_ids: (1, T) int64.

    Returns:
        (H, T) float64 for each layer, falling: the largest share of any query. None for a Falcon, for which
        transformers returns weights other than those that it uses.
    """
    if model.model.config.model_type == "falcon":
        return None
    weights = model.model(input_ids, use_cache=False, output_attentions=True).attentions
    found = []
    for layer in weights:
        tokens = layer.shape[-1]
        reached = layer[0].double().cumsum(-1)  # for query i, keys at distances >= d are the first i - d + 1
        place = torch.arange(tokens, device=layer.device)
        last = place[:, None] - place
        shares = reached.gather(2, last.clamp_min(0).expand(len(reached), -1, -1))
        found.append(shares.masked_fill(last < 0, 0.0).amax(1))
    return found
