"""The certificate of a position scheme: what is right passes, a planted mistake fails by the check named here."""

import json
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from alibi_lm.evaluate.conformance import CheckSchemeConfig, check_scheme
from alibi_lm.evaluate.conformance_checks import Conformance
from alibi_lm.positions import POSITIONS
from alibi_lm.positions.alibi import Alibi, AlibiConfig
from alibi_lm.positions.base import PositionScheme
from alibi_lm.positions.rotary import Rotary, RotaryConfig

torch.set_num_threads(1)


class Sign(Alibi):
    """Far keys are rewarded."""

    def distance_bias(self, distance):
        return -super().distance_bias(distance)

    key_bias = PositionScheme.key_bias
    score_mod = PositionScheme.score_mod


class SignOfKeys(Alibi):
    """The fast form alone has the other sign."""

    def key_bias(self, k_pos):
        return -super().key_bias(k_pos)


class OffByOne(Alibi):
    """The form of one score takes the next token for the own one."""

    def score_mod(self, q_pos, k_pos, span):
        slopes = self.slopes_per_head()
        return lambda score, b, h, q, k: score - slopes[h] * (q_pos[q] - k_pos[k] - 1).clamp_min(0)


class Clamped(Alibi):
    """The form by distance ends at 127, the bias does not."""

    def bias(self, q_pos, k_pos):
        return Alibi.distance_bias(self, (q_pos[:, None] - k_pos).clamp_min(0))

    def distance_bias(self, distance):
        return super().distance_bias(distance.clamp_max(127))


class TimesRoot(Alibi):
    """The fast form is scaled by sqrt(head_dim), as if it were divided again."""

    def key_bias(self, k_pos):
        return super().key_bias(k_pos) * self.shape.head_dim**0.5


class HalfPositions(Alibi):
    """Positions in the dtype of a half-precision model."""

    def distance_bias(self, distance):
        slopes = self.slopes_per_head()
        return -slopes.view(-1, *[1] * distance.dim()) * distance.bfloat16().float()


class HalfAngles(Rotary):
    """Angles in half precision."""

    def tables(self, positions):
        angles = (positions.bfloat16()[:, None] * self.inv_freq.bfloat16()).float()
        return angles.cos(), angles.sin()


class OffsetLost(Rotary):
    """Positions counted from the first token of the pass."""

    def tables(self, positions):
        return super().tables(positions - positions[0])


class Absolute(PositionScheme):
    """Adds vectors of absolute positions, and says that shifts change nothing."""

    def add_to_embeddings(self, x, positions):
        return x + torch.outer(positions * 0.3, torch.arange(x.shape[-1]) * 0.1).sin().to(x.dtype)


class ByKeys(Alibi):
    """The bias depends on how many keys there are."""

    def bias(self, q_pos, k_pos):
        return super().bias(q_pos, k_pos) * (1 + len(k_pos) / 100)


class LooksAhead(PositionScheme):
    """A bias made from the mean of all keys, also the later ones."""

    def content_bias(self, q, k, x, q_pos, k_pos):
        return (q * k.mean(dim=2, keepdim=True)).sum(-1)[..., None] * (q_pos[:, None] - k_pos)[None, None] * 0.1


class Detached(Alibi):
    """Trained slopes without a gradient."""

    def slopes_per_head(self):
        return super().slopes_per_head().detach()


class HalfGradient(Alibi):
    """Trained slopes with the gradient of something else."""

    def slopes_per_head(self):
        slopes = super().slopes_per_head()
        return slopes.detach() + 0.5 * (slopes - slopes.detach())


class TooShort(PositionScheme):
    """A table without a word of where it ends."""

    def __init__(self, shape):
        super().__init__(shape)
        self.table = nn.Parameter(torch.randn(shape.train_length, shape.model_dim))

    translation_invariant = False

    def add_to_embeddings(self, x, positions):
        return x + self.table[positions.clamp_max(10**6)]


MUTANTS = [
    (Sign, "tail of the bias"),
    (SignOfKeys, "forms of the bias"),
    (OffByOne, "forms of the bias"),
    (Clamped, "forms of the bias"),
    (TimesRoot, "backends"),
    (HalfPositions, "precision"),
    (HalfAngles, "precision"),
    (OffsetLost, "cache"),
    (Absolute, "shift"),
    (ByKeys, "cache"),
    (LooksAhead, "causality"),
    (Detached, "parameters"),
    (HalfGradient, "gradients"),
    (TooShort, "longer inputs"),
]


@dataclass
class Config:
    """Builds a class, with ALiBi's or rotary's settings where it is one of them."""

    name: str = "mutant"
    kind: type = PositionScheme

    def build(self, shape):
        if issubclass(self.kind, Alibi):
            return self.kind(AlibiConfig(learned_slopes=self.kind in (Detached, HalfGradient)), shape)
        return self.kind(RotaryConfig(), shape) if issubclass(self.kind, Rotary) else self.kind(shape)


