"""Position schemes against what their authors' code returned: outputs, and gradients of trained parameters.

Every size and setting comes from the files of `$ALIBI_LM_GOLDEN_DIR/schemes`, so that other files of the same form
can be tried. What is tested are the classes that a run is built with: in float64 (`InDouble`), and as they are, in
float32. Each number of the authors' is compared to the tolerance that the README of those files gives.

Letters: B batch, T tokens, S keys, H heads, K head dim.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from alibi_lm.attention import Backends, Request
from alibi_lm.evaluate.conformance_checks import InDouble
from alibi_lm.positions import POSITIONS, PositionScheme, PositionShape
from alibi_lm.positions.kerple import held
from alibi_lm.positions.rotary import frequencies


@dataclass
class Golden:
    """One scheme's file, in one precision."""

    arrays: dict[str, Tensor]
    meta: dict[str, Any]
    dtype: torch.dtype
    budgets: tuple[float, float]
    """Largest absolute differences in float64 and in float32, for the sizes of the published files."""

    @property
    def setting(self) -> dict[str, Any]:
        """Sizes and constants."""
        return self.meta["setting"]

    @property
    def num_heads(self) -> int:
        """Of queries; there may be fewer of keys and values."""
        return self.setting.get("HQ", self.setting.get("H", 1))

    def __getitem__(self, name: str) -> Tensor:
        """An array of the file; floating ones in the dtype of the test."""
        array = self.arrays[name]
        return array.to(self.dtype) if array.is_floating_point() else array

    def build(self, name: str, model_dim: int | None = None, **settings: Any) -> PositionScheme:
        """The scheme of a config, for the sizes of the file."""
        heads = self.num_heads
        head_dim = self.setting.get("D", self.setting.get("head_dim", 2))
        length = self.setting.get("T", 64)
        shape = PositionShape(model_dim or heads * head_dim, head_dim, heads, 2, length, length)
        with self.in_precision():
            return POSITIONS[name](**settings).build(shape).to(self.dtype)

    def heads(self, *names: str) -> list[Tensor]:
        """(B, T, H, ...) -> (B, H, T, ...), those of keys and values repeated where several queries share one."""
        found = [self[name].transpose(1, 2) for name in names]
        return [x.repeat_interleave(self.num_heads // x.shape[1], dim=1) for x in found]

    def numbered(self, prefix: str) -> list[tuple[str, int]]:
        """Arrays whose names are a prefix and a number, with the number."""
        names = [name for name in self.arrays if re.fullmatch(rf"{prefix}\d+", name)]
        assert names, f"no array {prefix}<number> in the file: {', '.join(self.arrays)}"
        return [(name, int(name.removeprefix(prefix))) for name in names]

    def told(self, name: str, pattern: str) -> list[float]:
        """Numbers that the file's words about an array hold."""
        words = str(self.meta["arrays"][name])
        found = re.search(pattern, words)
        assert found, f"{name}: no {pattern} in {words!r}"
        return [float(number) for number in found.groups()]

    def in_precision(self) -> Any:
        """The mode in which a scheme computes in the dtype of the test."""
        return InDouble() if self.dtype == torch.float64 else nullcontext()

    def close(self, mine: Tensor, theirs: str | Tensor, times: float = 1.0, in_float32: bool = False) -> None:
        """Assert equality to the budget, times a factor.

        Numbers grow with sizes and so do their float32 errors, hence the relative part, the length and the width.
        """
        expected = self.arrays[theirs] if isinstance(theirs, str) else theirs
        rough = in_float32 or torch.float32 in (self.dtype, expected.dtype)
        if rough:
            times *= max(1.0, self.setting.get("T", 1) / 25) * max(1.0, self.setting.get("D", 1) / 8)
        torch.testing.assert_close(
            mine.detach().double(),
            expected.double(),
            rtol=times * (2e-6 if rough else 1e-13),
            atol=times * self.budgets[rough],
        )

    def close_where_visible(self, mine: Tensor, theirs: str, q_pos: Tensor, k_pos: Tensor) -> None:
        """The same for the pairs that a causal mask leaves: (..., T, S)."""
        hidden = k_pos > q_pos[:, None]
        self.close(mine.masked_fill(hidden, 0.0), self.arrays[theirs].masked_fill(hidden, 0.0))

    def close_bias(self, scheme: PositionScheme, whole: str, part: str = "", q_pos: Tensor | None = None) -> None:
        """The bias of all pairs, and of some late queries."""
        k_pos = torch.arange(self.arrays[whole].shape[-1])
        with self.in_precision():
            self.close_where_visible(scheme.bias(k_pos, k_pos), whole, k_pos, k_pos)
            if part:
                q_pos = self["q_pos"] if q_pos is None else q_pos
                self.close_where_visible(scheme.bias(q_pos, k_pos), part, q_pos, k_pos)

    def close_gradients(self, scheme: PositionScheme, output: Tensor, times: float, **names: str) -> None:
        """Gradients of sum(cot * output) with respect to parameters: name of the parameter = that of the array."""
        parameters = dict(scheme.named_parameters())
        grads = torch.autograd.grad(output, [parameters[n] for n in names], self["cot"].to(output.dtype))
        for gradient, theirs in zip(grads, names.values(), strict=True):
            self.close(gradient, self.arrays[theirs].view_as(gradient), times)


def fill(scheme: PositionScheme, **values: Tensor) -> PositionScheme:
    """Set parameters of a scheme."""
    parameters = dict(scheme.named_parameters())
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)
    return scheme


def golden(name: str, float64: float, float32: float) -> Callable[[Any], Any]:
    """Run a test with a scheme's file, in both precisions with their budgets."""
    cases = [(name, dtype, (float64, float32)) for dtype in (torch.float64, torch.float32)]
    return pytest.mark.parametrize("data", cases, ids=["float64", "float32"], indirect=True)


@pytest.fixture
def data(request: pytest.FixtureRequest) -> Golden:
    """The file of a scheme, opened."""
    name, dtype, budgets = request.param
    folder = os.environ.get("ALIBI_LM_GOLDEN_DIR")
    if not folder:
        pytest.skip(f"ALIBI_LM_GOLDEN_DIR is not set: {name} NOT compared with the authors' code")
    path = Path(folder) / "schemes" / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"there is no {path}: {name} NOT compared with the authors' code")
    with np.load(path, allow_pickle=False) as file:
        arrays = {key: torch.from_numpy(file[key].copy()) for key in file.files if file[key].dtype.kind in "fiu"}
        return Golden(arrays, json.loads(str(file["meta"])), dtype, budgets)


