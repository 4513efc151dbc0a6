"""All initialisation of the transformer's own layers; vocabularies and position schemes draw their own.

| parameter | `scaled` | `fairseq` (the authors' code) |
| --- | --- | --- |
| q, k, v weights | normal, std D^-0.5 | Xavier uniform, gain 1/sqrt(2), each of its own (D, D) |
| q, k, v biases | 0 | uniform +-D^-0.5 |
| attention output weight | normal, std (2 num_layers D)^-0.5 | Xavier uniform |
| attention output bias | 0 | 0 |
| first FFN weight / bias | normal, std D^-0.5 / 0 | uniform +-D^-0.5 / uniform +-D^-0.5 |
| second FFN weight / bias | normal, std (2 num_layers F)^-0.5 / 0 | uniform +-F^-0.5 / uniform +-F^-0.5 |
| layer norms | 1 / 0 | 1 / 0 |

`scaled` keeps the variance of the residual stream near one at the start (Radford et al. 2019, section 2.3).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from alibi_lm.model.transformer import Block, TransformerLM

INITIALISATIONS = ("scaled", "fairseq")


@torch.no_grad()
def initialise(model: TransformerLM) -> None:
    """Draw all parameters of a model from torch's global generator; those of position schemes last."""
    model.vocabulary.initialise()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    draw = _fairseq if model.config.initialisation == "fairseq" else _scaled
    for block in model.layers:
        draw(block, len(model.layers))
    for scheme in model.schemes:
        scheme.initialise()


def _scaled(block: Block, num_layers: int) -> None:
    depth = (2 * num_layers) ** -0.5
    for layer, scale in (
        (block.attention.qkv, 1.0),
        (block.attention.out, depth),
        (block.ffn.up, 1.0),
        (block.ffn.down, depth),
    ):
        nn.init.normal_(layer.weight, std=scale * layer.in_features**-0.5)
        nn.init.zeros_(layer.bias)


def _fairseq(block: Block, num_layers: int) -> None:
    for projection in block.attention.qkv.weight.chunk(3):
        nn.init.xavier_uniform_(projection, gain=2**-0.5)
    nn.init.xavier_uniform_(block.attention.out.weight)
    nn.init.zeros_(block.attention.out.bias)
    bound = block.attention.qkv.in_features**-0.5
    nn.init.uniform_(block.attention.qkv.bias, -bound, bound)
    for layer in (block.ffn.up, block.ffn.down):
        bound = layer.in_features**-0.5
        nn.init.uniform_(layer.weight, -bound, bound)
        nn.init.uniform_(layer.bias, -bound, bound)
