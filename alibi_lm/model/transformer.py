"""A decoder-only, pre-norm transformer that knows nothing of any particular position scheme.

Shape letters: B batch, T tokens now, S keys seen, H heads, D model dim, K head dim, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alibi_lm.attention import AttentionBackend, build_backend
from alibi_lm.model.adaptive import AdaptiveVocabulary
from alibi_lm.model.init import INITIALISATIONS, initialise
from alibi_lm.model.interface import Scores
from alibi_lm.model.vocabulary import Vocabulary
from alibi_lm.positions import PositionConfig, PositionScheme, PositionShape
from alibi_lm.settings import require

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}


@dataclass
class ModelConfig:
    """Sizes and regularisation of the transformer."""

    name: str = "transformer"
    num_layers: int = 4
    """Blocks of attention and feed-forward."""
    model_dim: int = 128
    """Width of the residual stream."""
    num_heads: int = 8
    """Attention heads; must divide model_dim."""
    ffn_dim: int = 512
    """Width of the feed-forward layer's inside."""
    activation: str = "gelu"
    """relu, gelu or silu."""
    dropout: float = 0.0
    """On embeddings and on each layer's two outputs, in [0, 1)."""
    attention_dropout: float = 0.0
    """On attention weights."""
    activation_dropout: float = 0.0
    """After the activation."""
    final_norm: bool = True
    """A layer norm after the last layer (the paper's models have none)."""
    scale_embeddings: bool = True
    """Multiply word vectors by sqrt(model_dim), before positions are added."""
    tied: bool = True
    """The output distribution uses the embedding's vectors; always so with adaptive_cutoffs."""
    adaptive_cutoffs: list[int] = field(default_factory=list)
    """Borders of the frequency bands of an adaptive vocabulary; empty: one plain softmax."""
    adaptive_factor: float = 4.0
    """Each band's vectors are this many times narrower than the band's before."""
    adaptive_dropout: float = 0.0
    """On the adaptive softmax's input and after each tail's projection."""
    initialisation: str = "scaled"
    """scaled or fairseq, see alibi_lm/model/init.py."""

    def __post_init__(self) -> None:
        for name in ("num_layers", "model_dim", "num_heads", "ffn_dim"):
            require(getattr(self, name) >= 1, f"model.{name} = {getattr(self, name)}. Use a whole number >= 1.")
        require(
            self.model_dim % self.num_heads == 0,
            f"model.num_heads = {self.num_heads} does not divide model.model_dim = {self.model_dim}. "
            "Each head takes model_dim / num_heads dimensions.",
        )
        require(
            self.activation in ACTIVATIONS,
            f"model.activation = {self.activation!r}. Allowed: {', '.join(ACTIVATIONS)}.",
        )
        for name in ("dropout", "attention_dropout", "activation_dropout", "adaptive_dropout"):
            require(0 <= getattr(self, name) < 1, f"model.{name} = {getattr(self, name)}. Allowed: [0, 1).")
        require(
            self.initialisation in INITIALISATIONS,
            f"model.initialisation = {self.initialisation!r}. Allowed: {', '.join(INITIALISATIONS)}.",
        )
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
        """Dimensions of a head."""
        return self.model_dim // self.num_heads


