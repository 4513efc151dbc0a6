"""The command that goes on from a prompt: one JSON object, partial text kept, runs that will not do refused."""

from __future__ import annotations

import io
import json
import shutil

import pytest

import alibi_lm.generation as command
from alibi_lm.data.tokenizers import word_tokenizer
from alibi_lm.generation import GenerateConfig, run_generate
from alibi_lm.model.streaming import open_cache


@pytest.fixture
def trained_run(trained_runs):
    return trained_runs / "outputs" / "smoke" / "runs" / "alibi_L8_s1"


def test_the_command_prints_one_json_object(trained_run, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("w1 w2 nosuchword"))
    settings = dict(run=str(trained_run), file="-", max_tokens=5, temperature=0.0, device="cpu", json=True)
    assert run_generate(GenerateConfig(**settings, cache="proved")) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["tokens"] == 5 and found["cache"] == "proved" and len(found["text"].split()) <= 5
    assert 0 <= found["lost_share"] <= 2**-25 and found["keys_held"] > 0 and not found["exceeded"]
    assert "read as <unk>: nosuchword" in err


def test_an_interruption_keeps_the_text(trained_run, capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        yield 5
        raise KeyboardInterrupt

    monkeypatch.setattr("alibi_lm.generation.generate", interrupted)
    assert run_generate(GenerateConfig(run=str(trained_run), prompt="w1", device="cpu")) == 130
    out, err = capsys.readouterr()
    assert out.startswith("w1 w") and "1 tokens after 2 (interrupted)" in err


def test_a_run_that_is_not_finished_or_has_another_tokenizer_is_refused(trained_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained_run, run)
    settings = dict(run=str(run), prompt="w1", device="cpu")
    word_tokenizer(["w1", "w2"]).save(run / "tokenizer.json")
    with pytest.raises(ValueError, match="is not the tokenizer that the run was trained with"):
        run_generate(GenerateConfig(**settings))
    for mark in run.glob("*finished*"):
        mark.unlink()
    with pytest.raises(ValueError, match="is not finished"):
        run_generate(GenerateConfig(**settings))
    with pytest.raises(ValueError, match="there is no such folder"):
        run_generate(GenerateConfig(run=str(tmp_path / "none"), prompt="w1"))


def test_more_lost_than_allowed_stops_the_text_and_is_marked(trained_run, capsys, monkeypatch):
    def worried(*args, **kwargs):
        cache = open_cache(*args, **kwargs)
        cache.lost_share = 0.5
        return cache

    monkeypatch.setattr(command, "open_cache", worried)
    settings = dict(run=str(trained_run), prompt="w1", device="cpu", cache="certified", max_tokens=5)
    assert run_generate(GenerateConfig(**settings, beyond="stop")) == 0
    assert "1 tokens after 2 (stopped: more than lost_share" in capsys.readouterr().err
    assert run_generate(GenerateConfig(**settings)) == 0
    assert "MORE than lost_share" in capsys.readouterr().err
