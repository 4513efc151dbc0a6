"""How far back a head must see: a bound on the attention weight of distant keys, and the window that follows.

Let b(d) be the bias of a head at distance d, and B an upper bound on the score of any key minus the score of the
query's own key, both before the bias. The weight of a key at distance d, relative to the own key's, is at most
exp(B + b(d) - b(0)). So all keys from distance w on together have at most the share

    exp(B - b(0)) sum_{d >= w} exp(b(d))                                                     (1)

of a query's attention, and a head that keeps the last w keys loses at most that. For ALiBi, b(d) = -m d, the sum
is exp(-m w) / (1 - exp(-m)), and a share eps needs w = (B + ln(1/eps) + ln(1/(1 - exp(-m)))) / m keys.

B follows from the weights, for every input. After a layer norm with gain g and shift s, the input of attention is
g z + s with |z| <= sqrt(D) and mean zero. With P = 1 - 11'/D, which removes the mean,

    A_q = W_q diag(g) P,   A_k = W_k diag(g) P,   c_q = W_q s + b_q,   M = A_q' A_k
    q_i . (k_j - k_i) = z_i' M z_j - z_i' M z_i + c_q' A_k (z_j - z_i)
                     <= D (|M|_2 + max(0, largest eigenvalue of -(M + M')/2)) + 2 sqrt(D) |A_k' c_q|

and B is this times the scale of the scores. The key's own constant cancels in the difference.

The bound holds in exact arithmetic: the rounding of float32 scores comes on top.

Shape letters: D model dim, H heads, K head dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from alibi_lm.positions.base import per_head
from alibi_lm.settings import require

LOST_SHARE = 2.0**-25
"""Share of a query's attention below which a float32 sum does not change."""
DENSE = 1 << 16
"""Up to this distance the sum of (1) is computed term by term."""
LONGEST_STREAM = 1 << 40
"""Tokens of the longest stream: keys further back than this do not exist."""
LARGEST_WINDOW = 1 << 22
"""Keys of the largest window; a head that needs more is refused."""

Bias = Callable[[Tensor], Tensor | None]
"""A function of distances, int64 of any shape -> (H, *shape), like `PositionScheme.distance_bias`."""


@dataclass
class HeadBounds:
    """Bounds on the attention of each head of a layer."""

    excess: Tensor
    """(H,) float64: B, the largest score of any key minus that of the query's own key, before the bias."""
    windows: Tensor
    """(H,) int64: keys that a query must see, including its own, to lose no more than the stated share."""


def bounds_from_weights(
    w_q: Tensor,
    w_k: Tensor,
    b_q: Tensor | None,
    b_k: Tensor | None,
    gain: Tensor | None,
    shift: Tensor | None,
    num_heads: int,
    bias: Bias | Tensor,
    *,
    lost_share: float = LOST_SHARE,
    scale: float | None = None,
    centred: bool = True,
) -> HeadBounds:
    """The bound of one attention layer, from the weight tensors of any model; it holds for every input.

    This is the interface for models of other libraries (BLOOM, MPT, Falcon); its signature is meant to be stable.

    Args:
        w_q: (H K, D), as in `nn.Linear`: q = w_q x + b_q; the rows of a head are consecutive.
        w_k: (G K, D), where the number of key heads G divides H (G < H if groups of query heads share keys).
        b_q: (H K,) or None.
        b_k: (G K,) or None; it cancels, and is accepted only for the caller's convenience.
        gain: (D,), gain of the norm before attention; None: ones.
        shift: (D,), shift of that norm; None: zeros.
        num_heads: H.
        bias: slopes of ALiBi (H,), positive, the bias being -slope times distance; or the bias as a function of
            distances, which must not grow with the distance.
        lost_share: largest share of a query's attention that may be lost, in (0, 1).
        scale: factor of q . k; None: K^-0.5.
        centred: whether the norm subtracts the mean (layer norm; false: RMS norm).

    Returns:
        Bounds of the H heads, on the CPU.

    Raises:
        ValueError: a share out of range, or a bias that leaves distant keys too much weight (see `BiasTail`).
    """
    excess = excess_from_weights(w_q, w_k, b_q, gain, shift, num_heads, scale=scale, centred=centred)
    return HeadBounds(excess, BiasTail(bias).windows(excess, lost_share))


