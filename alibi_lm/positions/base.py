"""The position-scheme protocol: optional hooks around embeddings, queries, keys and scores.

The base class is itself a scheme: no position information at all (NoPE; Haviv et al. 2022, arXiv 2203.16634;
Kazemnejad et al. 2023, arXiv 2305.19466). A published method overrides the hooks that it defines:

    add_to_embeddings             position vectors added to the word vectors
    tables, transform_qk          a change of queries and keys
    distance_bias, or bias        a score bias that depends only on positions
    content_key_bias              a score bias that depends on the content of the key and of the tokens before it
    content_bias                  a score bias that depends on queries, keys or the layer's input
    scores, value_bias            scores other than q.k, and values that depend on positions (`eager` only)
    training_positions            positions that are drawn in each training pass

`score_mod` and `key_bias` are fast forms of the bias for some backends. A scheme may add them; the contract tests
compare them with the bias.

Positions are absolute, counted from 0: ascending int64 vectors on the model's device. Lengths and offsets are
never passed: `positions = arange(offset, offset + T)` contains both.

Shape letters: B batch, T tokens now, S keys seen, H heads, D model dim, K head dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn

from alibi_lm.settings import require

Hook = TypeVar("Hook", bound=Callable[..., Any])


@dataclass(frozen=True)
class PositionShape:
    """What a scheme may know about the model it serves."""

    model_dim: int
    head_dim: int
    num_heads: int
    num_layers: int
    train_length: int
    """Tokens in a training sequence."""
    context_length: int
    """Longest sequence that the scheme must serve: train_length in training, the inference length in a test."""


@dataclass
class NoneConfig:
    """No position information: the causal mask alone breaks the symmetry between positions."""

    name: str = "none"

    def build(self, shape: PositionShape) -> PositionScheme:
        return PositionScheme(shape)


def exact(hook: Hook) -> Hook:
    """Decorate a hook that multiplies matrices, so that its arithmetic is float32 or better.

    It runs without autocast, and half-precision arguments arrive as float32. Parameters keep the model's dtype:
    convert them to that of an argument (`self.weight.to(x.dtype)`).
    """

    @functools.wraps(hook)
    def run(scheme: PositionScheme, first: Tensor, *rest: Tensor | None) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return hook(scheme, *(x if x is None else at_least_float32(x) for x in (first, *rest)))

    return cast(Hook, run)


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision as float32; everything else, whole numbers too, as it is."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class PositionScheme(nn.Module):
    """A position scheme; every hook is a no-op until a subclass defines it.

    Hooks are pure functions of their arguments and the module's parameters. Their arithmetic is float32 or
    better for a model of any dtype; the attention backend casts once. So parameters are converted where they
    are used (`weight.float()`): a layer such as `nn.Linear` would compute in the model's dtype. Hooks that
    multiply matrices are decorated with `exact`.
    """

    max_position: int | None = None
    """Number of positions that the scheme has; None if every position is defined."""
    translation_invariant: ClassVar[bool] = True
    """Whether shifting all positions by a constant changes nothing; False if absolute positions count."""
    per_layer: ClassVar[bool] = False
    """Whether each layer has its own instance with its own parameters; otherwise all layers share one."""
    cache_inputs: bool = False
    """Whether hooks read the layer's input. A cache then keeps its `features` for every token, beside its key."""

    def __init__(self, shape: PositionShape) -> None:
        super().__init__()
        self.shape = shape
        self._exact: dict[str, Tensor] = {}

    def defines(self, *hooks: str) -> bool:
        """Whether the scheme overrides any of these hooks."""
        return any(getattr(type(self), hook) is not getattr(PositionScheme, hook) for hook in hooks)

    def register_exact(self, name: str, value: Tensor) -> None:
        """Register a constant that follows the module's device but never its dtype, and is not saved.

        A plain buffer would be rounded by `model.bfloat16()`, and converting back would not undo that.

        Args:
            name: attribute name.
            value: CPU tensor, any floating dtype.

        Raises:
            ValueError: it is elsewhere. A model may be built on the device `meta`, where nothing has a value.
        """
        require(
            value.is_cpu,
            f"{type(self).__name__}.{name} was made on device {value.device}. Constants keep their values where a "
            'model is built without memory: make them with device="cpu".',
        )
        self._exact[name] = value
        self.register_buffer(name, value, persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> PositionScheme:
        super()._apply(fn, recurse)
        for name, value in self._exact.items():
            setattr(self, name, value.to(getattr(self, name).device))
        return self

    def initialise(self) -> None:
        """Draw the scheme's own parameters, if it has any."""

    def training_positions(self, generator: torch.Generator, length: int) -> Tensor | None:
        """Draw the positions of a training pass.

        Args:
            generator: CPU generator, the only source of randomness.
            length: T.

        Returns:
            (T,) int64 on the CPU, strictly ascending, >= 0; None: 0, 1, ... T - 1.
        """
        return None

    def add_to_embeddings(self, x: Tensor, positions: Tensor) -> Tensor:
        """Add position vectors to (scaled) token embeddings: (B, T, D), (T,) int64 -> (B, T, D), same dtype."""
        return x

    def tables(self, positions: Tensor) -> tuple[Tensor, ...]:
        """The tables that `transform_qk` needs for these positions, (T,) int64; computed once per forward pass."""
        return ()

    def transform_qk(self, q: Tensor, k: Tensor, tables: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Transform queries and keys of the new tokens, before the keys enter the cache.

        Args:
            q: (B, H, T, K).
            k: (B, H, T, K).
            tables: the value of `tables(positions)`.

        Returns:
            q, k of the same dtypes, possibly wider. Scores are divided by the root of the returned width.
        """
        return q, k

    def features(self, x: Tensor) -> Tensor:
        """The part of the layer's input that hooks read, by default all; called once per token if `cache_inputs`.

        (B, T, D) -> (B, T, F), any F.
        """
        return x

    def distance_bias(self, distance: Tensor) -> Tensor | None:
        """The bias as a function of the distance q_pos - k_pos, if it depends on nothing else.

        Backends that use it need no (T, S) tensor, and compute its gradient cheaply.

        Args:
            distance: int64 >= 0, any shape.

        Returns:
            (H, *distance.shape) float32, or None.
        """
        return None

    def bias(self, q_pos: Tensor, k_pos: Tensor) -> Tensor | None:
        """Score bias of every head for every query and key, added after q.k / sqrt(head_dim).

        By default it is `distance_bias` of their distance. Override it if it depends on more than that.

        Args:
            q_pos: (T,) int64, absolute query positions.
            k_pos: (S,) int64, absolute key positions.

        Returns:
            (H, T, S) float32, finite also where k_pos > q_pos (the backend does the masking), or None.
        """
        bias = self.distance_bias(distances(q_pos, k_pos))
        return None if bias is None else bias.contiguous()

    def content_bias(self, q: Tensor, k: Tensor, x: Tensor | None, q_pos: Tensor, k_pos: Tensor) -> Tensor | None:
        """Score bias that depends on content, added to the other bias if there is one.

        Long sequences are served in slices of queries, so a row of the result must not depend on other queries.

        Args:
            q: (B, H, T, K), after `transform_qk`; any T queries.
            k: (B, H, S, K): the keys from the first one to at least the last query's own.
            x: (B, S, F), the `features` of the keys; None unless `cache_inputs`.
            q_pos: (T,) int64, positions among k_pos.
            k_pos: (S,) int64.

        Returns:
            (B, H, T, S) float32 or better, finite also where k_pos > q_pos, or None.
        """
        of_key = self.content_key_bias(x, k_pos)
        if of_key is None:
            return None
        of_query = of_key[..., torch.searchsorted(k_pos, q_pos)]
        return (of_key[..., None, :] - of_query[..., None]).to(torch.promote_types(q.dtype, torch.float32))

    def content_key_bias(self, x: Tensor | None, k_pos: Tensor) -> Tensor | None:
        """The content bias, if it is a number per key up to a constant for each query.

        The bias of a pair is the key's number minus that of the query's own key. Backends that use it need no
        (T, S) tensor.

        Args:
            x: (B, S, F), the `features` of the keys; a number may depend on those up to its own key.
            k_pos: (S,) int64.

        Returns:
            (B, H, S) float64, which keeps differences of long sums exact; or None.
        """
        return None

    def scores(self, q: Tensor, k: Tensor, x: Tensor | None, q_pos: Tensor, k_pos: Tensor) -> Tensor | None:
        """Scores that replace q.k / sqrt(head_dim), if they are not such a product.

        Arguments and result are those of `content_bias`: (B, H, T, S), or None.
        """
        return None

    def value_bias(self, weights: Tensor, q_pos: Tensor, k_pos: Tensor) -> Tensor | None:
        """The sum, with the attention weights, of what positions add to the values.

        Args:
            weights: (B, H, T, S), 0 where the key is hidden.
            q_pos: (T,) int64.
            k_pos: (S,) int64.

        Returns:
            (B, H, T, K), added to the output of attention, or None.
        """
        return None

    def score_mod(self, q_pos: Tensor, k_pos: Tensor, span: int) -> Callable[..., Tensor] | None:
        """The bias as a function of one score, for kernels that are generated around it.

        Args:
            q_pos: (T,) int64.
            k_pos: (S,) int64.
            span: k_pos[-1] - k_pos[0], the largest distance.

        Returns:
            A function (score, batch, head, query index, key index) -> score plus bias, or None.
        """
        if self.defines("bias"):
            table = self.bias(q_pos, k_pos)
            return None if table is None else lambda score, b, h, q, k: score + table[h, q, k]
        line = self.distance_bias(torch.arange(span + 1, device=k_pos.device))
        if line is None:
            return None
        return lambda score, b, h, q, k: score + line[h, (q_pos[q] - k_pos[k]).clamp_min(0)]

    def key_bias(self, k_pos: Tensor) -> Tensor | None:
        """The bias as a function of the key alone, up to a constant for each query and head, if it has this form.

        Softmax ignores a constant added to a row of scores, so a backend may add this vector to the scores of a
        plain causal kernel; no (T, S) tensor is built.

        Args:
            k_pos: (S,) int64.

        Returns:
            (H, S) float32 that equals `bias(q_pos, k_pos)` plus a term that does not depend on the key, for all
            k_pos <= q_pos; or None.
        """
        return None


def distances(q_pos: Tensor, k_pos: Tensor) -> Tensor:
    """Distances from each query back to each key, 0 where the key lies ahead: (T,), (S,) int64 -> (T, S) int64."""
    return (q_pos[:, None] - k_pos[None, :]).clamp_min(0)


def per_head(values: Tensor, distance: Tensor) -> Tensor:
    """A number per head in a form that combines with distances of any shape: (H,) -> (H, 1, ..., 1)."""
    return values.view(-1, *[1] * distance.dim())


def wave_frequencies(width: int, base: float = 10000.0) -> Tensor:
    """base^(-2c / width) for each pair c of `width` dimensions (Vaswani et al. 2017): (width / 2,) float64."""
    return base ** -(torch.arange(0, width, 2, dtype=torch.float64, device="cpu") / width)
