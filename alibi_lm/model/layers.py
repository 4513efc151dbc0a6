"""The layers of the transformer, their sizes and their initial weights.

`Block.initialise` draws the weights from torch's global generator:

| parameter | `scaled` | `fairseq` (the authors' code) |
| --- | --- | --- |
| q, k, v weights | normal, std D^-0.5 | Xavier uniform, gain 1/sqrt(2), each as a (D, D) matrix |
| q, k, v biases | 0 | uniform +-D^-0.5 |
| attention output weight | normal, std (2 num_layers D)^-0.5 | Xavier uniform |
| attention output bias | 0 | 0 |
| first FFN weight / bias | normal, std D^-0.5 / 0 | uniform +-D^-0.5 / uniform +-D^-0.5 |
| second FFN weight / bias | normal, std (2 num_layers F)^-0.5 / 0 | uniform +-F^-0.5 / uniform +-F^-0.5 |
| layer norms | 1 / 0 | 1 / 0 |

`scaled` keeps the variance of the residual stream near one at the start (Radford et al. 2019, section 2.3).

Shape letters: B batch, T tokens now, S keys seen, H heads, D model dim, F hidden dim of the FFN, K head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alibi_lm.model.cache import KeyValueCache, LayerPositions
from alibi_lm.settings import require, require_at_least, require_one_of

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}
INITIALISATIONS = ("scaled", "fairseq")


@dataclass
class ModelConfig:
    """Sizes and regularisation of the transformer."""

    name: str = "transformer"
    num_layers: int = 4
    """Number of blocks of attention and feed-forward."""
    model_dim: int = 128
    """Width of the residual stream."""
    num_heads: int = 8
    """Number of attention heads; must divide model_dim."""
    ffn_dim: int = 512
    """Hidden width of the feed-forward layers."""
    activation: str = "gelu"
    """Activation of the feed-forward layers: relu, gelu or silu."""
    dropout: float = 0.0
    """Dropout of embeddings and of each layer's two outputs, in [0, 1)."""
    attention_dropout: float = 0.0
    """Dropout of attention weights, in [0, 1)."""
    activation_dropout: float = 0.0
    """Dropout after the activation, in [0, 1)."""
    final_norm: bool = True
    """Put a layer norm after the last layer (the paper's models have none)."""
    scale_embeddings: bool = True
    """Multiply word vectors by sqrt(model_dim), before positions are added."""
    tied: bool = True
    """Use the embedding's vectors for the output distribution; always true with adaptive_cutoffs."""
    adaptive_cutoffs: list[int] = field(default_factory=list)
    """Borders between the frequency bands of an adaptive vocabulary; empty: one plain softmax."""
    adaptive_factor: float = 4.0
    """Each band's vectors are this many times narrower than those of the band before."""
    adaptive_dropout: float = 0.0
    """Dropout of the adaptive softmax's input and after each tail's projection, in [0, 1)."""
    initialisation: str = "scaled"
    """Initialisation, scaled or fairseq; see the table at the top of alibi_lm/model/layers.py."""

    def __post_init__(self) -> None:
        for name in ("num_layers", "model_dim", "num_heads", "ffn_dim"):
            require_at_least(f"model.{name}", getattr(self, name), 1)
        require(
            self.model_dim % self.num_heads == 0,
            f"model.num_heads = {self.num_heads} does not divide model.model_dim = {self.model_dim}. "
            "Each head has model_dim / num_heads dimensions.",
        )
        for name, allowed in (("activation", ACTIVATIONS), ("initialisation", INITIALISATIONS)):
            value = getattr(self, name)
            require_one_of(f"model.{name}", value, allowed)
        for name in ("dropout", "attention_dropout", "activation_dropout", "adaptive_dropout"):
            require(0 <= getattr(self, name) < 1, f"model.{name} = {getattr(self, name)}. Allowed: [0, 1).")
        cutoffs = self.adaptive_cutoffs
        require(
            all(a < b for a, b in zip([0, *cutoffs], cutoffs, strict=False)),
            f"model.adaptive_cutoffs = {cutoffs}. Use word counts that grow, like [20000, 60000].",
        )
        require(self.adaptive_factor >= 1, f"model.adaptive_factor = {self.adaptive_factor}. Use >= 1.")
        require(
            self.tied or not cutoffs,
            "model.tied = false with model.adaptive_cutoffs. The adaptive vocabulary is always tied: "
            "set model.tied=true or model.adaptive_cutoffs=[].",
        )

    @property
    def head_dim(self) -> int:
        """Dimensions per head."""
        return self.model_dim // self.num_heads


