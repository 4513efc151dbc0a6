"""What the tests of backends share: a scheme with parameters of some size, a pass, and attention in float64."""

import math

import torch

from alibi_lm.attention import AttentionBackend, Backends, Request
from alibi_lm.positions import POSITIONS, PositionScheme, PositionShape


def scheme_of(name: str, num_heads: int, **settings: object) -> PositionScheme:
    scheme = POSITIONS[name](**settings).build(PositionShape(num_heads * 8, 8, num_heads, 2, 64, 64))
    with torch.no_grad():
        for parameter in scheme.parameters():
            parameter.mul_(5)
    return scheme


def request(k_pos, queries=None, window=None, dtype=torch.float32, dropout=0.0) -> Request:
    """A pass over these positions, or over so many; the last `queries` of them are those of the queries."""
    k_pos = torch.arange(k_pos) if isinstance(k_pos, int) else k_pos
    q_pos = k_pos[len(k_pos) - (queries or len(k_pos)) :]
    return Request(q_pos, k_pos, int(k_pos[-1] - k_pos[0]), window, dtype, dropout)


def attend(backend, scheme, q, k, v, positions=None, window=None, dropout=0.0) -> torch.Tensor:
    """A pass through a backend, or through the one of a name and what it falls back on; queries come last."""
    positions = torch.arange(k.shape[2], device=k.device) if positions is None else positions
    asked = request(positions, q.shape[2], window, q.dtype, dropout)
    server = backend if isinstance(backend, AttentionBackend) else Backends(backend, "test")
    return server.prepare(scheme, asked)(q, k, v, None)


def draw(batch: int, heads: int, length: int, dim: int, size: float = 1.0) -> list[torch.Tensor]:
    """q, k, v and a gradient, (B, H, T, K), as a model has them: views of one tensor, tokens before heads."""
    torch.manual_seed(length + dim)
    return list((torch.randn(batch, length, 4, heads, dim) * size).permute(2, 0, 3, 1, 4).unbind(0))


def run(backend, scheme, length: int, dtype: torch.dtype, window: int | None = None) -> list[torch.Tensor]:
    """Output, and gradients of q, k, v and the scheme's parameters; the same draw for every dtype."""
    q, k, v, grad = (x.bfloat16().to(dtype) for x in draw(2, scheme.shape.num_heads, length, 8))
    leaves = [x.requires_grad_() for x in (q, k, v)] + list(scheme.parameters())
    out = attend(backend, scheme, q, k, v, window=window)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def weights(q, k, line=None, window=None, key_bias=None) -> torch.Tensor:
    """The definition in float64: what the last T queries (B, H, T, K) give to all keys (B, H, S, K), (B, H, T, S).

    line: (H, S), the bias of each distance; key_bias: (B, H, S).
    """
    queries, keys = q.shape[2], k.shape[2]
    distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
    scores = q.double() @ k.double().mT * q.shape[-1] ** -0.5
    if line is not None:
        scores = scores + line.double()[:, distance.clamp_min(0)]
    if key_bias is not None:
        scores = scores + key_bias.double()[..., None, :]
    return scores.masked_fill((distance < 0) | (distance >= (window or keys)), -math.inf).softmax(-1)


def definition(q, k, v, grad, line=None, window=None, features=None) -> list[torch.Tensor]:
    """Output and gradients of q, k, v and what is given of the bias by distance (H, T) and features (B, T, H).

    The bias of a key is minus the sum of the features up to it. All in float64.
    """
    q, k, v, line, features = leaves = [
        None if x is None else x.detach().double().requires_grad_() for x in (q, k, v, line, features)
    ]
    out = weights(q, k, line, window, None if features is None else -features.cumsum(1).mT) @ v
    return [out.detach(), *torch.autograd.grad(out, [x for x in leaves if x is not None], grad.double())]


def assert_within(actual: list[torch.Tensor], expected: list[torch.Tensor], budget: float) -> None:
    """Every tensor within `budget` of the largest entry of its expectation, or of the largest gradient."""
    scale = max(float(e.abs().max()) for e in expected[1:])
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine.shape == theirs.shape
        error = float((mine.double() - theirs.double()).abs().max())
        assert error <= budget * max(scale, float(theirs.abs().max()))
