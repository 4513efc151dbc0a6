"""model=hf:... from the command's settings to rows and views, and what is refused before any work."""

import dataclasses
import json
import math
import os
import pickle
import shutil

import pytest
import torch
from hub_models import VOCAB, build, configs, save

from alibi_lm.evaluate.config import VIEWS, EvaluateConfig, EvaluateData
from alibi_lm.evaluate.sweep import analyse, evaluate
from alibi_lm.experiment import compose
from alibi_lm.results.rows import read_rows
from alibi_lm.study.view_figures import draw_analysis

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
TEXT = [f"Document {k}: " + " ".join(f"word{(k * j) % 17}" for j in range(12)) + "\n" for k in range(6)]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Six documents of plain text, and no other file."""
    folder = tmp_path_factory.mktemp("text")
    for k, content in enumerate(TEXT):
        (folder / f"{k}.txt").write_text(content)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with every architecture."""
    place = tmp_path_factory.mktemp("models")
    for name in configs():
        save(build(name), place / name)
    return place


@pytest.fixture
def settings(models, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def make(name, **more):
        more = {"lengths": [16, 32, 48]} | more
        data = more.pop("data", EvaluateData(name="text", path=str(text), cache_dir=str(tmp_path / "cache")))
        return EvaluateConfig(model=f"hf:{models / name}", device="cpu", threads=1, data=data, **more)

    return make


QUICK = ("bloom", "gpt2", "mistral")
ALL = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in sorted(configs())]


@pytest.mark.parametrize("name", ALL)
def test_every_architecture_end_to_end(name, models, settings):
    rows = list(evaluate(settings(name)))
    assert [row.inference_length for row in rows] == [16, 32, 48]
    ids = [0] + [t for content in TEXT for t in [*(b + 1 for b in content.encode()), 0]]
    for row in rows:
        if name in ("gpt2", "opt") and row.inference_length > 32:
            assert row.nats is None and "has 32 positions" in row.reason
            continue
        size = len("".join(TEXT).encode())
        assert (row.run, row.position, row.train_length, row.seed) == (name, configs()[name].model_type, 32, None)
        assert (row.bytes, row.tokens) == (size, size + len(TEXT)), "a document end follows each document"
        assert row.bits_per_byte == row.extra["bits_per_byte"] == row.nats / math.log(2) / row.bytes
        assert row.word_perplexity == pytest.approx(math.exp(row.nats / row.words))
        assert row.extra["documents"] == 6 and row.extra["model"].endswith(name)
    # By transformers alone: the stream in windows of 16, each target after the token before it.
    from transformers import AutoModelForCausalLM

    model, stream, total = AutoModelForCausalLM.from_pretrained(models / name), torch.tensor(ids), 0.0
    for start in range(0, len(ids) - 1, 16):
        inputs, targets = stream[start : start + 16], stream[start + 1 : start + 17]
        with torch.no_grad():
            logits = model(inputs[None, : len(targets)], use_cache=False).logits[0].double()
        total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
    assert rows[0].nats == pytest.approx(total, rel=1e-5)


def test_all_views_of_an_alibi_model(settings):
    """The window goes in through the model's own mask, so that its curve is taken apart like that of our runs."""
    config = settings("bloom", view="decomposition", lengths=[32, 64], stride=8)
    (path,) = analyse(config)
    (series,) = json.loads(path.read_text())["series"]
    (point,) = series["points"]
    assert path.parent.parent.name == "bloom" and series["position"] == "bloom"
    parts = [point[part]["nats"] for part in ("early_tokens", "positions_beyond", "keys_beyond")]
    assert sum(parts) == pytest.approx(point["total"]["nats"]) and any(abs(p) > 1e-4 for p in parts)
    assert point["largest_early_difference"] < 1e-3
    (path,) = analyse(settings("bloom", view="offset", lengths=None, offsets=[0, 8]))
    points = json.loads(path.read_text())["series"][0]["points"]
    assert points[0]["nats"] == 0 and "cannot be given positions" in points[1]["reason"]


def test_a_view_that_cannot_be_had_stops_no_other(settings):
    config, found = settings("bloom", view="all", lengths=[32, 64], stride=8, key_gain=1e-4, key_loss=99.0), {}
    with pytest.raises(ValueError, match="bloom does not show its attention weights"):
        for path in analyse(config):
            found[path.stem] = json.loads(path.read_text())["series"][0]["points"]
    assert set(found) == set(VIEWS) - {"attention"} and found["self_longppl"][0]["nats"] > 0


@pytest.mark.parametrize("name", ["bloom", "mpt", "falcon"])
def test_windows_and_verdict_of_imported_alibi_models(name, settings):
    (path,) = analyse(settings(name, view="windows", lengths=None))
    points = json.loads(path.read_text())["series"][0]["points"]
    heads = 4 if name == "falcon" else 3
    assert [(p["layer"], p["head"]) for p in points] == [(a, b) for a in (1, 2) for b in range(1, heads + 1)]
    for point in points:
        assert 1 <= point["windows"]["1e-2"] <= point["windows"]["2^-25"]
        if name != "falcon":  # transformers tells attention weights of it that it does not use
            assert all(point["needed"][share] <= point["windows"][share] for share in point["windows"])
    (path,) = analyse(settings(name, view="safe_length", lengths=[32, 64]))
    (series,) = json.loads(path.read_text())["series"]
    assert series["safe_length"] in (32, 64) and series["verdict"][-1] == "."
    draw_analysis(path)
    assert series["verdict"] in path.with_suffix(".md").read_text()


