"""Query scales and rotary scalings against numbers of the authors' own code; see docs/golden.md.

Sizes and settings are read from the files, so that any folder of the same form can be tried.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from alibi_lm.attention import Request
from alibi_lm.attention.eager import EagerAttention
from alibi_lm.evaluate.conformance_checks import InDouble
from alibi_lm.model.changed_bias import RowScaledBias
from alibi_lm.model.query_scale import QUERY_SCALES
from alibi_lm.positions import POSITIONS, PositionScheme, PositionShape
from alibi_lm.positions.alibi import alibi_slopes
from alibi_lm.positions.rotary import frequencies, rotate_pairs, scaling_factor


def load(name: str) -> tuple[dict[str, np.ndarray], dict]:
    """The arrays and the settings of a file of golden data."""
    folder = os.environ.get("ALIBI_LM_GOLDEN_DIR")
    if not folder or not (path := Path(folder) / "schemes" / f"{name}.npz").is_file():
        pytest.skip(f"no schemes/{name}.npz in ALIBI_LM_GOLDEN_DIR: NOT compared with the authors' code")
    with np.load(path) as arrays:
        found = dict(arrays)
    meta = json.loads(str(found.pop("meta")))
    return found, meta["setting"]


def factors(name: str, visible: torch.Tensor, sizes: dict, train_length: int = 64, **settings) -> torch.Tensor:
    """Factors of one layer: (1 or H, T) float64."""
    shape = PositionShape(sizes["H"] * sizes["D"], sizes["D"], sizes["H"], 1, train_length, train_length)
    scale = QUERY_SCALES[name](**settings).build(shape).double()
    if "s" in sizes:
        with torch.no_grad():
            scale.scales[0].copy_(sizes["s"])
    return scale.factors(visible)[0].detach()


def close(found: torch.Tensor, expected: np.ndarray, atol: float = 1e-13) -> None:
    """Equal to the last digits of what the file holds."""
    rough = expected.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=2e-6 if rough else 0, atol=1e-5 if rough else atol)


def scaled(q: np.ndarray, factor: torch.Tensor) -> torch.Tensor:
    """q (B, T, H, D) times (1 or H, T)."""
    return torch.from_numpy(q) * factor.T[None, :, :, None]


@pytest.mark.parametrize("past", ["", "_past"])
def test_golden_scheme_log_n(past):
    z, sizes = load("log_n")
    visible = torch.arange(1, sizes["T"] + 1) + (sizes["past"] if past else 0)
    for clipped, want in ((True, "scale_clipped"), (False, "scale_unclipped")):
        found = factors("log_n", visible, sizes, sizes["L"], clipped=clipped)
        close(found[0], z[want + past])
    found = factors("log_n", visible, sizes, length=sizes["L"])
    close(scaled(z["q"], found), z["q_out" + past])


@pytest.mark.parametrize("past", ["", "_past"])
def test_golden_scheme_llama4(past):
    z, sizes = load("llama4_temperature")
    visible = torch.arange(1, sizes["T"] + 1) + (sizes["past"] if past else 0)
    own = {name: sizes[name] for name in ("floor_scale", "attn_scale")}
    found = factors("llama4", visible, sizes, **own)
    close(found[0], z["scale" + past])
    close(scaled(z["q"], found), z["q_out" + past])


class Prior(PositionScheme):
    """A bias that is given as numbers."""

    def __init__(self, shape: PositionShape, prior: torch.Tensor) -> None:
        super().__init__(shape)
        self.prior = prior

    def bias(self, q_pos, k_pos):
        return self.prior[:, q_pos][:, :, k_pos]


def test_golden_scheme_ssmax():
    """Scores and outputs, with the bias scaled (BAM) and not (ALiBi and BAM)."""
    z, sizes = load("ssmax")
    places = torch.arange(sizes["T"])
    s = torch.from_numpy(z["s"]).double()
    factor = factors("ssmax", places + 1, {**sizes, "s": s})
    close(factor / s[:, None], np.broadcast_to(z["log_n"], factor.shape))
    late = factors("ssmax", torch.from_numpy(z["q_pos_block"]) + 1, {**sizes, "s": torch.ones_like(s)})
    close(late[0], z["log_n_block"])

    q, k, v = (torch.from_numpy(z[name]).double().transpose(1, 2) for name in "qkv")
    q = q * factor[..., None]
    shape = PositionShape(sizes["H"] * sizes["D"], sizes["D"], sizes["H"], 1, sizes["T"], sizes["T"])
    with InDouble():
        alibi, bam = POSITIONS["alibi"]().build(shape), POSITIONS["bam"]().build(shape).double()
        with torch.no_grad():
            bam.alpha.copy_(torch.tensor(alibi_slopes(sizes["H"]), dtype=torch.float64).log())
            bam.beta.copy_(torch.from_numpy(z["beta"]))
        found = bam.bias(places, places).detach()
    prior = Prior(shape, torch.from_numpy(z["prior"]).double())
    visible = torch.ones(len(places), len(places)).tril().bool()
    close(found[:, visible], z["prior"][:, visible], 1e-12)
    request = Request(places, places, sizes["T"] - 1, None, torch.float64, 0.0)
    for scheme, want in (
        (POSITIONS["none"]().build(shape), "scores"),
        (alibi, "scores_alibi"),
        (RowScaledBias(prior, places, factor), "scores_bam_prior_scaled"),
        (prior, "scores_bam_prior_not_scaled"),
    ):
        hidden = torch.from_numpy(z[want]).masked_fill(~visible, float("-inf"))
        expected = hidden.softmax(-1) @ v.to(hidden.dtype)
        with InDouble():
            found = EagerAttention().prepare(scheme, request)(q, k, v, None)
        close(found, expected.numpy(), 1e-12)
        if want == "scores":
            close(found.transpose(1, 2), z["out"], 1e-12)


ROPE_SCALINGS = {
    "linear": ("linear", "index"),
    "ntk_authors": ("ntk", "index"),
    "dynamic_hf": ("dynamic", "index"),
    "dynamic_authors": ("dynamic", "index"),
    "dynamic_factor1": ("dynamic", "index"),
    "yarn_hf": ("yarn", "index"),
    "yarn_authors": ("yarn", "index"),
    "yarn_hf_no_truncate": ("yarn", "exact"),
    "by_parts_ramp_in_turns": ("by_parts", "turns"),
    "part_ntk_authors": ("part_ntk", "index"),
    "llama3": ("llama3", "index"),
}


def test_golden_scheme_rope_scaling():
    """Frequencies and amplitudes of every case in the file: transformers' and the YaRN authors'."""
    z, cases = load("rope_scaling")
    compared = set()
    for case, sizes in cases.items():
        dim, theta, length, context = (sizes[n] for n in ("head_dim", "theta", "L", "seq_len_of_dynamic"))
        for name in [n for n in ROPE_SCALINGS if f"{case}_{n}" in z]:
            scaling, ramp = ROPE_SCALINGS[name]
            factor = scaling_factor(
                scaling, None if name.endswith("factor1") else sizes["factor"], context, length
            )
            inv_freq, amplitude = frequencies(scaling, dim, theta, factor, length, ramp)
            expected = z[f"{case}_{name}"]
            rtol = 2e-6 if expected.dtype == np.float32 else 1e-12
            np.testing.assert_allclose(inv_freq, expected, rtol=rtol, atol=0, err_msg=f"{case} {name}")
            np.testing.assert_allclose(amplitude, z.get(f"{case}_{name}_attention_factor", 1.0), rtol=rtol)
            compared.add(name)
            if scaling == "yarn":
                by_parts, one = frequencies("by_parts", dim, theta, factor, length, ramp)
                assert one == 1.0 and torch.equal(by_parts, inv_freq)
        if f"{case}_yarn_hf_f32" in z:
            inv_freq, _ = frequencies("yarn", dim, theta, sizes["factor"], length)
            np.testing.assert_allclose(inv_freq, z[f"{case}_yarn_hf_f32"], rtol=1e-6, atol=0)
    assert compared == ROPE_SCALINGS.keys()


def test_golden_scheme_rope_scaling_rotates():
    """Scores of YaRN's queries and keys; the authors pair dimensions k and k + D/2, this package 2k and 2k + 1."""
    z, cases = load("rope_scaling")
    (case,) = (name.removeprefix("q_out_yarn_") for name in z if name.startswith("q_out_yarn_"))
    sizes = cases[case]
    dim, theta, factor, length = (sizes[n] for n in ("head_dim", "theta", "factor", "L"))
    inv_freq, amplitude = frequencies("yarn", dim, theta, factor, length)
    angles = torch.from_numpy(z["positions"])[:, None] * inv_freq
    for name in "qk":
        pairs = torch.from_numpy(z[name]).double().unflatten(-1, (2, -1)).mT.flatten(-2)
        rotated = rotate_pairs(pairs[None], angles.cos() * amplitude, angles.sin() * amplitude)[0]
        expected = torch.from_numpy(z[f"{name}_out_yarn_{case}"]).unflatten(-1, (2, -1)).mT.flatten(-2)
        close(rotated, expected.numpy(), 1e-12)
