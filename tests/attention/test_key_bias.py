"""A bias per key made from content, through the compiled kernel and through columns, against float64."""

import math

import pytest
import torch

from alibi_lm.attention import Backends, native
from alibi_lm.attention.native_library import ROWS
from alibi_lm.attention.sdpa import SdpaAttention
from alibi_lm.positions import PositionScheme, PositionShape

from .kernels import assert_within, definition, draw, request, weights

needs_kernel = pytest.mark.skipif(bool(native.why_not()), reason=f"attention=native: {native.why_not()}")
BUDGET = 3e-6
LINE = -torch.tensor([[0.3], [0.01]]) * torch.arange(150)


class Summed(PositionScheme):
    """The bias of a key is minus the sum of the features up to it."""

    cache_inputs = True

    def content_key_bias(self, x, k_pos):
        return -x.double().cumsum(1).mT


class SummedWithSlopes(Summed):
    """The same and a bias by distance."""

    def distance_bias(self, distance):
        return LINE[:, distance]


def log_gates(batch: int, length: int, heads: int, kind: str) -> torch.Tensor:
    """(B, T, H): of gates around 1/2, nearly open, or open but for one hard reset."""
    logits = torch.randn(batch, length, heads) + {"half": 0.0, "open": 5.0, "reset": 7.0}[kind]
    gates = torch.nn.functional.logsigmoid(logits)
    if kind == "reset":
        gates[:, length // 2] = -30.0
    return gates


def run(backend, scheme_class, q, k, v, grad, x, window=None) -> list[torch.Tensor]:
    leaves = [t.detach().requires_grad_() for t in (q, k, v, x)]
    scheme = scheme_class(PositionShape(16, 8, q.shape[1], 1, 64, 64))
    assert not backend.refuses_scheme(scheme)
    out = backend.prepare(scheme, request(q.shape[2], window=window, dtype=q.dtype))(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@needs_kernel
@pytest.mark.parametrize("kind", ["half", "open", "reset"])
@pytest.mark.parametrize(("length", "window"), [(1, None), (48, None), (65, 7), (333, None), (333, 100)])
def test_the_kernel_equals_the_definition(kind, length, window):
    tensors, x = draw(2, 3, length, 8), log_gates(2, length, 3, kind)
    expected = definition(*tensors, window=window, features=x)
    assert_within(run(native.NativeAttention(), Summed, *tensors, x, window), expected, BUDGET)


@needs_kernel
def test_both_biases_at_once():
    tensors, x = draw(2, 2, 150, 8), log_gates(2, 150, 2, "open")
    *expected, _, of_gates = definition(*tensors, LINE[:, :150], features=x)
    found = run(native.NativeAttention(), SummedWithSlopes, *tensors, x)
    assert_within(found, [*expected, of_gates], BUDGET)


@needs_kernel
@pytest.mark.parametrize("size", [0.1, 3.0])
def test_what_gates_have_shut_out_is_not_computed_and_weighs_nothing(size):
    length = 600
    q, k, v, _ = draw(2, 3, length, 8, size)
    x = log_gates(2, length, 3, "reset")
    key_bias = -x.double().cumsum(1).mT
    reach = native.forward(q, k, v, None, length, key_bias)[2]
    assert reach.min() < length // 2
    block = torch.arange(length) // ROWS
    first = block * ROWS - reach[:, :, block] + 1
    assert (weights(q, k, key_bias=key_bias) * (torch.arange(length) < first[..., None])).sum(-1).max() <= 2.0**-25
    # What is far from a reset is far from its gate: no float32 sum of all gates before would give this.
    far, x = draw(1, 1, length, 8), torch.full((1, length, 1), -40.0)
    assert_within(run(native.NativeAttention(), Summed, *far, x), definition(*far, features=x), 3e-5)


@needs_kernel
def test_a_key_that_is_not_finite_is_not_left_out():
    q, k, v, _ = draw(1, 1, 300, 8)
    k[0, 0, 10, 0] = math.nan
    key_bias = torch.arange(300.0, dtype=torch.float64)[None, None]
    assert native.attend(q, k, v, None, 300, key_bias)[0, 0, 10:].isnan().all()


@needs_kernel
def test_a_key_bias_of_another_form_is_refused():
    q, k, v, _ = draw(1, 2, 40, 8)
    for key_bias in (torch.zeros(1, 2, 40), torch.zeros(1, 2, 39, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"attention = native got key_bias .* content_key_bias gives"):
            native.attend(q, k, v, None, 40, key_bias)


@pytest.mark.parametrize("route", [SdpaAttention(short=0), SdpaAttention(mask_elements=3000)])
@pytest.mark.parametrize(("dtype", "budget"), [(torch.float32, 3e-5), (torch.bfloat16, 6e-2)])
def test_columns_and_slices_equal_the_definition(route, dtype, budget):
    """Columns round each score as a number of the size of the sum of all gates, here 150.

    In bfloat16 the gradient of a gate adds up those of all keys before it, each rounded to 8 bits.
    """
    q, k, v, grad = (t.to(dtype) for t in draw(2, 3, 200, 8))
    x = log_gates(2, 200, 3, "half")
    assert_within(run(route, Summed, q, k, v, grad, x), definition(q, k, v, grad, features=x), budget)


def test_the_dense_mask_serves_both_biases():
    tensors, x = draw(2, 2, 100, 8), log_gates(2, 100, 2, "open")
    *expected, _, of_gates = definition(*tensors, LINE[:, :100], features=x)
    found = run(SdpaAttention(short=0), SummedWithSlopes, *tensors, x)
    assert_within(found, [*expected, of_gates], 1e-5)


def test_flex_refuses_it_by_name():
    scheme = Summed(PositionShape(16, 8, 2, 1, 64, 64))
    assert Backends("flex", "mine").refuses_scheme(scheme) == (
        "attention=flex cannot run position=mine (its bias is made from content). Use attention=sdpa."
    )
