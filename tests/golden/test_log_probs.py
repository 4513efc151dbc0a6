"""Per-token log-probabilities, hidden states and biases of the authors' code."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from alibi_lm import load_run
from alibi_lm.attention import ATTENTION
from alibi_lm.model.transformer import TransformerLM
from alibi_lm.positions.base import distances

Arrays = dict[str, np.ndarray]


def named(golden: Arrays, pattern: str) -> list[re.Match]:
    """Names of arrays that a pattern describes, at least one."""
    found = [match for name in golden if (match := re.fullmatch(pattern, name))]
    assert found, f"no array {pattern} among {', '.join(golden)}"
    return found


def lengths(golden: Arrays) -> list[int]:
    """Tokens per window that the authors' code was run at."""
    return sorted(int(match[1]) for match in named(golden, r"input_ids_L(\d+)"))


def ids(golden: Arrays, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.from_numpy(golden[f"{kind}_ids_L{length}"]).long() for kind in ("input", "target"))


@pytest.mark.parametrize("attention", sorted(ATTENTION))
@torch.no_grad()
def test_log_probs_in_float32(golden_run: Path, golden: Arrays, attention: str) -> None:
    for length in lengths(golden):
        model = load_run(golden_run, inference_length=length, attention=attention)
        log_probs = model.log_prob(*ids(golden, length))
        assert log_probs.dtype == torch.float32
        np.testing.assert_allclose(
            log_probs, golden[f"logprob_L{length}"], rtol=0, atol=1e-5, err_msg=f"L={length}"
        )


@torch.no_grad()
def test_log_probs_in_float64(golden_run: Path, golden: Arrays) -> None:
    for length in lengths(golden):
        model = load_run(golden_run, inference_length=length, attention="eager").double()
        log_probs = model.log_prob(*ids(golden, length))
        assert log_probs.dtype == torch.float64
        expected = golden[f"logprob_double_L{length}"]
        np.testing.assert_allclose(log_probs, expected, rtol=0, atol=1e-10, err_msg=f"L={length}")


@torch.no_grad()
def residual_stream(model: TransformerLM, tokens: torch.Tensor) -> list[torch.Tensor]:
    """The states before, between and after the layers, each (B, T, D)."""
    states: list[torch.Tensor] = []
    hooks = [block.register_forward_pre_hook(lambda _, x: states.append(x[0])) for block in model.blocks]
    states.append(model.hidden(tokens))
    for hook in hooks:
        hook.remove()
    return states


def test_hidden_states(golden_run: Path, golden: Arrays) -> None:
    for match in named(golden, r"hidden_L(\d+)"):
        length = int(match[1])
        model = load_run(golden_run, inference_length=length, attention="eager")
        states = residual_stream(model, ids(golden, length)[0][:1])
        np.testing.assert_allclose(states[-1][0], golden[match[0]], rtol=0, atol=5e-6, err_msg=f"L={length}")
        inner = golden.get(f"inner_states_L{length}")
        if inner is not None:
            np.testing.assert_allclose(torch.cat(states), inner, rtol=0, atol=5e-6)


@torch.no_grad()
def test_whole_distribution(golden_run: Path, golden: Arrays) -> None:
    for match in named(golden, r"full_logprobs_L(\d+)_rows(\d+(?:_\d+)*)"):
        length, rows = int(match[1]), [int(row) for row in match[2].split("_")]
        model = load_run(golden_run, inference_length=length, attention="eager")
        log_probs = model(ids(golden, length)[0][:1])[0, rows].log_softmax(-1)
        np.testing.assert_allclose(log_probs, golden[match[0]], rtol=0, atol=1e-5)


def test_slopes_and_bias(golden_run: Path, golden: Arrays) -> None:
    """The authors' bias grows with the key's position; ours falls with its distance: equal up to a constant."""
    if "slopes" not in golden:
        pytest.skip("not an ALiBi model: no slopes to compare")
    scheme = load_run(golden_run).positions[0]
    assert scheme.slopes.tolist() == golden["slopes"].tolist()
    for match in named(golden, r"mask_head(\d+)_row(\d+)_L\d+"):
        head, row = int(match[1]), int(match[2])
        theirs = torch.from_numpy(golden[match[0]])
        query, keys = torch.tensor([row]), torch.arange(len(theirs))
        ours = scheme.bias(query, keys)[head, 0]
        visible = keys <= row
        assert torch.equal(ours[visible], theirs[visible] - theirs[row])
        assert torch.isinf(theirs[~visible]).all() and (distances(query, keys)[0, ~visible] == 0).all()
