"""A decoder-only, pre-norm transformer that is independent of any particular position scheme.

Shape letters: B batch, T tokens now, S keys seen, D model dim, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import cycle
from numbers import Integral
from typing import Any, cast

import torch
from torch import Tensor, nn

from alibi_lm import runtime
from alibi_lm.attention import Attend, Request, build_backend
from alibi_lm.model.cache import KeyValueCache, LayerPositions
from alibi_lm.model.changed_bias import CONTENT_HOOKS, FadedBias, RowScaledBias, only_a_bias, scales_bias
from alibi_lm.model.interface import Scores, check_ids
from alibi_lm.model.layers import ACTIVATIONS, Block, ModelConfig, Part
from alibi_lm.model.query_scale import QueryScaleConfig, visible_keys
from alibi_lm.model.training_positions import PlainConfig
from alibi_lm.model.vocabulary import AdaptiveVocabulary, Vocabulary
from alibi_lm.positions import PositionConfig, PositionScheme, PositionShape
from alibi_lm.settings import require

__all__ = ["ACTIVATIONS", "KeyValueCache", "ModelConfig", "TransformerLM"]


class TransformerLM(nn.Module):
    """The language model: an implementation of `model.interface.LanguageModel`.

    Args:
        config: sizes.
        position: config of the position scheme.
        attention: name of the attention backend.
        vocab_size: V.
        train_length: tokens per training sequence.
        context_length: longest sequence to be served; None: train_length.
        query_scale: factors of the queries; None: no factors.
        training_positions: whether positions are counted or drawn; None: counted.

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
        query_scale: QueryScaleConfig | None = None,
        training_positions: PlainConfig | None = None,
    ) -> None:
        super().__init__()
        self.config, self.position = config, position
        self.vocab_size, self.train_length = vocab_size, train_length
        self.label, self.identity, self.precision = "model", "", "float32"
        self.drawn = training_positions or PlainConfig()
        self.strength = 1.0
        self.shape = PositionShape(
            model_dim=config.model_dim,
            head_dim=config.head_dim,
            num_heads=config.num_heads,
            num_layers=config.num_layers,
            train_length=train_length,
            context_length=context_length or train_length,
        )
        self.positions = self._build_schemes()
        self.backend = build_backend(attention, self.schemes[0], position.name)
        self.set_query_scale(query_scale or QueryScaleConfig())
        if config.adaptive_cutoffs:
            cutoffs, factor, dropout = config.adaptive_cutoffs, config.adaptive_factor, config.adaptive_dropout
            self.vocabulary: Vocabulary | AdaptiveVocabulary = AdaptiveVocabulary(
                vocab_size, config.model_dim, cutoffs, factor, dropout
            )
        else:
            self.vocabulary = Vocabulary(vocab_size, config.model_dim, config.tied)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.num_layers)])
        self.final_norm = nn.LayerNorm(config.model_dim) if config.final_norm else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)
        self.initialise()

    def _build_schemes(self) -> nn.ModuleList:
        shape, total = self.shape, self.drawn.range
        # Positions of the tokens if none are given, (context_length,) int64; None: 0, 1, ...
        self.places = self.drawn.draw(shape.context_length, seed=shape.context_length)
        if total is not None:  # the whole range is trained on
            shape = replace(shape, train_length=total, context_length=total)
        # With one seed all schemes get the same other weights: a scheme's own are drawn separately, or last.
        with torch.random.fork_rng(devices=[]):
            first = self.position.build(shape)
            require(
                total is None or first.training_positions(torch.Generator(), 1) is None,
                f"training_positions = {self.drawn.name} with position = {self.position.name}, which draws "
                "positions itself. Use training_positions=plain, or position.random_offset=false.",
            )
            copies = self.config.num_layers if first.per_layer else 1
            return nn.ModuleList([first, *(self.position.build(shape) for _ in range(copies - 1))])

    def set_query_scale(self, config: QueryScaleConfig) -> None:
        """Multiply queries by the factors of this config; trained factors begin at their initial values.

        Raises:
            ValueError: the score bias is to be multiplied too, and it depends on content.
        """
        scheme = self.schemes[0]
        require(
            not (scales_bias(config, scheme) and scheme.defines(*CONTENT_HOOKS)),
            f"query_scale.scale_bias = true with position={self.position.name}, whose bias depends on content. "
            "Use query_scale.scale_bias=false: what is made from the queries grows with them anyway.",
        )
        self.query_scale = config.build(scheme.shape)

    @torch.no_grad()
    def initialise(self) -> None:
        """Draw all parameters from torch's global generator; those of position schemes last."""
        self.vocabulary.initialise()
        for block in self.layers:
            block.initialise(self.config.initialisation, len(self.layers))
        for scheme in self.schemes:
            scheme.initialise()

    @property
    def schemes(self) -> list[PositionScheme]:
        """One scheme for all layers, or one for each."""
        return cast(list[PositionScheme], list(self.positions))

    @property
    def layers(self) -> list[Block]:
        """The blocks, in order."""
        return cast(list[Block], list(self.blocks))

    @property
    def active_schemes(self) -> list[PositionScheme]:
        """The schemes at the strength that was set."""
        if self.strength == 1:
            return self.schemes
        if self.strength == 0:
            return [PositionScheme(self.shape)]
        return [FadedBias(scheme, self.strength) for scheme in self.schemes]

    def set_strength(self, strength: float) -> None:
        """Apply the position scheme fully (1), not at all (0), or with its bias times a number in between.

        Raises:
            ValueError: a number in between, although the scheme is more than a score bias.
        """
        require(
            strength in (0, 1) or only_a_bias(self.schemes[0]),
            f"positions_fade with position={self.position.name}: only a score bias fades. Use positions_fade=0.",
        )
        self.strength = strength

    @property
    def max_length(self) -> int | None:
        return self.drawn.range or self.active_schemes[0].max_position

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def hidden(
        self,
        input_ids: Tensor,
        positions: Tensor | None = None,
        cache: KeyValueCache | Sequence[KeyValueCache] | None = None,
        window: int | None = None,
    ) -> Tensor:
        """Hidden states from which the next token of each position is predicted.

        Args:
            input_ids: (B, T) int64, in [0, V).
            positions: (T,) int64, >= 0, each above the one before; None: 0, 1, ... or after the cache's last one.
            cache: keys and values of earlier tokens, extended in place; with one, there are no gradients. Several:
                one for each row of input_ids, which may have seen different numbers of tokens.
            window: each layer's queries see only keys at distances below this; None: all keys before them.

        Returns:
            (B, T, D).

        Raises:
            ValueError: positions out of order or past the scheme's table, a window without a key, or a pass that
                the backend cannot serve.
        """
        if not torch.compiler.is_compiling():  # the text of a message would break the graph
            check_ids(None, input_ids)
        require(
            window is None or (isinstance(window, int) and window >= 1),
            f"window = {window}. Use a whole number >= 1, or None.",
        )
        if cache is not None and torch.is_grad_enabled():
            with torch.no_grad():
                return self.hidden(input_ids, positions, cache, window)
        if cache is None or isinstance(cache, KeyValueCache):
            parts = [self._part(slice(None), cache, positions, input_ids, window)]
        else:
            require(
                len(cache) == len(input_ids),
                f"{len(cache)} caches with {len(input_ids)} rows of input_ids. Give one for each row.",
            )
            rows = (slice(row, row + 1) for row in range(len(cache)))
            parts = [self._part(*pair, positions, input_ids, window) for pair in zip(rows, cache, strict=True)]
        x = self.vocabulary.embed(input_ids)
        if self.config.scale_embeddings:
            x = x * math.sqrt(self.config.model_dim)
        added = [self.active_schemes[0].add_to_embeddings(x[part.rows], part.at) for part in parts]
        x = self.dropout(added[0] if len(added) == 1 else torch.cat(added))
        for layer, block in enumerate(self.layers):
            x = block(x, layer, parts)
        for part in parts:
            if part.cache is not None:
                part.cache.advance()
        return self.final_norm(x)

    def _part(
        self,
        rows: slice,
        cache: KeyValueCache | None,
        positions: Tensor | None,
        input_ids: Tensor,
        window: int | None,
    ) -> Part:
        """What attention needs for some rows; weights are not used before the positions are checked."""
        length, start = input_ids.shape[1], 0 if cache is None else cache.next_position
        seen, schemes = 0 if cache is None else cache.tokens_seen, self.active_schemes
        # Ends of the positions as Python numbers, if they can be known without reading the device.
        if positions is None and self.places is not None:
            places = self.places[seen : seen + length]
            require(
                len(places) == length,
                f"{seen + length} tokens, and positions were drawn for {len(self.places)}. "
                "Prepare the model for more with `serve`.",
            )
            first, last = int(places[0]), int(places[-1])
            positions = places.to(input_ids.device)
        elif positions is None:
            first, last = start, start + length - 1
            positions = torch.arange(start, start + length, device=input_ids.device)
        else:
            first, last = _ends(positions, length, start)
        limit = self.max_length
        if limit is not None and last >= limit:
            raise ValueError(
                f"position={self.position.name} has {limit} positions; got position {last}. "
                f"Use inference_length <= {limit}, or a scheme that is defined past its trained length."
            )
        request = None
        if cache is None or not cache.attends:
            k_pos = positions
            if cache is not None:
                k_pos, first = cache.key_positions(positions), cache.first if cache.tokens_seen else first
            device, dtype = positions.device.type, self.layers[0].attention.qkv.weight.dtype
            dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype
            dropout = self.config.attention_dropout if self.training else 0.0
            request = Request(positions, k_pos, last - first, window, dtype, dropout)
        if cache is not None:
            cache.begin(first, last, length, window)
        return Part(rows, positions, self._prepare(schemes, positions, request), cache)

    def _prepare(
        self, schemes: list[PositionScheme], positions: Tensor, request: Request | None
    ) -> list[LayerPositions]:
        """What each layer needs in a pass.

        Without a request a cache attends by itself; it serves no query scale.
        """
        # Each of these lists has one entry for all layers, or one for each.
        tables = [scheme.tables(positions) for scheme in schemes]
        attends: list[Attend | None] = [None]
        factors: list[Tensor | None] = [None]
        if request is not None:
            visible = visible_keys(request.q_pos, request.k_pos, request.window)
            dtype = torch.promote_types(request.dtype, torch.float32)
            scales, biases = [factor.to(dtype) for factor in self.query_scale.factors(visible)], schemes
            if scales and scales_bias(self.query_scale.config, schemes[0]):
                count = range(max(len(schemes), len(scales)))
                pairs = zip(count, cycle(schemes), cycle(scales), strict=False)
                biases = [RowScaledBias(scheme, request.q_pos, factor) for _, scheme, factor in pairs]
            attends, factors = [self.backend.prepare(scheme, request) for scheme in biases], [*scales] or [None]
        columns = zip(self.layers, cycle(schemes), cycle(tables), cycle(attends), cycle(factors), strict=False)
        return [LayerPositions(scheme, table, attend, factor) for _, scheme, table, attend, factor in columns]

    def forward(self, input_ids: Tensor, *, last: bool = False, **options: Any) -> Tensor:
        """Logits of the next token.

        Args:
            input_ids: (B, T) int64.
            last: only for the last position.
            options: `positions`, `cache` and `window` of `hidden`.

        Returns:
            (B, T, V), or (B, 1, V) with `last`; float32 (float64 in a float64 model).

        Raises:
            ValueError: ids of another shape or dtype, or outside the vocabulary; see also `hidden`.
        """
        check_ids(self.vocab_size, input_ids)
        hidden = self.hidden(input_ids, **options)
        return self.vocabulary.logits(hidden[:, -1:] if last else hidden)

    def logits(self, input_ids: Tensor) -> Tensor:
        return self(input_ids)

    def nats(
        self,
        input_ids: Tensor,
        target_ids: Tensor,
        counted: Tensor | None = None,
        *,
        hidden: Callable[..., Tensor] | None = None,
        **options: Any,
    ) -> Tensor:
        """Minus the natural logarithm of each target's probability, for training.

        (B, T), (B, T) int64 -> (B, T) float32 (float64 in a float64 model); `options` are those of `hidden`, which
        may be given compiled. With `counted`, (B, T) bool, only for those targets, (N,). In training mode a
        scheme that draws its positions does so here, from torch's global generator.

        Raises:
            ValueError: inputs and targets of unequal shapes; see also `hidden`.
        """
        check_ids(None, input_ids, target_ids)
        if self.training and options.get("positions") is None:
            options["positions"] = self.training_positions(input_ids.shape[1])
        return self.nats_of((hidden or self.hidden)(input_ids, **options), target_ids, counted)

    def nats_of(self, hidden: Tensor, target_ids: Tensor, counted: Tensor | None = None) -> Tensor:
        """The same from hidden states: (B, T, D), (B, T) int64 -> (B, T), or (N,) with `counted`."""
        if counted is not None:
            return self.vocabulary.nats(hidden[counted], target_ids[counted])
        return self.vocabulary.nats(hidden.flatten(0, 1), target_ids.flatten()).view_as(target_ids)

    def training_positions(self, length: int) -> Tensor | None:
        """Positions of a training pass, if the scheme draws them: (T,) int64 on the model's device, or None."""
        positions = self.schemes[0].training_positions(torch.default_generator, length)
        return None if positions is None else positions.to(self.device)

    def log_prob(self, input_ids: Tensor, target_ids: Tensor) -> Tensor:
        """Natural-log probability of each target.

        Args:
            input_ids: (B, T) int64.
            target_ids: (B, T) int64; target t follows input t.

        Returns:
            (B, T) float32 (float64 in a float64 model).

        Raises:
            ValueError: tensors of other or unequal shapes or dtypes, ids outside the vocabulary, or more tokens
                than the scheme has positions.
        """
        check_ids(self.vocab_size, input_ids, target_ids)
        return -self.nats_of(self.hidden(input_ids), target_ids)

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
        check_ids(self.vocab_size, input_ids, target_ids, score_from)
        with runtime.autocast(self.device, self.precision):
            hidden = self.hidden(input_ids, positions=positions, window=window)[:, score_from:]
            targets = target_ids[:, score_from:]
            nats = self.nats_of(hidden, targets)
            if not hits:
                return Scores(nats, None)
            return Scores(nats, self.vocabulary.first_choices(hidden.flatten(0, 1)).view_as(targets) == targets)

    def serve(self, length: int) -> None:
        require(
            isinstance(length, Integral) and length >= 1, f"inference length = {length}. Use a whole number >= 1."
        )
        if length == self.shape.context_length:
            return
        before, self.shape = self.shape, replace(self.shape, context_length=length)
        try:
            rebuilt = self._build_schemes()
        except ValueError:
            self.shape = before  # so that the next call does not take the model for ready
            raise
        # The parameters stay the same tensors, because an optimizer may hold them.
        rebuilt.load_state_dict(self.positions.state_dict(keep_vars=True), assign=True)
        self.positions = rebuilt.to(self.device).train(self.training)

    def refuses(self, capability: str) -> str:
        """Why something is not supported by this model; empty if it is.

        Args:
            capability: `positions` of `score`, not supported with drawn ones; `window`, always supported; or
                `training`, on the model's device.
        """
        if capability == "positions" and self.drawn.range is not None:
            return f"training_positions={self.drawn.name} draws its positions"
        if capability != "training":
            return ""
        positions = torch.arange(self.train_length, device=self.device)
        dropout = self.config.attention_dropout
        request = Request(positions, positions, self.train_length - 1, None, torch.float32, dropout)
        try:
            with torch.enable_grad():
                self.backend.choose(self.schemes[0], request)
        except ValueError as error:
            return str(error)
        return ""

    def num_parameters(self) -> int:
        """Number of trained parameters; tied ones count once."""
        return sum(p.numel() for p in self.parameters())

    def position_parameters(self) -> int:
        """Number of trained parameters that belong to the position scheme alone."""
        return sum(p.numel() for scheme in self.schemes for p in scheme.parameters())


def _ends(positions: Tensor, length: int, start: int) -> tuple[int, int]:
    """First and last of given positions; only on a CPU are all of them checked."""
    fits = positions.shape == (length,) and positions.dtype == torch.int64
    require(
        fits,
        f"positions of shape {tuple(positions.shape)}, {positions.dtype}, with {length} tokens. "
        f"Use ({length},), torch.int64: one position for each column of input_ids.",
    )
    first, last = int(positions[0]), int(positions[-1])
    ascending = bool((positions.diff() > 0).all()) if positions.is_cpu else last - first >= length - 1
    require(
        first >= start and ascending,
        f"positions = {first} ... {last}. Use whole numbers from {start} on, each above the one before"
        + (": the cache holds the positions before." if start else "."),
    )
    return first, last