@dataclass
class Part:
    """Sequences of a batch that share positions and a cache."""

    rows: slice
    at: Tensor
    """(T,) int64, their positions."""
    positions: list[LayerPositions]
    """One entry per layer."""
    cache: KeyValueCache | None


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.model_dim, 3 * config.model_dim)
        self.out = nn.Linear(config.model_dim, config.model_dim)

    def forward(self, x: Tensor, layer: int, parts: Sequence[Part]) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        # (B, T, 3 D) -> three of (B, H, T, K)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        found = []
        for part in parts:
            rows = part.rows
            found.append(self._attend(q[rows], k[rows], v[rows], x[rows], layer, part))
        y = found[0] if len(found) == 1 else torch.cat(found)
        return self.out(y.transpose(1, 2).flatten(2))

    def _attend(self, q: Tensor, raw_k: Tensor, v: Tensor, x: Tensor, layer: int, part: Part) -> Tensor:
        position = part.positions[layer]
        q, k = position.scheme.transform_qk(q, raw_k, position.tables)
        if position.query_factor is not None:
            q = (q * position.query_factor[..., None]).to(k.dtype)
        inputs = position.scheme.features(x) if position.scheme.cache_inputs else None
        if part.cache is not None:
            return part.cache.attend(layer, q, k, v, inputs, raw_k, position)
        assert position.attend is not None
        return position.attend(q, k, v, inputs)


class FeedForward(nn.Module):
    """Two linear maps around an activation."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.model_dim, config.ffn_dim)
        self.down = nn.Linear(config.ffn_dim, config.model_dim)
        self.activation = ACTIVATIONS[config.activation]
        self.dropout = nn.Dropout(config.activation_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        return self.down(self.dropout(self.activation(self.up(x))))


class Block(nn.Module):
    """Attention and feed-forward, each after a layer norm and added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.model_dim)
        self.attention = Attention(config)
        self.ffn_norm = nn.LayerNorm(config.model_dim)
        self.ffn = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, layer: int, parts: Sequence[Part]) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        x = x + self.dropout(self.attention(self.attention_norm(x), layer, parts))
        return x + self.dropout(self.ffn(self.ffn_norm(x)))

    @torch.no_grad()
    def initialise(self, form: str, num_layers: int) -> None:
        """Draw the weights by the table at the top of this file."""
        attention, ffn = self.attention, self.ffn
        if form == "scaled":
            depth = (2 * num_layers) ** -0.5
            for layer, scale in ((attention.qkv, 1.0), (attention.out, depth), (ffn.up, 1.0), (ffn.down, depth)):
                nn.init.normal_(layer.weight, std=scale * layer.in_features**-0.5)
                nn.init.zeros_(layer.bias)
            return
        for projection in attention.qkv.weight.chunk(3):
            nn.init.xavier_uniform_(projection, gain=2**-0.5)
        nn.init.xavier_uniform_(attention.out.weight)
        nn.init.zeros_(attention.out.bias)
        bound = attention.qkv.in_features**-0.5
        nn.init.uniform_(attention.qkv.bias, -bound, bound)
        for layer in (ffn.up, ffn.down):
            bound = layer.in_features**-0.5
            nn.init.uniform_(layer.weight, -bound, bound)
            nn.init.uniform_(layer.bias, -bound, bound)