def attend(
    data: Golden,
    scheme: PositionScheme,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    x: Tensor | None,
    window: int | None = None,
) -> Tensor:
    """A whole pass through `eager`: (B, H, T, K) -> (B, H, T, K)."""
    positions = torch.arange(q.shape[2])
    with data.in_precision():
        q, k = scheme.transform_qk(q, k, scheme.tables(positions))
        asked = Request(positions, positions, len(positions) - 1, window, data.dtype, 0.0)
        return Backends("eager", "golden").prepare(scheme, asked)(q, k, v, x)


def halves_to_neighbours(x: Tensor, width: int) -> Tensor:
    """Pairs (k, k + width / 2) of the first `width` dimensions become neighbours, as in `rotate_pairs`."""
    order = torch.arange(width).view(2, -1).T.flatten()
    return torch.cat([x[..., order], x[..., width:]], dim=-1)


@golden("alibi", 1e-14, 1e-6)
def test_golden_scheme_alibi(data: Golden) -> None:
    from alibi_lm.positions.alibi import alibi_slopes

    for row, heads in enumerate(data["heads"].tolist()):
        data.close(torch.tensor(alibi_slopes(heads), dtype=torch.float64), data.arrays["slopes"][row, :heads])
    scheme = data.build("alibi")
    data.close_bias(scheme, "bias", "bias_offset")
    # Their tensor grows with the key's position and leaves out what softmax does not see.
    key_bias = scheme.key_bias(torch.arange(data.setting["T"]))
    data.close(key_bias - key_bias[:, :1], data.arrays["bias_authors"][:, 0], times=10)


@golden("t5", 1e-14, 1e-6)
def test_golden_scheme_t5(data: Golden) -> None:
    from alibi_lm.positions.t5 import t5_bucket

    sizes = {name: data.setting[name] for name in ("num_buckets", "max_distance")}
    assert torch.equal(t5_bucket(data["distances"], **sizes), data["buckets"])
    scheme = fill(data.build("t5", **sizes), table=data["table"])
    data.close_bias(scheme, "bias", "bias_offset")
    positions = torch.arange(data.setting["T"])
    with data.in_precision():
        data.close_gradients(scheme, scheme.bias(positions, positions), 20, table="grad_table")


