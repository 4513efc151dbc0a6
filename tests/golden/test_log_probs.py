"""Per-token log-probabilities, hidden states and biases of the authors' code."""

from pathlib import Path

import numpy as np
import pytest
import torch

from alibi_lm import load_run
from alibi_lm.attention import ATTENTION
from alibi_lm.positions.base import distances

LENGTHS = (64, 256)


def ids(golden: dict[str, np.ndarray], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.from_numpy(golden[f"{kind}_ids_L{length}"]).long() for kind in ("input", "target"))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("attention", sorted(ATTENTION))
@torch.no_grad()
def test_log_probs_in_float32(
    golden_run: Path, golden: dict[str, np.ndarray], attention: str, length: int
) -> None:
    model = load_run(golden_run, inference_length=length, attention=attention)
    log_probs = model.log_prob(*ids(golden, length))
    assert log_probs.dtype == torch.float32
    np.testing.assert_allclose(log_probs, golden[f"logprob_L{length}"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("length", LENGTHS)
@torch.no_grad()
def test_log_probs_in_float64(golden_run: Path, golden: dict[str, np.ndarray], length: int) -> None:
    model = load_run(golden_run, inference_length=length, attention="eager").double()
    log_probs = model.log_prob(*ids(golden, length))
    assert log_probs.dtype == torch.float64
    np.testing.assert_allclose(log_probs, golden[f"logprob_double_L{length}"], rtol=0, atol=1e-10)


@pytest.mark.parametrize("length", LENGTHS)
@torch.no_grad()
def test_hidden_states(golden_run: Path, golden: dict[str, np.ndarray], length: int) -> None:
    model = load_run(golden_run, inference_length=length, attention="eager")
    states: list[torch.Tensor] = []
    hooks = [block.register_forward_pre_hook(lambda _, x: states.append(x[0])) for block in model.blocks]
    states.append(model.hidden(ids(golden, length)[0][:1]))
    for hook in hooks:
        hook.remove()
    np.testing.assert_allclose(states[-1][0], golden[f"hidden_L{length}"], rtol=0, atol=5e-6)
    if length == 64:  # before, between and after the two layers
        order = [states[0], states[1], states[2]]
        inner = golden["inner_states_L64"]
        np.testing.assert_allclose(torch.cat(order), inner, rtol=0, atol=5e-6)


@torch.no_grad()
def test_whole_distribution(golden_run: Path, golden: dict[str, np.ndarray]) -> None:
    model = load_run(golden_run, attention="eager")
    log_probs = model(ids(golden, 64)[0][:1])[0, [0, 1, 63]].log_softmax(-1)
    np.testing.assert_allclose(log_probs, golden["full_logprobs_L64_rows0_1_63"], rtol=0, atol=1e-5)


def test_slopes_and_bias(golden_run: Path, golden: dict[str, np.ndarray]) -> None:
    """The authors' bias grows with the key's position; ours falls with its distance: equal up to a constant."""
    scheme = load_run(golden_run).positions[0]
    assert scheme.slopes.tolist() == golden["slopes"].tolist()
    theirs = torch.from_numpy(golden["mask_head0_row5_L64"])
    query, keys = torch.tensor([5]), torch.arange(16)
    ours = scheme.bias(query, keys)[0, 0]
    assert torch.equal(ours[:6], theirs[:6] - theirs[5])
    assert torch.isinf(theirs[6:]).all() and (distances(query, keys)[0, 6:] == 0).all()
