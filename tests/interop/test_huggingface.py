"""A run of ours as a model of transformers: the same scores, the same tokens, the same rows."""

import dataclasses
import os

import pytest
import torch

from alibi_lm.evaluate.config import EvaluateConfig, EvaluateData
from alibi_lm.evaluate.sweep import evaluate
from alibi_lm.experiment import compose
from alibi_lm.interop.huggingface import ExportConfig, export_huggingface
from alibi_lm.load import load_run
from alibi_lm.model.cache import KeyValueCache
from alibi_lm.train import train

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
WORDS = "one two three four five six seven eight nine ten a b c d e f".split()
RUNS = {
    "plain": ["position=alibi", "tokenizer=bytes"],
    "adaptive": ["position=rotary", "tokenizer=word", "model.adaptive_cutoffs=[8,12]", "model.adaptive_factor=2"],
    "learned": ["position=learned", "tokenizer=word"],
    "drawn": ["training_positions=randomised", "training_positions.num_positions=40", "tokenizer=word"],
    "no_longer": ["training_positions=randomised", "training_positions.num_positions=16", "tokenizer=word"],
    "dropped": ["position=rotary", "positions_until=1", "tokenizer=word"],
}
ENDLESS = ("plain", "adaptive", "dropped")
"""Those that need not be told beforehand how long a sequence they will read."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    for split, count in (("train", 60), ("validation", 12), ("test", 4)):
        (folder / split).mkdir()
        for k in range(count):
            lines = [" ".join(WORDS[(k * j + i) % 16] for j in range(1, 7)) for i in range(3)]
            (folder / split / f"{k}.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def exported(place):
    """name -> (run folder, exported folder)."""
    found = {}
    for name, settings in RUNS.items():
        config = compose(
            [
                "experiment=smoke", "train_length=16", "steps=2", "tokens_per_step=128", "data=text",
                *settings,
                f"data.path={place}", f"data.cache_dir={place / 'cache'}", "model.model_dim=16",
                "model.ffn_dim=16",
                "device=cpu", "threads=1", "evaluation.lengths=[16]",
            ]
        )  # fmt: skip
        train(config, place / "runs" / name)
        output = export_huggingface(ExportConfig(str(place / "runs" / name), str(place / "exported" / name)))
        found[name] = place / "runs" / name, output
    return found


@pytest.mark.parametrize("name", sorted(RUNS))
def test_scores_and_loss(name, exported):
    from transformers import AutoModelForCausalLM

    run, folder = exported[name]
    ours, theirs = load_run(run, 16), AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.randint(ours.vocab_size, (3, 16))
    with torch.inference_mode():
        found = theirs(ids, labels=ids)
        torch.testing.assert_close(found.logits, ours(ids), atol=1e-6, rtol=0)
        expected = -ours.log_prob(ids[:, :-1], ids[:, 1:]).mean()
        torch.testing.assert_close(found.loss, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(theirs(ids, logits_to_keep=2).logits, found.logits[:, -2:], atol=1e-5, rtol=0)
    assert not any("alibi_lm" in path.name or path.suffix == ".py" for path in folder.iterdir())


@pytest.mark.parametrize("name", sorted(RUNS))
def test_generation_is_ours_token_by_token(name, exported):
    """With the cache and without, greedy and by beams; far past the training length where it can be."""
    from transformers import AutoModelForCausalLM

    run, folder = exported[name]
    ours, theirs = load_run(run, 16), AutoModelForCausalLM.from_pretrained(folder)
    prompt, count = torch.randint(4, ours.vocab_size, (2, 5)), 30 if name in ENDLESS else 11
    options = {
        "max_new_tokens": count,
        "min_new_tokens": count,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    found = theirs.generate(prompt, **options)
    assert torch.equal(found, theirs.generate(prompt, use_cache=False, **options))
    # As a tokenizer gives it: generate(**tokenizer(text, return_tensors="pt")).
    assert torch.equal(found, theirs.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options))
    cache, step, expected = KeyValueCache(), prompt, prompt
    with torch.inference_mode():
        for _ in range(count):
            step = ours(step, cache=cache, last=True).argmax(-1)
            expected = torch.cat([expected, step], dim=1)
    assert torch.equal(found, expected)
    beams = theirs.generate(prompt, num_beams=3, **options)
    assert torch.equal(beams, theirs.generate(prompt, num_beams=3, use_cache=False, **options))
    assert (beams != found).any() or name != "plain", "beams take another way somewhere"


@pytest.mark.parametrize("name", sorted(RUNS))
def test_and_back_with_the_same_rows(name, exported, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run, folder = exported[name]
    data = EvaluateData(path=str(place), name="text", split_by="given", cache_dir=str(tmp_path / "cache"))
    config = EvaluateConfig(runs=str(run), lengths=[8, 16, 40], device="cpu", threads=1, data=data, output_dir="a")
    back = dataclasses.replace(config, runs=None, model=f"hf:{folder}", output_dir="b")
    for ours, theirs in zip(evaluate(config), evaluate(back), strict=True):
        for field in ("position", "inference_length", "train_length", "tokens", "words", "bytes"):
            assert getattr(theirs, field) == getattr(ours, field)
        assert (
            (ours.nats is None)
            == (theirs.nats is None)
            == (name in ("learned", "no_longer") and ours.inference_length == 40)
        )
        if ours.nats is not None:
            for field in ("nats", "perplexity", "word_perplexity"):
                assert getattr(theirs, field) == pytest.approx(getattr(ours, field), rel=1e-7)
        assert (theirs.corpus == ours.corpus) or name != "plain"


def test_a_full_disk_leaves_no_half_model(exported, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("alibi_lm.interop.huggingface._write_tokenizer", full)
    with pytest.raises(ValueError, match=r"output_dir = .*half cannot be written: No space left"):
        export_huggingface(ExportConfig(str(exported["plain"][0]), str(tmp_path / "half")))
    assert not (tmp_path / "half").exists()


def test_another_text_goes_by_its_own_name(exported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.txt").write_text("some other text\n" * 30)
    data = EvaluateData(path="other", name="text", cache_dir="cache")
    config = EvaluateConfig(runs=str(exported["plain"][0]), lengths=[16], device="cpu", threads=1, data=data)
    assert {row.extra["corpus_name"] for row in evaluate(dataclasses.replace(config, output_dir="a"))} == {"other"}


def test_what_it_refuses(exported, tmp_path):
    from transformers import AutoModelForCausalLM

    run, folder = exported["plain"]
    model, ids = AutoModelForCausalLM.from_pretrained(folder), torch.ones(2, 4, dtype=torch.int64)
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    with pytest.raises(ValueError, match="do not support padding"):
        model(ids, attention_mask=mask)
    with pytest.raises(ValueError, match="differ between the rows"):
        model(ids, position_ids=torch.arange(8).view(2, 4))
    with pytest.raises(ValueError, match="is not empty"):
        export_huggingface(ExportConfig(str(run), str(folder)))
    with pytest.raises(ValueError, match="not a run folder"):
        export_huggingface(ExportConfig(str(tmp_path), str(tmp_path / "new")))


def test_beams_take_their_rows_of_the_cache_along(exported, monkeypatch):
    """With drawn weights beams change places at every step."""
    from transformers import AutoModelForCausalLM

    from alibi_lm.interop.huggingface import RunCache

    model = AutoModelForCausalLM.from_pretrained(exported["plain"][1])
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter)
    prompt = torch.randint(4, model.config.vocab_size, (2, 5))
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "num_beams": 4, "do_sample": False, "pad_token_id": 0}
    options |= {"eos_token_id": None}
    expected = model.generate(prompt, use_cache=False, **options)
    assert torch.equal(model.generate(prompt, **options), expected)
    monkeypatch.setattr(RunCache, "reorder_cache", lambda self, beam_idx: None)
    assert not torch.equal(model.generate(prompt, **options), expected)
