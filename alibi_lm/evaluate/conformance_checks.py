"""The checks of a position scheme, each with one number and its largest allowed value.

The scheme is built into a tiny model, with its parameters moved away from their initial values. What its bias does
with distance and what it costs is reported but not judged, with one exception: a bias that grows without bound
gives all attention to the farthest key, and fails.

Shape letters: B batch, T tokens, S keys, H heads, K head dim.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from alibi_lm.attention import Backends
from alibi_lm.attention.native import why_not
from alibi_lm.attention.sdpa import SdpaAttention
from alibi_lm.model.layers import KeyValueCache, ModelConfig
from alibi_lm.model.transformer import TransformerLM
from alibi_lm.positions import POSITIONS
from alibi_lm.positions.base import distances
from alibi_lm.settings import require

SIZES = ModelConfig(num_layers=2, model_dim=24, num_heads=3, ffn_dim=48)
TRAIN_LENGTH, VOCABULARY = 64, 50
ROUNDING = 1e-4
"""A difference below this share of what another order of the tokens changes in an output counts as rounding."""
FAR = 1 << 17
"""Distances up to here are summed for the tail of a bias."""
NO_BOUND = 3.0
"""A sum over distances that more than triples with each doubling has growing terms."""


@dataclass(frozen=True)
class Check:
    """One line of the certificate."""

    name: str
    passed: bool | None
    """None: reported, not judged."""
    found: str
    """The number, in words."""


CHECKS = {
    "causality": "causality", "shift": "shift", "cache": "cache", "forms of the bias": "forms",
    "backends": "agreement", "gradients": "gradients", "precision": "precision", "longer inputs": "longer",
    "parameters": "parameters", "tail of the bias": "tail", "cost": "cost",
}  # fmt: skip
"""The checks in their order: their names on the page, and the methods of `Conformance` below."""
Found = tuple[bool | None, str]
"""`passed` and `found` of a check."""


class InDouble(TorchFunctionMode):
    """Inside this context, every conversion to float32 or half precision gives float64 instead."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        lower = (torch.float32, torch.bfloat16, torch.float16)
        casts = (torch.Tensor.float, torch.Tensor.bfloat16, torch.Tensor.half)

        def raised(value: Any) -> Any:
            return torch.float64 if any(value is dtype for dtype in lower) else value

        args, kwargs = [raised(a) for a in args], {k: raised(a) for k, a in (kwargs or {}).items()}
        return (torch.Tensor.double if func in casts else func)(*args, **kwargs)