@golden("partial_rotary", 1e-12, 2e-6)
def test_golden_scheme_partial_rotary(data: Golden) -> None:
    dim, share, theta = (data.setting[name] for name in ("head_dim", "partial_rotary_factor", "theta"))
    width = int(dim * share)
    scheme = data.build("rotary", rotated_share=share, theta=theta)
    data.close(scheme.inv_freq, "inv_freq")
    with data.in_precision():
        inputs = (halves_to_neighbours(data[name], width) for name in "qk")
        outputs = scheme.transform_qk(*inputs, scheme.tables(data["positions"].long()))
    for mine, name in zip(outputs, ("q_out", "k_out"), strict=True):
        for expected in (name, f"{name}_f32"):
            data.close(mine, halves_to_neighbours(data.arrays[expected], width))
    # An odd width: transformers rotates one dimension more, without a word.
    dim, share = data.told("inv_freq_odd_width", r"D=(\d+), pct=([\d.]+)")
    inv_freq, _ = frequencies("none", int(dim * share), theta, 1.0, 64)
    data.close(inv_freq, "inv_freq_odd_width")
    with pytest.raises(ValueError, match="choose a share that gives an even number"):
        POSITIONS["rotary"](rotated_share=share).build(PositionShape(int(dim), int(dim), 1, 2, 64, 64))


@golden("rope_scaling", 1e-12, 1e-12)
def test_golden_scheme_p_rope(data: Golden) -> None:
    for case, setting in data.setting.items():
        shape = PositionShape(setting["head_dim"], setting["head_dim"], 1, 2, 64, 64)
        for name, percent in data.numbered(f"{case}_p_rope_"):
            config = POSITIONS["rotary"](theta=setting["theta"], frequency_share=percent / 100)
            data.close(config.build(shape).inv_freq, name)


def kerple(data: Golden, name: str, first: str, second: str) -> None:
    scheme = fill(data.build(name), **{n: data[n] for n in (first, second)})
    positions = torch.arange(data.setting["T"])
    data.close_bias(scheme, "bias", "bias_last_row", positions[-1:])
    for parameter in (first, second):
        most = 2.0 if parameter == "p" else None
        with data.in_precision():
            data.close(held(getattr(scheme, parameter), most), f"{parameter}_used")
    with data.in_precision():
        names = {n: f"grad_{n}" for n in (first, second)}
        data.close_gradients(scheme, scheme.bias(positions, positions), 20, **names)


@golden("kerple_log", 1e-12, 3e-6)
def test_golden_scheme_kerple_log(data: Golden) -> None:
    kerple(data, "kerple_log", "r1", "r2")


@golden("kerple_power", 1e-10, 2e-4)
def test_golden_scheme_kerple_power(data: Golden) -> None:
    kerple(data, "kerple_power", "a", "p")
    values = {name: data[name] for name in ("a", "p", "wei_a", "wei_p")}
    scheme = fill(data.build("kerple_power", weighted=True), **values)
    # Keys that make the given scores of the queries: q = scores, k = the unit matrix.
    scores = data["scores_in"]
    positions, ones = torch.arange(scores.shape[-1]), torch.eye(scores.shape[-1], dtype=data.dtype)
    q, k = scores[None] * len(positions) ** 0.5, ones.expand(1, *scores.shape)
    with data.in_precision():
        bias = scheme.content_bias(q, k, None, positions, positions)[0] + scheme.bias(positions, positions)
    data.close_where_visible(scores + bias, "weighted_out", positions, positions)


@golden("bam", 1e-11, 5e-5)
def test_golden_scheme_bam(data: Golden) -> None:
    for reading, start in (("code", "scale_init_code"), ("readme", "alpha_init_readme")):
        scheme = data.build("bam", start=reading)
        data.close(scheme.alpha, start, in_float32=True)
        fill(scheme, alpha=data[start])
        data.close_bias(scheme, f"bias_init_{reading}")
    values = {name: data[name] for name in ("alpha", "beta", "mu")}
    scheme = fill(data.build("bam", trained_centre=True), **values)
    data.close_bias(scheme, "bias", "bias_offset")
    older = fill(data.build("bam", trained_centre=True, scale_inside=True), **values)
    data.close_bias(older, "bias_inference_plain")
    positions = torch.arange(data.setting["T"])
    with data.in_precision():
        names = {name: f"grad_{name}" for name in values}
        data.close_gradients(scheme, scheme.bias(positions, positions), 20, **names)


