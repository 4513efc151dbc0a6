"""mode=stream: the whole split as one window, through any cache, is the full pass; rows say how it was kept."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from alibi_lm.evaluate.config import EvaluateConfig
from alibi_lm.evaluate.passes import Passes
from alibi_lm.evaluate.rows import describe, measure_stream
from alibi_lm.evaluate.stream import (
    LongStreamConfig,
    Policy,
    descriptors,
    long_stream,
    print_long_stream,
    resident_bytes,
    stream_nats,
)
from alibi_lm.evaluate.sweep import analyse, evaluate
from alibi_lm.evaluate.views import Group
from alibi_lm.evaluate.windows import largest_lost, windows
from alibi_lm.files import read_json
from alibi_lm.model.cache import KeyValueCache
from alibi_lm.model.transformer import TransformerLM
from alibi_lm.results.curves import View, curves, views
from alibi_lm.results.documents import read_documents
from alibi_lm.results.rows import read_rows
from alibi_lm.study.figures import curve_figure, draw
from alibi_lm.study.view_figures import draw_analysis
from alibi_lm.tasks.text import TextTask


@pytest.mark.parametrize(("position", "chunk"), [("alibi", 400), ("t5", 37), ("sinusoidal", 37), ("fox", 37)])
def test_a_stream_is_the_full_pass(tiny_model, position, chunk):
    model, tokens = tiny_model(position, "auto"), np.random.default_rng(0).integers(0, 50, 300)
    found = np.concatenate(list(stream_nats(model, tokens, 7, KeyValueCache(), chunk)))
    inputs, targets = torch.tensor([7, *tokens[:-1]])[None], torch.tensor(tokens)[None]
    np.testing.assert_allclose(found, -model.log_prob(inputs, targets)[0].detach().numpy(), atol=2e-5)


@pytest.fixture
def passes(tiny_model):
    tokens = np.random.default_rng(0).integers(0, 50, 700)
    text = TextTask(tokens, 7, documents=np.array([0, 200]), corpus="c", words=650, bytes=3000)
    return lambda position: Passes(tiny_model(position, "auto"), text, scheme=position)


@pytest.mark.parametrize(
    "policy", [Policy(), Policy("proved"), Policy("certified", 1e-4), Policy("window", window=50)]
)
def test_rows_name_the_policy_what_it_kept_and_what_it_lost(passes, policy, tmp_path):
    (row,) = measure_stream(passes("alibi"), policy, tmp_path, position="alibi")
    (full,) = measure_stream(passes("alibi"), Policy(), position="alibi")
    sums = read_documents(tmp_path)[row.key]
    assert (row.mode, row.inference_length, row.tokens, row.stride) == ("stream", 700, 700, None)
    assert row.extra["cache"] == policy.cache and row.changes == policy.changes
    assert sums.nats.sum() == pytest.approx(row.nats, abs=1e-5)
    assert len(sums.nats) == 2 and row.word_perplexity > row.perplexity
    if policy.cache == "window":
        assert row.extra["lost_share"] is None and row.extra["keys_held"] == 50
        return
    assert abs(row.loss - full.loss) < 1e-5
    assert row.extra["lost_share"] <= (policy.lost_share or 2**-25) * 1.01 and row.extra["keys_held"] <= 700


def test_a_scheme_with_a_table_has_a_row_that_says_why_not(passes):
    (row,) = measure_stream(passes("learned"), Policy(), position="learned")
    assert row.nats is None and row.reason == "position=learned has 128 positions"
    with pytest.raises(ValueError, match="no bias that falls"):
        measure_stream(passes("rotary"), Policy("proved"), position="rotary")


def test_a_stream_that_is_no_number_has_a_row_that_says_so(passes, tmp_path):
    broken = passes("alibi")
    with torch.no_grad():
        broken.model.final_norm.bias[0] = torch.nan
    (row,) = measure_stream(broken, Policy(), tmp_path, position="alibi")
    assert row.nats is None and row.reason == "the sum of nats is nan" and row.extra["keys_held"] == 700
    assert read_rows(tmp_path / "results.jsonl") == [row] and not read_documents(tmp_path)


def test_a_split_is_streamed_and_stands_apart_in_the_figure(place):
    runs = "outputs/smoke/runs/alibi_L8_s1"
    where = {"experiment": "smoke", "runs": runs, "output_dir": "streamed", "device": "cpu", "threads": 1}
    list(evaluate(EvaluateConfig(**where, lengths=[4, 8, 16])))
    (full,) = [r for r in evaluate(EvaluateConfig(**where, mode="stream")) if r.run]
    (proved,) = [r for r in evaluate(EvaluateConfig(**where, mode="stream", cache="proved")) if r.run]
    assert full.inference_length == full.tokens == proved.tokens and abs(full.loss - proved.loss) < 1e-5
    assert "keys held per head, lost share at most" in describe(proved)
    rows = read_rows("streamed/results.jsonl")
    assert {full.key, proved.key} < {row.key for row in rows} and full.key in read_documents("streamed")
    assert [view.mode for view in views(rows)] == ["nonoverlapping", "stream"]
    (curve,) = curves(rows, View("validation", "nonoverlapping"))
    assert curve.streamed == {full.tokens: {"alibi_L8_s1": pytest.approx(full.loss)}} and curve.lengths == [
        4,
        8,
        16,
    ]
    axis = curve_figure(rows, View("validation", "nonoverlapping")).axes[0]
    (star,) = [line for line in axis.lines if line.get_marker() == "*"]
    assert star.get_xdata() == [full.tokens] and star.get_ydata() == [pytest.approx(full.perplexity)]
    assert not [p for p in draw("streamed") if "stream." in p.name]


def test_the_view_of_windows_has_a_row_per_head_or_the_reason(place):
    where = {"experiment": "smoke", "view": "windows", "output_dir": "windows", "device": "cpu", "threads": 1}
    (path,) = analyse(EvaluateConfig(**where, runs="outputs/smoke/runs/*"))
    by_position = {series["position"]: series["points"] for series in read_json(path)["series"]}
    assert by_position["learned"] == [{"reason": "it has no bias that falls with the distance"}]
    for point in by_position["alibi"]:
        for share in ("2^-25", "1e-3", "1e-2"):
            assert 1 <= point["needed"][share] <= point["windows"][share]
    table = draw_analysis(path)[-1].read_text()
    assert "| ALiBi | 8 | 1 | 2 |" in table and "[1] it has no bias that falls with the distance" in table


def test_the_view_of_windows_leaves_the_model_where_it_is(passes, monkeypatch):
    monkeypatch.setattr(TransformerLM, "to", lambda model, device: pytest.fail(f"moved to {device}"))
    points = windows(Group("alibi", 128, [passes("alibi")]), [128])
    assert all(point["measured_on"] == 700 for point in points)


def test_the_needed_window_is_that_of_the_definition():
    q, k, bias = torch.randn(2, 9, 4), torch.randn(2, 9, 4), -torch.arange(9.0).repeat(2, 1)
    found = largest_lost(q, k, bias)
    for d in range(9):
        expected = torch.zeros(2, dtype=torch.float64)
        for i in range(9):
            weights = (q[:, i : i + 1].double() @ k[:, : i + 1].double().mT / 2)[:, 0]
            weights = (weights + bias[:, : i + 1].flip(1)).softmax(-1)
            expected = torch.maximum(expected, weights[:, : max(0, i + 1 - d)].sum(-1))
        torch.testing.assert_close(found[:, d], expected)


def test_a_long_stream_is_the_stream_block_by_block(trained_runs, tmp_path, capsys):
    run, folder = str(trained_runs / "outputs" / "smoke" / "runs" / "alibi_L8_s1"), tmp_path / "new" / "stream"
    config = LongStreamConfig(run, 3000, 1000, "validation", threads=1, output_dir=str(folder))
    for _ in range(2):  # the second replaces what the first has written
        print_long_stream(config)
        blocks = [json.loads(line) for line in (folder / "stream.jsonl").read_text().splitlines()]
        assert (folder / "stream.md").read_text().count("\n") == 7
        assert capsys.readouterr().out.startswith(f"to     1,000: perplexity {blocks[0]['perplexity']:.3f}, ")
    assert [b["end"] for b in blocks] == [1000, 2000, 3000] and all(b["perplexity"] > 1 for b in blocks)
    (whole,) = long_stream(LongStreamConfig(run, 3000, 3000, "validation", cache="full", threads=1))
    mean = np.mean(np.log([block["perplexity"] for block in blocks]))
    assert np.log(whole["perplexity"]) == pytest.approx(mean, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("policy", [Policy("proved"), Policy("certified")])
def test_a_hundred_thousand_tokens_leave_memory_and_descriptors_flat(tiny_model, policy):
    model = tiny_model("alibi", "auto")
    with torch.no_grad():
        for block in model.layers:
            block.attention.qkv.weight *= 0.3  # windows of a few thousand keys
    cache, tokens = policy.open(model), np.random.default_rng(0).integers(0, 50, 10_000)
    memory, files = [], []
    for _ in range(10):
        for _ in stream_nats(model, tokens, 0, cache):
            pass
        memory.append(resident_bytes())
        files.append(descriptors())
    assert cache.next_position == 100_000 and len(set(files)) == 1
    assert max(memory[3:]) - memory[2] < 8 << 20
