"""The certificate of a position scheme: what is right passes, a planted mistake fails by the check named here."""

import json
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from alibi_lm.evaluate import conformance_checks
from alibi_lm.evaluate.conformance import CheckSchemeConfig, check_scheme
from alibi_lm.evaluate.conformance_checks import CHECKS, Conformance
from alibi_lm.positions import POSITIONS
from alibi_lm.positions.alibi import Alibi, AlibiConfig
from alibi_lm.positions.base import PositionScheme
from alibi_lm.positions.rotary import Rotary, RotaryConfig

torch.set_num_threads(1)


def half_angles(self, positions):
    angles = (positions.bfloat16()[:, None] * self.inv_freq.bfloat16()).float()
    return angles.cos(), angles.sin()


def half_gradient(self):
    slopes = Alibi.slopes_per_head(self)
    return slopes.detach() + 0.5 * (slopes - slopes.detach())


def off_by_one(self, q_pos, k_pos, span):
    slopes = self.slopes_per_head()
    return lambda score, b, h, q, k: score - slopes[h] * (q_pos[q] - k_pos[k] - 1).clamp_min(0)


def half_positions(self, distance):
    return -self.slopes_per_head().view(-1, *[1] * distance.dim()) * distance.bfloat16().float()


def looks_ahead(self, q, k, x, q_pos, k_pos):
    return (q * k.mean(dim=2, keepdim=True)).sum(-1)[..., None] * (q_pos[:, None] - k_pos)[None, None] * 0.1


def absolute(self, x, positions):
    return x + torch.outer(positions * 0.3, torch.arange(x.shape[-1]) * 0.1).sin().to(x.dtype)


def by_distance(change):
    """A bias by distance alone, so that its fast forms follow."""
    plain = {"key_bias": PositionScheme.key_bias, "score_mod": PositionScheme.score_mod}
    return {"distance_bias": lambda self, d: change(Alibi.distance_bias(self, d)), **plain}


class TooShort(PositionScheme):
    """A table without a word of where it ends."""

    translation_invariant = False

    def __init__(self, shape):
        super().__init__(shape)
        self.table = nn.Parameter(torch.randn(shape.train_length, shape.model_dim))

    def add_to_embeddings(self, x, positions):
        return x + self.table[positions.clamp_max(10**6)]


MISTAKES = {  # name: (scheme, what it has instead, the check that must fail)
    "far keys are rewarded": (Alibi, by_distance(lambda bias: -bias), "tail of the bias"),
    "sign of the form by key": (
        Alibi, {"key_bias": lambda self, k_pos: -Alibi.key_bias(self, k_pos)}, "forms of the bias",
    ),
    "the next token for the own one": (Alibi, {"score_mod": off_by_one}, "forms of the bias"),
    "the form by distance ends at 127": (
        Alibi,
        {
            "bias": lambda self, q, k: Alibi.distance_bias(self, (q[:, None] - k).clamp_min(0)),
            "distance_bias": lambda self, d: Alibi.distance_bias(self, d.clamp_max(127)),
        },
        "forms of the bias",
    ),
    "scaled by sqrt(head_dim)": (
        Alibi, {"key_bias": lambda self, k: Alibi.key_bias(self, k) * self.shape.head_dim**0.5}, "backends",
    ),
    "positions in half precision": (Alibi, {"distance_bias": half_positions}, "precision"),
    "angles in half precision": (Rotary, {"tables": half_angles}, "precision"),
    "counted from the first token of the pass": (
        Rotary, {"tables": lambda self, positions: Rotary.tables(self, positions - positions[0])}, "cache",
    ),
    "absolute vectors that claim invariance": (PositionScheme, {"add_to_embeddings": absolute}, "shift"),
    "depends on how many keys there are": (
        Alibi, {"bias": lambda self, q, k: Alibi.bias(self, q, k) * (1 + len(k) / 100)}, "cache",
    ),
    "made from the mean of all keys": (PositionScheme, {"content_bias": looks_ahead}, "causality"),
    "learned without a gradient": (
        Alibi, {"slopes_per_head": lambda self: Alibi.slopes_per_head(self).detach()}, "parameters",
    ),
    "learned with half of the gradient": (Alibi, {"slopes_per_head": half_gradient}, "gradients"),
    "a table that ends": (TooShort, {}, "longer inputs"),
}  # fmt: skip


@dataclass
class Config:
    """Builds a class, with ALiBi's or rotary's settings where it is one of them."""

    name: str = "mutant"
    kind: type = PositionScheme
    learned: bool = False

    def build(self, shape):
        if issubclass(self.kind, Alibi):
            return self.kind(AlibiConfig(learned_slopes=self.learned), shape)
        return self.kind(RotaryConfig(), shape) if issubclass(self.kind, Rotary) else self.kind(shape)


@pytest.fixture(autouse=True)
def _no_clock(monkeypatch):
    monkeypatch.delitem(CHECKS, "cost")


def failed(kind: type) -> set[str]:
    return {check.name for check in Conformance(Config(kind=kind)).checks() if check.passed is False}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_caught_by_name(mistake, monkeypatch):
    base, methods, name = MISTAKES[mistake]
    monkeypatch.setattr(conformance_checks, "CHECKS", {name: CHECKS[name]})
    config = Config(kind=type("Mutant", (base,), methods), learned="learned" in mistake)
    assert any(check.passed is False for check in Conformance(config).checks())


def test_what_is_not_a_number_never_passes(monkeypatch):
    kind = type("NotANumber", (Alibi,), by_distance(lambda bias: bias * float("nan")))
    judged = {"shift", "cache", "backends", "gradients", "longer inputs"}
    monkeypatch.setattr(conformance_checks, "CHECKS", {name: CHECKS[name] for name in judged})
    assert failed(kind) == judged


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
    wrong = {c["name"] for c in found["checks"] if c["passed"] is False}
    assert {"tail of the bias"} <= wrong <= {"tail of the bias", "longer inputs"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"position": "alibbi"}, "position = alibbi. Allowed here: none, sinusoidal"),
        ({}, "Which scheme.*position= one of none, sinusoidal"),
        ({"scheme_file": "nowhere.py"}, r"scheme_file = nowhere\.py is not a file"),
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