@golden("fox", 1e-11, 1e-5)
def test_golden_scheme_fox(data: Golden) -> None:
    heads = data.num_heads
    scheme = fill(data.build("fox", model_dim=heads), weight=torch.eye(heads), gate_bias=torch.zeros(heads))
    logits, log_gate = data["gate_logits"], data["log_gate"].requires_grad_()
    reset = log_gate.detach() == log_gate.detach().min()  # their hard reset is no gate of these logits
    mine = scheme.features(logits)
    data.close(mine.masked_fill(reset, 0.0), data.arrays["log_gate"].masked_fill(reset, 0.0))

    q, k, v = data.heads(*"qkv")
    positions = torch.arange(q.shape[2])
    with data.in_precision():
        bias = scheme.content_bias(q, k, log_gate, positions, positions)
    data.close_where_visible(bias, "bias", positions, positions)
    out = attend(data, scheme, q, k, v, log_gate)
    data.close(out.transpose(1, 2), "out")
    (gradient,) = torch.autograd.grad(out, log_gate, data["cot"].transpose(1, 2))
    data.close(gradient, "grad_log_gate", times=20)
    for name, window in data.numbered("out_window"):
        data.close(attend(data, scheme, q, k, v, log_gate, window).transpose(1, 2), name)
    shortest, longest = data.told("fixed_gate_bias_init", r"decay times ([\d.]+) to ([\d.]+)")
    start = data.build("fox", gates="bias", shortest=shortest, longest=longest).gate_bias
    data.close(start, "fixed_gate_bias_init", in_float32=True)


@golden("cable", 1e-12, 1e-5)
def test_golden_scheme_cable(data: Golden) -> None:
    heads = data.setting["H"]
    scheme = fill(
        data.build("fox", model_dim=heads, scaled=False), weight=-torch.eye(heads), gate_bias=torch.zeros(heads)
    )
    q, k, v = data.heads(*"qkv")
    positions, x = torch.arange(q.shape[2]), scheme.features(data["gate_input"])
    with data.in_precision():
        bias = scheme.content_bias(q, k, x, positions, positions)
    data.close_where_visible(bias, "bias", positions, positions)
    data.close(attend(data, scheme, q, k, v, x).transpose(1, 2), "out")


@golden("fire", 1e-12, 2e-6)
def test_golden_scheme_fire(data: Golden) -> None:
    weights = {name: data[name] for name in ("w1", "b1", "w2", "b2", "c")}
    positions = torch.arange(data.setting["T"])
    for reading in ("arithmetic", "dape"):
        scheme = data.build("fire", reading=reading, hidden=data.setting["mlp_width"])
        fill(scheme, **weights)
        data.close_bias(scheme, f"bias_{reading}_m1")  # the multiplier as it starts
        fill(scheme, multiplier=data["m"])
        data.close_bias(scheme, f"bias_{reading}_m")
        if reading == "arithmetic":
            drawn = data["positions_random"].long()
            with data.in_precision():
                data.close_where_visible(scheme.bias(drawn, drawn), "bias_random", drawn, drawn)
                names = {"c": "grad_c", "multiplier": "grad_m", "w1": "grad_w1"}
                data.close_gradients(scheme, scheme.bias(positions, positions), 20, **names)


@golden("sandwich", 1e-11, 1e-5)
def test_golden_scheme_sandwich(data: Golden) -> None:
    scheme = data.build("sandwich", width=data.setting["dbar"])
    data.close_bias(scheme, "bias", "bias_offset")
    data.close_bias(scheme, "bias_f32")


@golden("xpos", 1e-12, 1e-5)
def test_golden_scheme_xpos(data: Golden) -> None:
    heads, dim = data.setting["H"], data.setting["head_dim"]
    for suffix in ("", "2"):
        q, k = data[f"q{suffix}"], data[f"k{suffix}"]
        length = q.shape[1]
        # Their centre is half the sequence at hand, ours half the longest one to be served.
        shape = PositionShape(heads * dim, dim, heads, 2, length, length)
        scheme = POSITIONS["xpos"](scale_base=data.setting["scale_base"]).build(shape)
        positions = torch.arange(length)
        with data.in_precision():
            q_out, k_out = scheme.transform_qk(q, k, scheme.tables(positions))
            last, _ = scheme.transform_qk(q[:, -1:], k[:, -1:], scheme.tables(positions[-1:]))
        data.close(q_out, f"q{suffix}_out")
        data.close(k_out, f"k{suffix}_out")
        data.close(scheme.zeta, "scale")
        if not suffix:
            data.close(last, "q_last_out")
            data.close(q_out @ k_out.mT * dim**-0.5, "scores")


