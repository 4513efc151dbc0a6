"""Which backend a model gets, the message if that one is not available, and how a new scheme is judged."""

import pytest
import torch

from alibi_lm import attention
from alibi_lm.attention import build_backend, chosen_backend
from alibi_lm.positions import PositionScheme, PositionShape

from .kernels import request, scheme_of

SHAPE = PositionShape(24, 8, 3, 2, 64, 64)


class Curved(PositionScheme):
    """A bias that is no function of the distance."""

    def bias(self, q_pos, k_pos):
        return -(q_pos[:, None] * k_pos[None]).float().sqrt().expand(3, -1, -1)


@pytest.fixture
def machine(monkeypatch):
    """Say what the machine has: machine(cuda=True, missing="no compiler")."""

    def describe(cuda: bool = False, missing: str = ""):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(attention, "why_not", lambda: missing)
        attention._warn_once.cache_clear()

    return describe


@pytest.mark.parametrize(
    ("cuda", "missing", "expected"), [(False, "", "native"), (True, "", "sdpa"), (False, "no compiler", "sdpa")]
)
def test_auto(machine, cuda, missing, expected):
    machine(cuda, missing)
    assert chosen_backend("auto") == build_backend("auto", scheme_of("alibi", 3), "alibi").name == expected
    assert [chosen_backend(name) for name in ("eager", "flex")] == ["eager", "flex"]


def test_no_kernel_is_one_line_that_says_why_and_what_follows(machine, logged):
    machine(missing="no compiler")
    for _ in range(3):
        build_backend("auto", scheme_of("alibi", 3), "alibi")
    (record,) = logged
    assert (
        record.levelname == "WARNING"
        and "takes sdpa" in record.getMessage()
        and "no compiler" in record.getMessage()
    )


@pytest.mark.parametrize(
    ("name", "scheme", "missing", "message"),
    [
        ("fused", None, "", "attention = 'fused'. Allowed: auto, eager, sdpa, native, flex."),
        ("native", None, "no compiler", "attention = native, but its kernel is not available here: no compiler."),
        (
            "native",
            Curved(SHAPE),
            "",
            "attention=native cannot run position=mine (its bias is more than a function of distance). "
            "Use attention=sdpa.",
        ),
    ],
)
def test_refusals(machine, name, scheme, missing, message):
    machine(missing=missing)
    with pytest.raises(ValueError) as caught:
        build_backend(name, scheme or PositionScheme(SHAPE), "mine")
    assert str(caught.value).startswith(message)


def test_auto_takes_what_serves_the_scheme(machine):
    machine()
    assert build_backend("auto", Curved(SHAPE), "mine").name == "sdpa"
    assert build_backend("auto", scheme_of("cope", 3), "cope").name == "sdpa"


def test_a_window_that_reaches_the_first_key_is_none():
    """In distances: 30 keys at every tenth position span 291."""
    positions = torch.arange(30) * 10
    assert request(positions, window=290).window == 290 and request(positions, window=291).window is None