class Conformance:
    """The checks of one scheme.

    Args:
        config: of the scheme.
    """

    def __init__(self, config: Any) -> None:
        self.config = config
        self.scheme = self.model().schemes[0]
        self.backends = [
            name
            for name in ("eager", "sdpa", "native")
            if not (name == "native" and why_not()) and not Backends(name, "").refuses_scheme(self.scheme)
        ]

    def model(
        self, attention: str = "eager", train_length: int = 512, sizes: ModelConfig = SIZES, moved: float = 0.3
    ) -> TransformerLM:
        """A tiny model with the scheme, its parameters moved away from their initial values; always the same."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            model = TransformerLM(sizes, self.config, attention, VOCABULARY, train_length).eval()
            with torch.no_grad():
                for scheme in model.schemes:
                    for parameter in scheme.parameters():
                        parameter.add_(torch.randn(parameter.shape) * moved)
        return model

    def ids(self, batch: int, length: int) -> Tensor:
        """Token ids, the same for the same sizes."""
        return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(length))

    def checks(self) -> Iterator[Check]:
        """All checks, one after another; an error in one of them is its result."""
        for name, check in CHECKS.items():
            try:
                yield from (Check(name, passed, found) for passed, found in getattr(self, check)())
            except Exception as error:
                at = traceback.extract_tb(error.__traceback__)[-1]
                words = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                yield Check(name, False, f"{words} ({Path(at.filename).name}, line {at.lineno})")

    # --- what must hold --------------------------------------------------------------------------

    def causality(self) -> Iterator[Found]:
        """An output depends on every earlier token, and its gradient for each later one is exactly 0."""
        for attention in self.backends:
            model, seen = self.model(attention), dict[str, Tensor]()
            embed = model.vocabulary.embed
            model.vocabulary.embed = lambda ids, embed=embed, seen=seen: seen.setdefault(  # type: ignore[method-assign, misc]
                "x", embed(ids).detach().requires_grad_()
            )
            model(self.ids(1, 12))[0, 7].square().sum().backward()
            gradient = seen["x"].grad
            assert gradient is not None
            reached = gradient[0].abs().amax(dim=1)
            leak, blind = float(reached[8:].max()), int((reached[:8] == 0).sum())
            words = f"{attention}: largest gradient of a later token {leak:.1e} (0)"
            yield leak == 0 and blind == 0, f"{words}, earlier tokens without one {blind} (0)"

    def shift(self) -> Iterator[Found]:
        """Moving all positions changes nothing where the scheme says so, and something where it does not."""
        model, tokens, places = self.model(), self.ids(1, 60), torch.arange(60)
        shifts = [37] if model.max_length else [37, 5000]
        with torch.no_grad():
            here = model(tokens, positions=places)
            moved = _largest((model(tokens, positions=places + s) - here).abs().max() for s in shifts)
        share, invariant = moved / self._size(model, tokens), self.scheme.translation_invariant
        limit = ROUNDING if invariant else 10 * ROUNDING
        words = f"shifts of {', '.join(map(str, shifts))} change {share:.1e} of the output"
        claim = f"translation_invariant = {invariant}: {'at most' if invariant else 'more than'} {limit:.0e}"
        yield share <= limit if invariant else share > limit, f"{words} ({claim})"

    def cache(self) -> Iterator[Found]:
        """Decoding in ragged pieces equals one pass, also across gaps of the positions and with a window."""
        tokens, pieces = self.ids(2, 60), [23, 1, 1, 30, 5]
        starts = torch.arange(len(pieces)).repeat_interleave(torch.tensor(pieces))
        gaps = []
        for attention, (gap, window) in itertools.product(self.backends, [(0, None), (7, 30)]):
            model, cache = self.model(attention), KeyValueCache()
            places = torch.arange(60) + gap * starts
            with torch.no_grad():
                parts = [
                    model(piece, positions=where, cache=cache, window=window)
                    for piece, where in zip(tokens.split(pieces, 1), places.split(pieces), strict=True)
                ]
                whole = model(tokens, positions=places, window=window)
            gaps.append(float((torch.cat(parts, 1) - whole).abs().max()) / self._size(model, tokens))
        worst = _largest(gaps)
        yield worst <= ROUNDING, f"pieces of {pieces}: {worst:.1e} of the output (at most {ROUNDING:.0e})"

    def forms(self) -> Iterator[Found]:
        """The fast forms of a bias are the bias: of distance, of the key, of one score."""
        scheme = self.scheme
        q_pos, k_pos = torch.arange(20, 300, 7), torch.arange(3, 300)
        bias = scheme.bias(q_pos, k_pos)
        if bias is None:
            return
        bias = bias.detach()
        visible = (q_pos[:, None] >= k_pos).expand_as(bias)
        size = max(1.0, float(bias.abs().max()))
        gaps: dict[str, Tensor] = {}
        by_distance = scheme.distance_bias(distances(q_pos, k_pos))
        if by_distance is not None:
            gaps["distance_bias"] = by_distance - bias
        by_key = scheme.key_bias(k_pos)
        if by_key is not None:
            gap = (by_key[:, None] - bias).masked_fill(~visible, 0)
            gaps["key_bias"] = gap - (gap.sum(-1) / visible.sum(-1))[..., None]
        modify = scheme.score_mod(q_pos, k_pos, int(k_pos[-1] - k_pos[0]))
        if modify is not None:
            heads, rows, columns = (torch.arange(n) for n in bias.shape)
            gaps["score_mod"] = (
                modify(torch.zeros(()), torch.tensor(0), heads[:, None, None], rows[:, None], columns) - bias
            )
        for name, gap in gaps.items():
            worst = float(gap.detach().masked_fill(~visible, 0).abs().max()) / size
            yield worst <= 1e-5, f"{name} differs from bias by {worst:.1e} of the largest bias (at most 1e-05)"

    def agreement(self) -> Iterator[Found]:
        """All backends give the outputs and gradients of `eager`, also by slices and extra columns."""
        tokens, targets, results = self.ids(2, 101), self.ids(2, 101).flip(1), {}
        for attention, window in itertools.product(self.backends, (None, 9)):
            model = self.model(attention)
            # Use the code paths of long sequences on short ones.
            model.backend.chain = [SdpaAttention(3000, 0) if b.name == "sdpa" else b for b in model.backend.chain]
            nats = model.nats(tokens, targets, window=window)
            nats.sum().backward()
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            results[attention, window] = (nats.detach(), grads)
        for attention in self.backends[1:]:
            pairs = [(results[attention, window], results["eager", window]) for window in (None, 9)]
            worst_nats = _largest((nats - right).abs().max() for (nats, _), (right, _) in pairs)
            worst_grad = _largest(
                float((a - b).abs().max()) / _largest(g.abs().max() for g in right)
                for (_, grads), (_, right) in pairs
                for a, b in zip(grads, right, strict=True)
            )
            words = f"{attention} against eager: nats {worst_nats:.1e}, gradients {worst_grad:.1e}"
            yield worst_nats <= 1e-4 and worst_grad <= 1e-4, f"{words} (each at most 1e-04)"
        if not Backends("flex", "").refuses_scheme(self.scheme):
            model = self.model("flex")
            with torch.no_grad():
                apart = [model.nats(tokens, targets, window=w) - results["eager", w][0] for w in (None, 9)]
            worst = _largest(gap.abs().max() for gap in apart)
            words = f"flex against eager: nats {worst:.1e} (at most 1e-04), no gradients on a CPU"
            yield worst <= 1e-4, words

    def gradients(self) -> Iterator[Found]:
        """Gradients are those of finite differences in float64, along a random direction of each parameter."""
        tokens, targets, gaps = self.ids(1, 40), self.ids(1, 40).flip(1), list[float]()
        with InDouble():
            # Near the initial values, so that parameters stay where they are not clamped.
            model = self.model(moved=0.02).double()
            model.nats(tokens, targets).sum().backward()
            owned = [p for scheme in model.schemes for p in scheme.parameters()]
            for parameter in [*owned, model.layers[0].attention.qkv.weight]:
                require(parameter.grad is not None, "a parameter has no gradient")
                generator = torch.Generator().manual_seed(len(gaps) + 1)
                way = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
                values = []
                with torch.no_grad():
                    for step in (1e-6, -2e-6):
                        parameter += step * way
                        values.append(float(model.nats(tokens, targets).sum()))
                    parameter += 1e-6 * way
                assert parameter.grad is not None
                slope, expected = float((parameter.grad * way).sum()), (values[0] - values[1]) / 2e-6
                gaps.append(abs(slope - expected) / max(abs(expected), 1e-2))
        worst = _largest(gaps)
        yield worst <= 1e-4, f"{len(gaps)} parameters: off by {worst:.1e} of the slope (at most 1e-04)"

    def precision(self) -> Iterator[Found]:
        """In a bfloat16 model bias and rotation of queries keep float32 precision, at positions to 8,191."""
        scheme, reference = self.model().schemes[0].bfloat16(), self.model().schemes[0]
        reference.load_state_dict(scheme.state_dict())
        reference = reference.double()
        last = min(8191, (scheme.max_position or 8192) - 1)
        q_pos, k_pos = torch.tensor([0, 1, last // 3, last - 1, last]), torch.arange(0, last + 1, 7)
        bias = scheme.bias(q_pos, k_pos)
        if bias is not None:
            with InDouble():
                expected = reference.bias(q_pos, k_pos)
            assert expected is not None
            visible = (q_pos[:, None] >= k_pos).expand_as(bias)
            error = ((bias.double() - expected).abs() / expected.abs().clamp_min(1e-3))[visible].max().detach()
            words = f"bias in a bfloat16 model: {error:.1e} of its value ({bias.dtype}; at most 1e-05)"
            yield float(error) <= 1e-5 and bias.dtype in (torch.float32, torch.float64), words
        if scheme.defines("transform_qk"):
            generator = torch.Generator().manual_seed(0)
            q = torch.randn(1, SIZES.num_heads, len(q_pos), SIZES.head_dim, generator=generator).bfloat16()
            got, _ = scheme.transform_qk(q, q, scheme.tables(q_pos))
            with InDouble():
                want, _ = reference.transform_qk(q.double(), q.double(), reference.tables(q_pos))
            error = (got.double() - want).abs().max() / want.abs().max()
            words = f"queries at positions to {last:,} in bfloat16: {error:.1e} of the largest (at most 8e-03)"
            yield float(error) <= 8e-3, words

    def longer(self) -> Iterator[Found]:
        """Four and sixteen times the training length give finite values, or the documented error."""
        for times in (4, 16):
            model = self.model(self.backends[-1], train_length=TRAIN_LENGTH)
            length = times * TRAIN_LENGTH
            model.serve(length)
            tokens = self.ids(1, length)
            if model.max_length is None:
                with torch.no_grad():
                    finite = bool(torch.isfinite(model(tokens)).all())
                yield finite, f"{times} L = {length}: {'finite' if finite else 'NaN or infinite'}"
                continue
            try:
                model(tokens)
                yield False, f"{times} L = {length}: no error, with max_position = {model.max_length}"
            except ValueError as error:
                yield "positions" in str(error), f"{times} L = {length}: refused, {str(error).split('.')[0]}"

    def parameters(self) -> Iterator[Found]:
        """Every parameter takes part in training, and weights load at another context length."""
        # One step away from the initial values, where some are multiplied by others that are 0.
        model = self.model(train_length=128, moved=0.01).train()
        model.nats(self.ids(4, 128), self.ids(4, 128).flip(1)).sum().backward()
        named = {name: p for name, p in model.named_parameters() if name.startswith("positions.")}
        idle = [name for name, p in named.items() if p.grad is None or not bool(p.grad.abs().max() > 0)]
        weights = model.state_dict()
        model.serve(512)
        same = all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
        numbers = sum(p.numel() for p in named.values())
        words = f"{numbers:,} trained numbers, without a gradient: {', '.join(idle) or 'none'}"
        yield not idle and same, words + ("" if same else "; weights change with the context length")

    # --- what is only reported -------------------------------------------------------------------

    def tail(self) -> Iterator[Found]:
        """Whether the sum of exp(bias) over distances converges, and where 99% of it lies (arXiv 2307.10156)."""
        if not self.scheme.defines("distance_bias"):
            yield None, "no bias that is a function of distance"
            return
        line = self.model(moved=0.0).schemes[0].distance_bias(torch.arange(FAR))
        assert line is not None
        heads = torch.logcumsumexp(line.detach().double(), -1)
        growth = (heads[:, -1] - heads[:, FAR // 2 - 1]).exp()
        # If a sum converges, the last doubling of distances adds almost nothing.
        ends = growth < 1.01
        own = (heads < heads[:, -1:] + math.log(0.99)).sum(-1)[ends].tolist()
        words = f"at its start the sum of exp(bias) ends in {len(own)} of {len(ends)} heads"
        words += f"; 99% of it within {min(own):,} to {max(own):,} tokens" if own else ""
        yield None, f"{words} (summed to {FAR:,})"
        if float(growth.max()) > NO_BOUND:
            worst = f"the bias grows without bound: twice the distances, {float(growth.max()):.1e} times the sum"
            yield False, f"{worst} (at most {NO_BOUND:g} times). Far keys take all attention"

    def cost(self) -> Iterator[Found]:
        """Time to train, evaluate and decode over that without positions: medians of paired measurements."""
        sizes = ModelConfig(num_layers=2, model_dim=64, num_heads=4, ffn_dim=128)
        attention = self.backends[-1] if len(self.backends) > 1 else "eager"
        pair = [one.model(attention, 256, sizes) for one in (self, Conformance(POSITIONS["none"]()))]
        tokens, words = self.ids(4, 256), list[str]()

        def train(model: TransformerLM) -> None:
            model.nats(tokens, tokens).sum().backward()

        @torch.no_grad()
        def evaluate(model: TransformerLM) -> None:
            model.nats(tokens, tokens)

        @torch.no_grad()
        def decode(model: TransformerLM) -> None:
            cache = KeyValueCache()
            model(tokens[:1, :200], cache=cache)
            for at in range(200, 216):
                model(tokens[:1, at : at + 1], cache=cache)

        for work in (train, evaluate, decode):
            ratios = []
            for _ in range(6):
                times = [time.perf_counter()]
                for model in pair:
                    work(model)
                    times.append(time.perf_counter())
                ratios.append((times[1] - times[0]) / (times[2] - times[1]))
            words.append(f"{work.__name__} {statistics.median(ratios[1:]):.2f}")
        yield None, f"time over that of no positions (attention={attention}, 256 tokens): {', '.join(words)}"

    def _size(self, model: TransformerLM, tokens: Tensor) -> float:
        """What another order of the tokens changes in the output."""
        with torch.no_grad():
            return float((model(tokens) - model(tokens.flip(1))).abs().max())


def _largest(values: Iterable[float | Tensor]) -> float:
    """The largest value, NaN where one is: Python's max drops a NaN that does not come first."""
    return float(torch.tensor([float(value) for value in values], dtype=torch.float64).max())