def test_changes_stand_in_the_row_and_in_its_key(settings, text, models, tmp_path):
    overrides = [
        f"model=hf:{models / 'llama'}", "data=text", f"data.path={text}", f"data.cache_dir={tmp_path}",
        "lengths=[48]",
        "+model.rope_scaling.rope_type=linear", "+model.rope_scaling.factor=2.0", "device=cpu", "threads=1",
    ]  # fmt: skip
    changed = compose(overrides, "evaluation/evaluate", EvaluateConfig)
    assert changed.data.name == "text" and changed.output.parts[-2:] == ("llama", "extrapolation")
    rows = [*evaluate(settings("llama", lengths=[48])), *evaluate(changed)]
    assert rows[1].changes == {"model.rope_scaling.rope_type": "linear", "model.rope_scaling.factor": 2.0}
    assert rows[0].key != rows[1].key and abs(rows[0].nats - rows[1].nats) > 1e-2
    assert len(read_rows(changed.output / "results.jsonl")) == 2
    (named,) = evaluate(settings("llama", lengths=[48], train_length=16))
    assert named.train_length == 16 and named.extra["train_length_from"] == "train_length"


def test_results_are_kept_by_weights_and_settings(settings, models, tmp_path, monkeypatch):
    first = list(evaluate(settings("qwen2", lengths=[16])))
    with monkeypatch.context() as patched:
        patched.setattr("alibi_lm.model.huggingface.HuggingFaceLM.score", None)
        assert [row.nats for row in evaluate(settings("qwen2", lengths=[16]))] == [first[0].nats]
    other = tmp_path / "elsewhere" / "qwen2"
    save(build("qwen2", seed=1), other)
    config = settings("qwen2", lengths=[16])
    again = dataclasses.replace(config, model=f"hf:{other}", output_dir=str(config.output))
    with pytest.raises(ValueError, match="another run of the same name"):
        list(evaluate(again))


def _edit(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def _weights(change):
    """A change of the weights: by name, in place."""
    from safetensors.torch import load_file, save_file

    def edit(folder):
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def _pickled(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))


def _shard_missing(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def _no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


def _larger_tokenizer(folder):
    from alibi_lm.data.tokenizers import word_tokenizer

    word_tokenizer([f"w{k}" for k in range(2 * VOCAB)]).save(folder / "tokenizer.json")


def _config(**values):
    return lambda folder: _edit(folder, **values)


MINE = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
T5 = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}
BLOOM = {"model_type": "bloom", "architectures": ["BloomForCausalLM"], "n_positions": None, "n_ctx": None}
DAMAGES = {
    "no config": (lambda folder: (folder / "config.json").unlink(), ["no config.json"]),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), ["holds no weights"]),
    "pickled": (_pickled, ["pickled", "pytorch_model.bin", "save_pretrained"]),
    "a shard is missing": (_shard_missing, ["1 of 2 files", "model-00002-of-00002.safetensors"]),
    "a weight is missing": (
        _weights(lambda w: w.pop("transformer.h.0.ln_1.weight")), ["h.0.ln_1.weight", "random numbers"],
    ),
    "cut": (_truncated, ["cannot be loaded"]),
    "encoder": (_config(**T5), ["not a causal language model", "T5ForConditionalGeneration"]),
    "masked": (_config(model_type="bert", architectures=["BertForMaskedLM"]), ["not a causal language model"]),
    "foreign code": (_config(model_type="mine", auto_map=MINE), ["trust_remote_code=true"]),
    "unknown": (_config(model_type="mine"), ["knows no model_type 'mine'"]),
    "no length": (_config(**BLOOM), ["train_length=<tokens>"]),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), ["is not a JSON file"]),
    "NaN": (_weights(lambda w: w["transformer.h.1.ln_1.weight"].fill_(math.nan)), ["NaN", "precision=float32"]),
    "no tokenizer": (_no_tokenizer, ["holds no tokenizer"]),
    "a larger tokenizer": (_larger_tokenizer, ["has 260 words", "do not belong"]),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_wrong_with_a_folder_is_told_before_any_work(damage, models, settings, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(models / "gpt2", folder)
    change, words = DAMAGES[damage]
    change(folder)
    config = EvaluateConfig(model=f"hf:{folder}", lengths=[16], device="cpu", data=settings("gpt2").data)
    with pytest.raises(ValueError) as error:
        list(evaluate(config))
    for part in words:
        assert part in str(error.value)
    assert not (config.output / "results.jsonl").exists()


@pytest.mark.parametrize(
    ("settings_", "words"),
    [
        ({"model": "hf:nobody/nothing"}, ["hf:nobody/nothing", "HF_HUB_OFFLINE"]),
        ({"model": "hf:./nowhere"}, ["no such folder"]),
        ({"model": "hf:bad name!"}, ["neither a folder nor a name on the hub"]),
        ({"model": "outputs/quick/runs/x"}, ["model=hf:<folder or hub name>", "runs=<folder>"]),
        ({"model": "hf:x", "runs": "y"}, ["one or the other"]),
        ({"train_length": 5}, ["no effect without model"]),
        ({"trust_remote_code": True}, ["no effect without model"]),
        ({"model_config": {"a": 1}}, ["+model.<key>", "no effect"]),
    ],
)
def test_wrong_settings(settings_, words, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as error:
        data = EvaluateData(name="text", path=str(text))
        list(evaluate(EvaluateConfig(**{"lengths": [8], "device": "cpu", "data": data} | settings_)))
    for part in words:
        assert part in str(error.value)


def test_a_model_needs_a_text(settings):
    with pytest.raises(ValueError, match=r"data=text data\.path"):
        list(evaluate(settings("gpt2", data=EvaluateData())))