@golden("transformer_xl", 1e-12, 1e-5)
@torch.no_grad()
def test_golden_scheme_transformer_xl(data: Golden) -> None:
    q, k, memory = data["q"], data["k"], data.setting["memory"]
    k_pos = torch.arange(k.shape[2])
    q_pos = k_pos[memory:]
    for clamp, keys, name in (
        (None, slice(memory, None), "scores"),
        (None, slice(None), "scores_memory"),
        (data.setting["clamp_len"], slice(None), "scores_memory_clamped"),
    ):
        scheme = data.build("transformer_xl", clamp_distance=clamp)
        fill(scheme, w_r=data["w_r"], u=data["u"], v=data["v_bias"])
        with data.in_precision():
            bias = scheme.content_bias(q, k[:, :, keys], None, q_pos, k_pos[keys])
        scores = q @ k[:, :, keys].mT * q.shape[-1] ** -0.5 + bias
        data.close_where_visible(scores, name, q_pos, k_pos[keys])
    angles = torch.arange(len(data["r_sinusoid"]))[:, None] * scheme.frequencies
    data.close(torch.cat([angles.sin(), angles.cos()], dim=1)[:, None], "r_sinusoid")


@golden("shaw", 1e-12, 5e-6)
def test_golden_scheme_shaw(data: Golden) -> None:
    """Their tables begin with the farthest key; what lies ahead of a query is never used."""
    clip = data.setting["c"]
    q, k, v = data.heads(*"qkv")
    positions = torch.arange(q.shape[2])
    tables = {f"table_{kind}": data[f"table_{kind}"][: clip + 1].flip(0) for kind in "kv"}
    keys_only = fill(data.build("shaw", clip=clip, values=False), table_k=tables["table_k"])
    bias = keys_only.content_bias(q, k, None, positions, positions)
    data.close_where_visible(q @ k.mT * q.shape[-1] ** -0.5 + bias, "scores", positions, positions)
    data.close(attend(data, keys_only, q, k, v, None).transpose(1, 2), "out_keys_only")

    scheme = fill(data.build("shaw", clip=clip), **tables)
    out = attend(data, scheme, q, k, v, None)
    data.close(out.transpose(1, 2), "out")
    for kind in "kv":
        (gradient,) = torch.autograd.grad(
            out, dict(scheme.named_parameters())[f"table_{kind}"], data["cot"].transpose(1, 2), retain_graph=True
        )
        expected = data.arrays[f"grad_table_{kind}"]
        data.close(gradient.flip(0), expected[: clip + 1], times=20)
        assert not expected[clip + 1 :].any()


@golden("pope", 1e-12, 1e-5)
def test_golden_scheme_pope(data: Golden) -> None:
    scheme = fill(data.build("pope"), phase=data["phase"])
    data.close(scheme.inv_freq, "inv_freq")
    positions = data["positions"].long()
    with data.in_precision():
        q, k = scheme.transform_qk(data["q"], data["k"], scheme.tables(positions))
        data.close(q / 2**0.5, "q_out")  # ours is divided by the root of the doubled width
        data.close(k, "k_out")
        scores = q @ k.mT * q.shape[-1] ** -0.5
        data.close_where_visible(scores, "scores", positions, positions)
        data.close_gradients(scheme, scores, 20, phase="grad_phase")


