"""FoX, the forgetting transformer: gates on the tokens between a key and a query lower the score of the key.

Source: Lin, Nikishin, He & Courville 2025, "Forgetting Transformer", arXiv 2503.02130, section 3; the authors'
code is zhixuan-lin/forgetting-transformer (commit 883f260) and fla-org/flash-linear-attention (commit bc3b101).

    f[h, t] = sigmoid(weight[h] . x_t + gate_bias[h])
    scores[h, i, j] = q_i . k_j / sqrt(head_dim) + ln f[h, j + 1] + ... + ln f[h, i]

x_t is the layer's input (after its norm). The gate of a key does not act on the key itself. Each layer has its own
gates. The bias is a number per key, C_i - C_j with the cumulative sum C, so it needs no (T, S) tensor. Gates
that are the same for all tokens give ALiBi, with slopes -ln f. `gates` chooses among the authors' forms:

    input   as above, from gates of 1/2 (`start_bias`, the gate_bias at the start)
    bias    gate_bias alone: ALiBi with trained slopes, one set per layer
    fixed   the same, not trained

In the last two, head h forgets to 1/e in T_h tokens, f = exp(-1 / T_h), with T_h from `shortest` to `longest` in
equal ratios. `scaled=false` leaves out the division by sqrt(head_dim). With gates from the input that is CABLE
(Veisi & Mansourian 2025, arXiv 2503.08067; axiomlab/Cable, commit 8bc6b83), whose gate input is minus ours.

Past the trained length: defined everywhere; keys behind strong gates are forgotten at any length.
Differs from the paper: its "Pro" block (output gate, output norm, normed and shifted keys) is left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alibi_lm.positions.alibi import LinearBias
from alibi_lm.positions.base import PositionScheme, PositionShape, exact
from alibi_lm.settings import require, require_one_of

GATES = ("input", "bias", "fixed")


@dataclass
class FoxConfig:
    """Forget gates."""

    name: str = "fox"
    gates: str = "input"
    """input, bias or fixed."""
    start_bias: float = 0.0
    """Initial gate_bias, with gates=input: 0 gives gates of 1/2, the authors' initial value."""
    shortest: float = 2.0
    """Number of tokens after which the first head has forgotten to 1/e, with gates=bias or fixed."""
    longest: float | None = None
    """The same for the last head; null: train_length."""
    scaled: bool = True
    """Divide q.k by sqrt(head_dim); false: CABLE."""

    starts: ClassVar[tuple[str, ...]] = ("start_bias",)
    """Settings that a trained run no longer depends on."""

    def __post_init__(self) -> None:
        require_one_of("position.gates", self.gates, GATES)
        require(
            0 < self.shortest <= (math.inf if self.longest is None else self.longest),
            f"position.shortest = {self.shortest}, longest = {self.longest}. Use 0 < shortest <= longest.",
        )
        own, others = ("start_bias",), ("shortest", "longest")
        for name in others if self.gates == "input" else own:
            default = type(self).__dataclass_fields__[name].default
            require(
                getattr(self, name) == default,
                f"position.{name} = {getattr(self, name)} with position.gates = {self.gates}, which has no use "
                f"for it. Leave it out; {' and '.join(own if self.gates == 'input' else others)} can be chosen.",
            )

    def build(self, shape: PositionShape) -> Fox:
        return (GatedByInput if self.gates == "input" else GatedAlike)(self, shape)


class Fox(PositionScheme):
    """The part that both forms share: the scale of scores."""

    per_layer = True

    def __init__(self, config: FoxConfig, shape: PositionShape) -> None:
        super().__init__(shape)
        self.config = config

    def defines(self, *hooks: str) -> bool:
        # With the usual scale queries are left alone: a score bias and nothing else.
        return super().defines(*(h for h in hooks if h != "transform_qk" or not self.config.scaled))

    def transform_qk(self, q: Tensor, k: Tensor, tables: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        return (q, k) if self.config.scaled else (q * q.shape[-1] ** 0.5, k)


class GatedByInput(Fox):
    """Gates from the layer's input."""

    cache_inputs = True

    def __init__(self, config: FoxConfig, shape: PositionShape) -> None:
        super().__init__(config, shape)
        self.weight = nn.Parameter(torch.empty(shape.num_heads, shape.model_dim))
        self.gate_bias = nn.Parameter(torch.empty(shape.num_heads))
        self.initialise()

    def initialise(self) -> None:
        """Normal weights, standard deviation model_dim^-0.5, like the model's projections; one bias for all."""
        nn.init.normal_(self.weight, std=self.shape.model_dim**-0.5)
        nn.init.constant_(self.gate_bias, self.config.start_bias)

    @exact
    def features(self, x: Tensor) -> Tensor:
        """Logarithms of the gates: (B, T, D) -> (B, T, H) float32 or better."""
        return F.logsigmoid(F.linear(x, self.weight.to(x.dtype), self.gate_bias.to(x.dtype)))

    def content_key_bias(self, x: Tensor | None, k_pos: Tensor) -> Tensor:
        assert x is not None
        return -x.double().cumsum(1).mT


class GatedAlike(Fox, LinearBias):
    """The same gate for all tokens of a head: ALiBi with slopes -ln f."""

    fixed: Tensor

    def __init__(self, config: FoxConfig, shape: PositionShape) -> None:
        super().__init__(config, shape)
        self.trained = config.gates == "bias"
        if self.trained:
            self.gate_bias = nn.Parameter(torch.empty(shape.num_heads))
            self.initialise()
        else:
            self.register_exact("fixed", -1 / self._times())

    def _times(self) -> Tensor:
        """Tokens in which each head forgets to 1/e at the start, (H,) float64."""
        ends = math.log(self.config.shortest), math.log(self.config.longest or self.shape.train_length)
        return torch.linspace(*ends, self.shape.num_heads, dtype=torch.float64, device="cpu").exp()

    @torch.no_grad()
    def initialise(self) -> None:
        """ln(sigmoid(b)) = -1 / T where b = -ln(exp(1 / T) - 1)."""
        if self.trained:
            self.gate_bias.copy_(-torch.expm1(1 / self._times()).log())

    def slopes_per_head(self) -> Tensor:
        return -(F.logsigmoid(self.gate_bias.float()) if self.trained else self.fixed.float())