class KeyValueCache:
    """Keys and values of the tokens seen so far, for decoding in pieces.

    Attributes:
        layers: (k, v) of each layer, each (B, H, S, K).
        positions: (S,) int64.
    """

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []
        self.positions: Tensor | None = None

    def next_position(self) -> int:
        """The position after the last one seen; 0 when empty."""
        return 0 if self.positions is None else int(self.positions[-1]) + 1

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append a layer's new keys and values; returns all of them."""
        if layer == len(self.layers):
            self.layers.append((k, v))
        else:
            old_k, old_v = self.layers[layer]
            self.layers[layer] = torch.cat([old_k, k], dim=2), torch.cat([old_v, v], dim=2)
        return self.layers[layer]


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: ModelConfig, backend: AttentionBackend) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.dropout = config.attention_dropout
        self.backend = backend
        self.qkv = nn.Linear(config.model_dim, 3 * config.model_dim)
        self.out = nn.Linear(config.model_dim, config.model_dim)

    def forward(self, x: Tensor, layer: int, position: LayerPositions, cache: KeyValueCache | None) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        # (B, T, 3 D) -> three of (B, H, T, K)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = position.scheme.transform_qk(q, k, position.tables)
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        y = self.backend(q, k, v, position.prepared, self.dropout if self.training else 0.0)
        return self.out(y.transpose(1, 2).flatten(2))


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
    """Attention and feed-forward, each behind a layer norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, backend: AttentionBackend) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.model_dim)
        self.attention = Attention(config, backend)
        self.ffn_norm = nn.LayerNorm(config.model_dim)
        self.ffn = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, layer: int, position: LayerPositions, cache: KeyValueCache | None) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        x = x + self.dropout(self.attention(self.attention_norm(x), layer, position, cache))
        return x + self.dropout(self.ffn(self.ffn_norm(x)))


@dataclass
class LayerPositions:
    """What one scheme contributes to a forward pass, computed once and used by every layer it serves."""

    scheme: PositionScheme
    tables: tuple[Tensor, ...]
    prepared: Any


class TransformerLM(nn.Module):
    """The language model.

    Args:
        config: sizes.
        position: config of the position scheme.
        attention: name of the attention backend.
        vocab_size: V.
        train_length: tokens of a training sequence.
        context_length: longest sequence to be served; None: train_length.

    Raises:
        ValueError: settings that do not fit together.
    """

    def __init__(
        self,
        config: ModelConfig,
        position: PositionConfig,
        attention: str,
        vocab_size: int,
        train_length: int,
        context_length: int | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.position = position
        self.vocab_size = vocab_size
        self.train_length = train_length
        self.label, self.identity = "model", ""
        backend = build_backend(attention)
        shape = PositionShape(
            model_dim=config.model_dim,
            head_dim=config.head_dim,
            num_heads=config.num_heads,
            num_layers=config.num_layers,
            train_length=train_length,
            context_length=context_length or train_length,
        )
        # One seed gives all schemes the same weights elsewhere: what a scheme draws is drawn aside, or last.
        with torch.random.fork_rng(devices=[]):
            first = position.build(shape)
            copies = 1 if first.share_across_layers else config.num_layers
            self.positions = nn.ModuleList([first, *(position.build(shape) for _ in range(copies - 1))])
        if config.adaptive_cutoffs:
            self.vocabulary: Vocabulary | AdaptiveVocabulary = AdaptiveVocabulary(
                vocab_size,
                config.model_dim,
                config.adaptive_cutoffs,
                config.adaptive_factor,
                config.adaptive_dropout,
            )
        else:
            self.vocabulary = Vocabulary(vocab_size, config.model_dim, config.tied)
        self.blocks = nn.ModuleList([Block(config, backend) for _ in range(config.num_layers)])
        self.final_norm = nn.LayerNorm(config.model_dim) if config.final_norm else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)
        self.backend = backend
        initialise(self)

    @property
    def schemes(self) -> list[PositionScheme]:
        """One scheme for all layers, or one for each."""
        return cast(list[PositionScheme], list(self.positions))

    @property
    def layers(self) -> list[Block]:
        """The blocks, in order."""
        return cast(list[Block], list(self.blocks))

    @property
    def max_position(self) -> int | None:
        """Number of positions that the scheme has; None where any position is defined."""
        return self.schemes[0].max_position

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor | None = None,
        cache: KeyValueCache | None = None,
        window: int | None = None,
    ) -> Tensor:
        """Hidden states from which the next token of each position is predicted.

        Args:
            input_ids: (B, T) int64.
            positions: (T,) int64, ascending; None: 0, 1, ... or the positions after the cache's last.
            cache: keys and values of earlier tokens; extended in place.
            window: each layer's queries see only keys at distances below it; None: all keys before them.

        Returns:
            (B, T, D).

        Raises:
            ValueError: a position past the scheme's table.
        """
        length = input_ids.shape[1]
        # The last position as a Python number, where it can be known without reading the device.
        if positions is None:
            start = 0 if cache is None else cache.next_position()
            positions = torch.arange(start, start + length, device=input_ids.device)
            last = start + length - 1
        else:
            last = int(positions[-1]) if self.max_position is not None else 0
        if self.max_position is not None and last >= self.max_position:
            raise ValueError(past_the_table(self.schemes[0], last))
        k_pos = positions
        if cache is not None:
            k_pos = positions if cache.positions is None else torch.cat([cache.positions, positions])
            cache.positions = k_pos

        x = self.vocabulary.embed(input_ids)
        if self.config.scale_embeddings:
            x = x * math.sqrt(self.config.model_dim)
        x = self.schemes[0].add_to_embeddings(x, positions)
        x = self.dropout(x)
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        shared = [
            LayerPositions(
                scheme,
                scheme.tables(positions),
                self.backend.prepare(scheme, positions, k_pos, window, dtype),
            )
            for scheme in self.schemes
        ]
        for layer, block in enumerate(self.layers):
            x = block(x, layer, shared[layer % len(shared)], cache)
        return self.final_norm(x)

    def nats(self, input_ids: Tensor, target_ids: Tensor, **options: Any) -> Tensor:
        """Minus the natural logarithm of each target's probability.

        Args:
            input_ids: (B, T) int64.
            target_ids: (B, T) int64; target t follows input t.
            options: `positions`, `cache` and `window` of `forward`.

        Returns:
            (B, T) float32 (float64 in a float64 model).
        """
        hidden = self(input_ids, **options)
        return self.vocabulary.nats(hidden.flatten(0, 1), target_ids.flatten()).view_as(target_ids)

    @property
    def max_length(self) -> int | None:
        """Most tokens of a sequence; None where any length is defined."""
        return self.max_position

    @property
    def device(self) -> torch.device:
        """Where the weights are, and where inputs belong."""
        return next(self.parameters()).device

    def serve(self, length: int) -> None:
        """Get ready for sequences of `length` tokens: schemes with automatic scaling depend on it."""
        if length == self.schemes[0].shape.context_length:
            return
        state = self.positions.state_dict()
        shape = replace(self.schemes[0].shape, context_length=length)
        with torch.random.fork_rng(devices=[]):
            schemes = nn.ModuleList(self.position.build(shape) for _ in self.positions)
        schemes.load_state_dict(state)
        self.positions = schemes.to(self.device).train(self.training)

    def refuses(self, capability: str) -> str:
        """Why `positions` or `window` of `score` cannot be had; empty, because both can."""
        return ""

    @torch.inference_mode()
    def score(
        self,
        input_ids: Tensor,
        target_ids: Tensor,
        *,
        score_from: int = 0,
        positions: Tensor | None = None,
        window: int | None = None,
        hits: bool = False,
    ) -> Scores:
        """See `LanguageModel`."""
        hidden = self(input_ids, positions=positions, window=window)[:, score_from:]
        targets = target_ids[:, score_from:]
        nats = self.vocabulary.nats(hidden.flatten(0, 1), targets.flatten()).view_as(targets)
        if not hits:
            return Scores(nats, None)
        best = self.vocabulary.log_probs(hidden.flatten(0, 1)).argmax(-1).view_as(targets)
        return Scores(nats, best == targets)

    def log_prob(self, input_ids: Tensor, target_ids: Tensor) -> Tensor:
        """Natural-log probability of each target: (B, T) int64, (B, T) int64 -> (B, T)."""
        return -self.nats(input_ids, target_ids)

    def num_parameters(self) -> int:
        """Trained numbers, tied ones counted once."""
        return sum(p.numel() for p in self.parameters())


def past_the_table(scheme: PositionScheme, position: int) -> str:
    """The message for a position that a scheme does not have."""
    return (
        f"position={_scheme_name(scheme)} has {scheme.max_position} positions; got position {position}. "
        f"Use inference_length <= {scheme.max_position}, or a scheme defined past its trained length "
        "(none, sinusoidal, rotary, alibi, t5)."
    )


def _scheme_name(scheme: PositionScheme) -> str:
    return type(scheme).__name__.lower()