@pytest.fixture(autouse=True)
def _no_clock(monkeypatch):
    monkeypatch.setattr(Conformance, "cost", lambda self: iter(()))


def failed(kind: type) -> set[str]:
    return {check.name for check in Conformance(Config(kind=kind)).checks() if check.passed is False}


@pytest.mark.parametrize(("kind", "check"), MUTANTS, ids=lambda value: getattr(value, "__name__", None))
def test_a_planted_mistake_is_caught_by_name(kind, check):
    assert check in failed(kind)


class NotANumber(Alibi):
    """No distance has a bias."""

    def distance_bias(self, distance):
        return super().distance_bias(distance) * float("nan")

    key_bias = PositionScheme.key_bias
    score_mod = PositionScheme.score_mod


def test_what_is_not_a_number_never_passes():
    assert {"shift", "cache", "backends", "gradients", "longer inputs"} <= failed(NotANumber)


@pytest.mark.parametrize("kind", [PositionScheme, Alibi, Rotary])
def test_what_is_right_passes(kind):
    assert failed(kind) == set()


VARIANTS = [
    *((name, {}) for name in POSITIONS),
    ("alibi", {"learned_slopes": True}),
    ("alibi", {"half_precision": True}),
    ("alibi", {"last_exponent": 4.0}),
    ("bam", {"trained_centre": True}),
    ("bam", {"start": "readme", "scale_inside": True}),
    ("cope", {"scaled_term": False}),
    ("cope", {"gate_keys": True}),
    ("dape", {"base": "alibi"}),
    ("fire", {"reading": "dape"}),
    ("fox", {"gates": "bias"}),
    ("fox", {"gates": "fixed"}),
    ("fox", {"scaled": False}),
    ("kerple_power", {"weighted": True}),
    ("path", {"forget_gate": True}),
    ("rotary", {"rotated_share": 0.5}),
    ("rotary", {"frequency_share": 0.5}),
    ("shaw", {"values": False}),
    ("wall", {"scalar_gate": True}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "settings"), VARIANTS, ids=str)
def test_every_scheme_of_the_registry_conforms(name, settings, capsys):
    status = check_scheme(CheckSchemeConfig(position=name, settings=settings))
    page = capsys.readouterr().out
    assert status == 0, page


MINE = '''
from dataclasses import dataclass
from alibi_lm.positions.base import PositionScheme

@dataclass
class RootConfig:
    """Minus the root of the distance."""
    name: str = "root"
    strength: float = 1.0
    def build(self, shape):
        return Root(self.strength, shape)

class Root(PositionScheme):
    """Its bias."""
    def __init__(self, strength, shape):
        super().__init__(shape)
        self.strength = strength
    def distance_bias(self, distance):
        line = -self.strength * distance.float().sqrt()
        return line.expand(self.shape.num_heads, *distance.shape)
'''


def test_a_file_of_the_users_own_is_checked_where_it_lies(tmp_path, capsys):
    file = tmp_path / "my_scheme.py"
    file.write_text(MINE)
    assert check_scheme(CheckSchemeConfig(scheme_file=str(file), settings={"strength": 2.0})) == 0
    page = capsys.readouterr().out
    assert page.startswith("Position scheme root (strength=2.0)")
    assert "root conforms to the protocol of position schemes." in page
    assert check_scheme(CheckSchemeConfig(scheme_file=str(file), settings={"strength": -2.0}, json=True)) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["conforms"] is False and found["position"] == "root"
    assert {c["name"] for c in found["checks"] if c["passed"] is False} == {
        "tail of the bias",
        "longer inputs",
    } - (
        set()
        if any(c["name"] == "longer inputs" and not c["passed"] for c in found["checks"])
        else {"longer inputs"}
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"position": "alibbi"}, "position = alibbi. Allowed here: none, sinusoidal"),
        ({}, "Which scheme.*position= one of none, sinusoidal"),
        ({"scheme_file": "nowhere.py"}, r"scheme_file = nowhere\.py is no file"),
        ({"scheme_file": "empty.py"}, "holds no config of a scheme"),
        ({"scheme_file": "broken.py"}, "cannot be loaded: NameError"),
        ({"position": "alibi", "settings": {"slope": 1}}, "do not fit alibi"),
    ],
    ids=str,
)
def test_what_is_no_scheme_is_refused(tmp_path, monkeypatch, settings, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.py").write_text("x = 1\n")
    (tmp_path / "broken.py").write_text("x = y\n")
    with pytest.raises(ValueError, match=message):
        check_scheme(CheckSchemeConfig(**settings))