@golden("path", 1e-12, 3e-6)
def test_golden_scheme_path(data: Golden) -> None:
    """Directions and betas are put in the place of those made from the input."""
    q, k, v = data.heads(*"qkv")
    w, beta, log_gate = (data[name].transpose(1, 2).requires_grad_() for name in ("w", "beta", "log_gate"))
    shared = q.shape[1] // w.shape[1]
    of_queries = [x.repeat_interleave(shared, dim=1) for x in (w, beta)]
    positions = torch.arange(q.shape[2])
    for gate, suffix in ((None, ""), (log_gate, "_gated")):
        scheme = data.build("path", forget_gate=gate is not None)
        scheme.reflections = lambda x, gate=gate: (*of_queries, gate)
        scores = scheme.scores(q, k, q, positions, positions)
        data.close_where_visible(scores, f"scores{suffix}", positions, positions)
        out = attend(data, scheme, q, k, v, q)
        data.close(out.transpose(1, 2), f"out{suffix}")
        if gate is None:
            grads = torch.autograd.grad(out, (w, beta), data["cot"].transpose(1, 2))
            for gradient, name in zip(grads, ("grad_w", "grad_beta"), strict=True):
                data.close(gradient.transpose(1, 2), name, times=20)


@golden("wall", 1e-12, 3e-6)
def test_golden_scheme_wall(data: Golden) -> None:
    """The code's 1 / ln 2 has 8 digits: only what was made with the exact one is compared to all of them."""
    q, k, v = data.heads(*"qkv")
    positions = torch.arange(q.shape[2])
    gates, scalar = data["log_gate"].flatten(2), data["log_gate_scalar"]
    scheme = data.build("wall")
    scores = scheme.scores(q, k, gates, positions, positions)
    data.close_where_visible(scores, "scores_exact", positions, positions)
    out = attend(data, scheme, q, k, v, gates).transpose(1, 2)
    data.close(out, "out_exact")
    windows = [
        (attend(data, scheme, q, k, v, gates, w).transpose(1, 2), name) for name, w in data.numbered("out_window")
    ]
    both = torch.cat([gates, scalar], dim=-1)
    gated = attend(data, data.build("wall", scalar_gate=True), q, k, v, both).transpose(1, 2)
    data.budgets = (2e-7, data.budgets[1])
    data.close_where_visible(scores, "scores", positions, positions)
    for mine, name in ((out, "out"), (gated, "out_scalar_gate"), *windows):
        data.close(mine, name)


@golden("grape_ap", 1e-11, 1e-5)
def test_golden_scheme_grape_ap(data: Golden) -> None:
    q, k, v = data.heads(*"qkv")
    positions, p = torch.arange(q.shape[2]), data["p"].flatten(2)
    scheme = data.build("grape_ap", width=data.setting["p_head_dim"])
    data.close(scheme.slopes, "slopes")
    bias = scheme.content_bias(q, k, p, positions, positions)
    data.close_where_visible(bias, "bias", positions, positions)
    data.close(attend(data, scheme, q, k, v, p).transpose(1, 2), "out")


@golden("cope", 1e-12, 5e-6)
def test_golden_scheme_cope(data: Golden) -> None:
    q, k, v = (data[name][None].requires_grad_() for name in "qkv")
    positions, table = torch.arange(q.shape[2]), data["emb"].T
    for scaled, kind in ((True, "default"), (False, "nodiv")):
        scheme = data.build("cope", num_positions=len(table), scaled_term=scaled)
        fill(scheme, table=table)
        bias = scheme.content_bias(q, k, None, positions, positions)
        scores = (q @ k.mT * q.shape[-1] ** -0.5 + bias)[0]
        data.close_where_visible(scores, f"scores_{kind}", positions, positions)
        out = attend(data, scheme, q, k, v, None)
        data.close(out[0], f"out_{kind}")
        if scaled:
            counts = scheme.counts(q, k, positions, positions)[0]
            data.close_where_visible(counts, "positions", positions, positions)
            grads = torch.autograd.grad(out, (q, k, scheme.table), data["cot"][None])
            for gradient, name in zip(grads, ("grad_q", "grad_k", "grad_emb"), strict=True):
                theirs = data.arrays[name]
                data.close(gradient.squeeze(0), theirs.T if name == "grad_emb" else theirs, times=20)

    # Keys of the gates as features; values in their place are the authors' gates from values.
    separate = fill(data.build("cope", num_positions=len(table), gate_keys=True), table=table)
    for keys, kind in (("k_cope", "sep_key"), ("v", "val_gates")):
        x = data[keys].transpose(0, 1).flatten(1)[None]
        bias = separate.content_bias(q, k, x, positions, positions)
        scores = (q @ k.mT * q.shape[-1] ** -0.5 + bias)[0]
        data.close_where_visible(scores, f"scores_{kind}", positions, positions)