def excess_from_weights(
    w_q: Tensor,
    w_k: Tensor,
    b_q: Tensor | None,
    gain: Tensor | None,
    shift: Tensor | None,
    num_heads: int,
    *,
    scale: float | None = None,
    centred: bool = True,
) -> Tensor:
    """B of each head, (H,) float64; see `bounds_from_weights`."""

    def exact(x: Tensor | None) -> Tensor:
        return torch.zeros(()) if x is None else x.detach().to("cpu", torch.float64)

    w_q, w_k = exact(w_q), exact(w_k)
    dim, head_dim = w_q.shape[1], len(w_q) // num_heads
    constant = exact(b_q) + w_q @ exact(shift).expand(dim).double()
    maps = [weight if gain is None else weight * exact(gain) for weight in (w_q, w_k)]
    maps = [a - a.mean(dim=1, keepdim=True) if centred else a for a in maps]
    a_q, a_k = (a.unflatten(0, (-1, head_dim)) for a in maps)
    a_k = a_k.repeat_interleave(num_heads // len(a_k), dim=0)
    # M = A_q' A_k is D x D with rank at most K: it acts only within the span of both, of 2 K dimensions.
    basis, _ = torch.linalg.qr(torch.cat([a_q, a_k], dim=1).mT)  # (H, D, 2 K)
    m = (a_q @ basis).mT @ (a_k @ basis)
    opposite = torch.linalg.eigvalsh(-(m + m.mT) / 2)[:, -1].clamp_min(0)
    of_constant = (a_k.mT @ constant.view(num_heads, head_dim, 1)).flatten(1).norm(dim=1)
    spread = dim * (torch.linalg.matrix_norm(m, ord=2) + opposite) + 2 * math.sqrt(dim) * of_constant
    return spread * (head_dim**-0.5 if scale is None else scale)


class BiasTail:
    """The logarithms of the sums in (1): how much weight the bias leaves to all keys from a distance on.

    Sums are exact up to distance `DENSE`, beyond that upper bounds (blocks bounded by their first term), for
    streams of up to `LONGEST_STREAM` tokens. So any bias that does not grow with the distance works without a
    special formula; one whose sum does not converge needs windows above `LARGEST_WINDOW`, and is refused.

    Args:
        bias: see `bounds_from_weights`.

    Raises:
        ValueError: the bias grows with the distance somewhere, or there is none.
    """

    def __init__(self, bias: Bias | Tensor) -> None:
        if isinstance(bias, Tensor):
            slopes = bias.detach().to("cpu", torch.float64)
            function: Bias = lambda distance: -per_head(slopes, distance) * distance  # noqa: E731
        else:
            function = bias
        beyond = [DENSE]
        while beyond[-1] < LONGEST_STREAM:
            beyond.append(beyond[-1] + beyond[-1] // 64)
        self.distance = torch.cat([torch.arange(DENSE), torch.tensor(beyond)])
        with torch.no_grad():
            line = function(self.distance)
        require(line is not None, "there is no bias, so that all keys may weigh alike")
        assert line is not None
        self.line = line.to("cpu", torch.float64)
        """(H, N): the bias at each distance of the grid."""
        require(
            bool((self.line.diff(dim=1) <= 1e-6).all()),
            "its bias grows with the distance somewhere",
        )
        widths = self.distance.diff(append=self.distance[-1:] + 1)
        terms = self.line + widths.double().log()
        self.tail = terms.flip(1).logcumsumexp(1).flip(1) - self.line[:, :1]
        """(H, N): ln of the sum over each distance and beyond, relative to the own key's term."""

    def at(self, distance: Tensor) -> Tensor:
        """An upper bound of ln sum_{e >= d} exp(b(e) - b(0)): distances (H, ...) int64 -> (H, ...) float64."""
        index = torch.searchsorted(self.distance, distance.contiguous(), right=True) - 1
        return self.tail.gather(1, index.flatten(1)).view(distance.shape)

    def windows(self, excess: Tensor, lost_share: float = LOST_SHARE) -> Tensor:
        """Keys that each head must see: (H,) B -> (H,) int64.

        Raises:
            ValueError: a share out of range, or a head that needs more than `LARGEST_WINDOW` keys.
        """
        require(0 < lost_share < 1, f"lost_share = {lost_share}. Use a number above 0 and below 1, such as 2^-25.")
        most = math.log(lost_share) - excess.to("cpu", torch.float64)
        enough = self.tail <= most[:, None]
        first = enough.int().argmax(dim=1)
        found = torch.where(enough.any(dim=1), self.distance[first], LONGEST_STREAM).clamp_min(1)
        head = int(found.argmax())
        require(
            int(found[head]) <= LARGEST_WINDOW,
            f"its bias falls too slowly: with scores {float(excess[head]):.3g} above the own key's, head {head} "
            f"would have to keep more than {LARGEST_WINDOW:,} keys",
        )
        return found
