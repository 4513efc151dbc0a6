"""Cache policies by name, and what each promises.

    full        keeps everything: nothing is lost
    proved      keeps, for each head, the window that the bound from the weights gives: for any input, no head
                loses more than `lost_share` of its attention
    certified   keeps, for each head, the window that the norms of all queries and keys so far give, and has in
                `cache.lost_share` a bound on what was lost: a rising norm may need keys that were dropped already
    window      keeps the last `window` tokens and the first `sinks`: no promise

The bound is that of `bound.py`. `window` with sinks is the heuristic of StreamingLLM (Xiao et al. 2023, arXiv
2309.17453, section 3.2): kept tokens have positions without a gap, as if the sinks were right before the window.

Shape letters: H heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from alibi_lm.attention.base import more_than_a_bias
from alibi_lm.model.bound import LARGEST_WINDOW, LOST_SHARE, Bias, BiasTail, excess_from_weights
from alibi_lm.model.cache import KeyValueCache
from alibi_lm.model.transformer import TransformerLM
from alibi_lm.model.window_cache import WindowCache
from alibi_lm.positions import PositionScheme
from alibi_lm.settings import require, require_one_of

POLICIES = ("full", "proved", "certified", "window")


def weight_excess(model: TransformerLM) -> list[Tensor]:
    """The bound B of one of our models from its weights, for every input: for each layer (H,) float64."""
    found = []
    for block in model.layers:
        norm, qkv = block.attention_norm, block.attention.qkv
        (w_q, w_k, _), (b_q, _, _) = qkv.weight.chunk(3), qkv.bias.chunk(3)
        found.append(excess_from_weights(w_q, w_k, b_q, norm.weight, norm.bias, block.attention.num_heads))
    return found


def weight_windows(model: TransformerLM, lost_share: float = LOST_SHARE) -> list[Tensor]:
    """The window of each head by that bound: for each layer (H,) int64.

    Raises:
        ValueError: the scheme has no bound; the message says why.
    """
    pairs = zip(bias_tails(model), weight_excess(model), strict=True)
    return [tail.windows(excess, lost_share) for tail, excess in pairs]


def bias_tails(model: TransformerLM) -> list[BiasTail]:
    """The tails of the bias, for each layer.

    Raises:
        ValueError: the scheme has none; the message says why.
    """
    reason = no_bound(model.active_schemes[0])
    require(not reason, reason)

    def bias_of(scheme: PositionScheme) -> Bias:
        device = model.device  # of the parameters that the bias is made from
        return lambda distance: scheme.distance_bias(distance.to(device))

    tails = [BiasTail(bias_of(scheme)) for scheme in model.active_schemes]
    return tails * (len(model.layers) // len(tails))


def beyond_scheme(model: TransformerLM) -> str:
    """Why no window can serve a model, apart from its scheme; empty if one may."""
    if (scale := model.query_scale.config.name) != "none":
        return f"its queries are multiplied by factors (query_scale={scale}), which no window accounts for"
    if model.drawn.range is not None:
        return f"its positions are drawn (training_positions={model.drawn.name}), and windows count tokens"
    return ""


def more_than_distance(scheme: PositionScheme) -> str:
    """Why a scheme needs the keys that a window drops; empty if it does not."""
    if scheme.defines("bias", "content_bias", "content_key_bias"):
        return "its bias is more than a function of the distance"
    return more_than_a_bias(scheme)


def cannot_roll(model: TransformerLM) -> str:
    """Why a model cannot continue from its last tokens only; empty if it can."""
    scheme = model.active_schemes[0]
    if not scheme.translation_invariant or model.max_length is not None:
        return "its positions are absolute, so that a window cannot roll on"
    return more_than_distance(scheme)


def no_bound(scheme: PositionScheme) -> str:
    """Why the weight of distant keys has no bound under a scheme; empty if the bias may give one."""
    if reason := more_than_distance(scheme):
        return reason
    if not scheme.defines("distance_bias"):
        return "it has no bias that falls with the distance"
    return "it changes queries and keys by their positions" if scheme.defines("transform_qk") else ""


def open_cache(
    model: TransformerLM,
    policy: str = "full",
    *,
    lost_share: float | None = None,
    window: int | None = None,
    sinks: int = 0,
) -> KeyValueCache:
    """The cache of a policy (see the table above) for a model whose weights do not change.

    Args:
        model: the language model.
        policy: full, proved, certified or window.
        lost_share: proved, certified: share of a query's attention that a head may lose; None: `LOST_SHARE`.
        window: window: how many of the last tokens are kept.
        sinks: window: how many of the first tokens are kept too.

    Raises:
        ValueError: a policy that does not fit the scheme, with the reason, or a setting out of range.
    """
    require_one_of("cache", policy, POLICIES)
    require(
        (window is not None) == (policy == "window"),
        f"window = {window} with cache={policy}. "
        + ("Say how many tokens to keep: window=2048." if policy == "window" else "It belongs to cache=window."),
    )
    require(
        lost_share is None or policy in ("proved", "certified"),
        f"lost_share = {lost_share} with cache={policy}. It belongs to cache=proved or certified.",
    )
    require(sinks == 0 or policy == "window", f"sinks = {sinks} with cache={policy}. They belong to cache=window.")
    if policy == "full":
        return KeyValueCache()
    name = model.position.name
    reason = beyond_scheme(model) or (cannot_roll(model) if policy == "window" else "")
    require(not reason, f"cache = {policy} with position={name}: {reason}. Use cache=full.")
    native, layers, heads = model.backend.name == "native", len(model.layers), model.config.num_heads
    if policy == "window":
        assert window is not None
        require(1 <= window <= LARGEST_WINDOW, f"window = {window}. Allowed: 1 to {LARGEST_WINDOW}.")
        require(0 <= sinks <= LARGEST_WINDOW, f"sinks = {sinks}. Allowed: 0 to {LARGEST_WINDOW}.")
        same = torch.full((heads,), window + sinks)
        return WindowCache([same.clone() for _ in range(layers)], native, sinks=sinks)
    lost_share = LOST_SHARE if lost_share is None else lost_share
    require(0 < lost_share < 1, f"lost_share = {lost_share}. Use a number above 0 and below 1, such as 1e-6.")
    absent = "" if model.strength else ", which takes no part any more"
    try:
        tails = bias_tails(model)
        if policy == "proved":
            return WindowCache(weight_windows(model, lost_share), native, tails, proved=lost_share)
        for tail in tails:  # refuse now what would fail with any norms, even the smallest
            tail.windows(torch.zeros(heads), lost_share)
    except ValueError as error:
        others = "full" if cannot_roll(model) else "full or window"
        raise ValueError(f"cache = {policy} with position={name}{absent}: {error}. Use cache={others}.") from None
    ones = [torch.ones(heads, dtype=torch.int64) for _ in range(layers)]
    return WindowCache(ones, native, tails, grows=lost_share)
