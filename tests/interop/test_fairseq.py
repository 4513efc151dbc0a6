"""Imported runs give what fairseq gives; everything that is not the paper's kind of model is refused."""

import argparse
import json
import math
import os
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from alibi_lm import load_run
from alibi_lm.config import load_config
from alibi_lm.data.tokenizers import Tokenizer
from alibi_lm.interop.fairseq import ImportConfig, import_fairseq

from .conftest import VOCAB

SCRIPT = Path(__file__).parents[2] / "scripts" / "import_fairseq.py"
IDS = torch.tensor([2, 5, 39, 9, 10, 21, 22, 0, 1, 38, 11, 2, 30])


def run_import(path, make, position="alibi", **more):
    folder = make.folder / "run"
    return import_fairseq(ImportConfig(str(path), str(make.dictionary), position, str(folder), **more))


@torch.no_grad()
def log_probs(model):
    """Of every word after every prefix of IDS: (T, V)."""
    words = torch.arange(VOCAB)[:, None].expand(VOCAB, len(IDS))
    return model.log_prob(IDS.expand(VOCAB, len(IDS)), words).T


# -- equal to fairseq ------------------------------------------------------------------------------------------


THREE_TAILS = {"adaptive_softmax_cutoff": "3,4,30", "adaptive_input_cutoff": "3,4,30"}


@pytest.mark.parametrize(
    ("position", "settings"),
    [
        ("alibi", {}),
        ("alibi", {"decoder_attention_heads": 4}),
        ("alibi", {"decoder_attention_heads": 3}),
        ("alibi", {"adaptive_softmax_cutoff": "12", "adaptive_input_cutoff": "12"}),
        ("alibi", THREE_TAILS | {"adaptive_softmax_factor": 2.0, "adaptive_input_factor": 2.0}),
        ("alibi", {"no_decoder_final_norm": False}),
        ("sinusoidal", {}),
        ("sinusoidal", {"no_scale_embedding": True}),
    ],
)
def test_log_probs(make, reference, position, settings):
    path, tensors, values = make(**settings)
    model = load_run(run_import(path, make, position), len(IDS))
    expected = reference(tensors, values, position, IDS)
    assert not model.training and {p.dtype for p in model.parameters()} == {torch.float32}
    torch.testing.assert_close(log_probs(model).double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(log_probs(model.double()), expected, rtol=0, atol=1e-10)


def old_names(content):
    del content["args"].no_decoder_final_norm
    content["args"].no_tie_adaptive_proj = False


def model_as_namespace(content):
    content["cfg"]["model"] = argparse.Namespace(**content["cfg"]["model"])


def references(content):
    content["cfg"]["model"]["tokens_per_sample"] = "${task.tokens_per_sample}"
    content["cfg"]["task"] = {"tokens_per_sample": 16}


def numpy_values(content):
    """As training loops leave them: in settings, in counters, in states that an import does not need."""
    model = content["cfg"]["model"]
    model.update(decoder_layers=np.int64(2), dropout=np.float32(0.25), adaptive_input=np.bool_(True))
    model.update(adaptive_softmax_cutoff=np.array([10, 22]), activation_fn=np.str_("relu"))
    content["cfg"]["common"]["seed"] = np.array(7, dtype=">i2")
    content["extra_state"].update(best=np.float64(4.3), table=np.asfortranarray(np.ones((2, 3), np.complex64)))
    content["optimizer_history"][-1]["num_updates"] = np.int32(286_000)
    content["extra_state"]["nested"] = [{"a": (np.uint8(3), np.zeros(0))}]


@pytest.mark.parametrize(
    ("edit", "how"),
    [
        (None, {"as_args": True}),
        (old_names, {"as_args": True, "drop": ("tie_adaptive_proj", "layernorm_embedding")}),
        (model_as_namespace, {}),
        (references, {}),
        (numpy_values, {}),
        (numpy_values, {"zip_format": False}),
        (None, {"zip_format": False}),
        (None, {"dtype": torch.float16}),
        (None, {"dtype": torch.bfloat16}),
    ],
)
def test_other_forms_of_the_same_checkpoint(make, reference, edit, how):
    path, tensors, values = make(edit=edit, **how)
    folder = run_import(path, make)
    model = load_run(folder, attention="eager")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    expected = reference(tensors, values, "alibi", IDS)
    torch.testing.assert_close(log_probs(model).double(), expected, rtol=0, atol=1e-5)
    config = load_config(folder)
    assert (config.seed, config.steps, config.model.num_layers) == (7, 286_000, 2)
    assert config.model.dropout == (0.25 if edit is numpy_values else 0.3)
    assert json.loads((folder / "finished.json").read_text())["best_validation_loss"] == 4.3 * math.log(2)


# -- the run folder --------------------------------------------------------------------------------------------


def test_the_run_folder_says_what_it_is(make):
    path, _, _ = make()
    folder = run_import(path, make)
    config = load_config(folder)
    model = config.model
    assert (config.position.name, config.train_length, config.seed, config.steps) == ("alibi", 16, 7, 286_000)
    assert (model.num_layers, model.model_dim, model.num_heads, model.ffn_dim) == (2, 24, 6, 20)
    assert (model.dropout, model.attention_dropout, model.activation_dropout) == (0.3, 0.1, 0.1)
    assert (model.adaptive_cutoffs, model.adaptive_factor, model.adaptive_dropout) == ([10, 22], 4.0, 0.2)
    assert (model.activation, model.final_norm, model.scale_embeddings) == ("relu", False, True)
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    assert tokenizer.vocab_size == 40
    assert tokenizer.encode("word0 word35 unheard-of <unk>\n\n").tolist() == [4, 39, 3, 3, 2, 2]
    finished = json.loads((folder / "finished.json").read_text())
    assert finished["best_validation_loss"] == pytest.approx(4.3 * math.log(2))
    record = json.loads((folder / "import.json").read_text())
    assert record["settings"]["decoder_attention_heads"] == 6
    assert len(record["sha256"]) == 64
    assert json.loads((folder / "environment.json").read_text())["torch"] == torch.__version__


def test_the_variant_of_sinusoids_and_the_dropout_of_older_checkpoints(make):
    path, _, _ = make(activation_dropout=0.0, relu_dropout=0.15)
    config = load_config(run_import(path, make, "sinusoidal"))
    assert config.position.variant == "fairseq" and config.model.activation_dropout == 0.15


def test_a_checkpoint_that_does_not_say_its_updates(make):
    def edit(content):
        content["optimizer_history"], content["extra_state"] = [], None

    path, _, _ = make(edit=edit)
    folder = run_import(path, make)
    assert load_config(folder).steps == 1
    assert load_run(folder, checkpoint="last") is not None
    assert json.loads((folder / "finished.json").read_text())["best_validation_loss"] is None


def test_an_imported_run_is_replaced_only_when_asked(make):
    path, _, _ = make()
    folder = run_import(path, make)
    with pytest.raises(ValueError, match=r"holds an imported run already. Use overwrite=true"):
        run_import(path, make)
    path, _, _ = make(decoder_layers=1)
    assert run_import(path, make, overwrite=True) == folder
    assert load_config(folder).model.num_layers == 1


def test_the_weights_of_another_import_are_refused(make):
    """They fit: a sinusoidal and an ALiBi model have the same tensors."""
    path, _, _ = make()
    sinusoidal = run_import(path, make, "sinusoidal").rename(make.folder / "sinusoidal")
    alibi = run_import(path, make)
    shutil.rmtree(alibi / "checkpoints")
    shutil.copytree(sinusoidal / "checkpoints", alibi / "checkpoints")
    with pytest.raises(ValueError, match="belongs to another run"):
        load_run(alibi)


def test_other_folders_are_never_touched(make):
    path, _, _ = make()
    folder = make.folder / "run"
    folder.mkdir()
    (folder / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="holds something other than an imported run"):
        run_import(path, make, overwrite=True)
    assert [p.name for p in folder.iterdir()] == ["thesis.tex"]


def test_a_doubtful_position_is_reported(make, capsys):
    path, _, _ = make()
    run_import(path, make)
    assert capsys.readouterr().err == ""
    run_import(path, make, "sinusoidal", overwrite=True)
    assert "position = sinusoidal, but the model's settings has max_tokens" in capsys.readouterr().err
    path, _, _ = make(drop=("max_tokens",))
    run_import(path, make, overwrite=True)
    assert "position = alibi, but the model's settings lacks max_tokens" in capsys.readouterr().err


# -- refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adaptive_input": False}, "adaptive_input = False"),
        ({"tie_adaptive_weights": False}, "tie_adaptive_weights = False"),
        ({"tie_adaptive_proj": False}, "tie_adaptive_proj = False"),
        ({"decoder_normalize_before": False}, "decoder_normalize_before = False"),
        ({"character_embeddings": True}, "character_embeddings = True"),
        ({"decoder_learned_pos": True}, "decoder_learned_pos = True"),
        ({"layernorm_embedding": True}, "layernorm_embedding = True"),
        ({"add_bos_token": True}, "add_bos_token = True"),
        ({"decoder_layers_to_keep": "0"}, "decoder_layers_to_keep = '0'"),
        ({"base_layers": 1}, "base_layers = 1"),
        ({"quant_noise_pq": 0.1}, "quant_noise_pq = 0.1"),
        ({"activation_fn": "gelu_fast"}, "activation_fn = 'gelu_fast'"),
        ({"adaptive_input_cutoff": "10,23"}, "adaptive_input_cutoff = '10,23'"),
        ({"adaptive_input_factor": 2.0}, "adaptive_input_factor = 2.0"),
        ({"decoder_input_dim": 12}, "decoder_input_dim = 12"),
        ({"decoder_attention_heads": 5}, "model.num_heads = 5 does not divide"),
        ({"decoder_attention_heads": 0}, "decoder_attention_heads = 0"),
        ({"tokens_per_sample": "many"}, "tokens_per_sample = 'many'"),
    ],
)
def test_other_models_are_refused(make, settings, message):
    path, _, _ = make(edit=lambda content: content["cfg"]["model"].update(settings))
    with pytest.raises(ValueError, match=message):
        run_import(path, make)
    assert not (make.folder / "run").exists()


def test_sinusoidal_without_position_embeddings_is_refused(make):
    path, _, _ = make(no_token_positional_embeddings=True)
    with pytest.raises(ValueError, match="no_token_positional_embeddings = True"):
        run_import(path, make, "sinusoidal")
    assert run_import(path, make, "alibi")


NAME = "decoder.layers.1.fc1.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c["model"].pop(NAME), rf"missing {NAME}; unknown nothing"),
        (lambda c: c["model"].update(extra=torch.zeros(1)), "missing nothing; unknown extra"),
        (lambda c: c["model"].pop("decoder.adaptive_softmax.tail.1.2.weight"), r"missing .*tail\.1\.2\.weight"),
        (lambda c: c["model"].update({NAME: torch.zeros(20, 23)}), r"ffn\.up\.weight has shape \(20, 23\)"),
        (lambda c: c["model"].update({NAME: torch.full((20, 24), math.nan)}), f"{NAME} holds NaN"),
        (
            lambda c: c["model"].update({"decoder.adaptive_softmax.tail.0.0.weight": torch.zeros(24, 6)}),
            r"tail\.0\.0\.weight and .*embeddings\.1\.1\.weight differ",
        ),
        (lambda c: c.pop("model"), "not a fairseq checkpoint"),
        (lambda c: c.update(model={"weights": [1, 2]}), "not a fairseq checkpoint"),
        (lambda c: c.update(cfg=None), "holds no model settings"),
        (lambda c: c["cfg"]["model"].pop("decoder_layers"), "does not say decoder_layers"),
    ],
)
def test_altered_checkpoints_are_refused(make, edit, message):
    path, _, _ = make(edit=edit)
    with pytest.raises(ValueError, match=message):
        run_import(path, make)
    assert not (make.folder / "run").exists()


def test_a_version_counter_of_2_switches_the_final_norm_off(make):
    """fairseq's rule: such checkpoints were trained without it, whatever the settings say."""

    def edit(content):
        content["model"]["decoder.version"] = torch.tensor([2.0])
        for kind in ("weight", "bias"):
            del content["model"][f"decoder.layer_norm.{kind}"]

    path, _, _ = make(no_decoder_final_norm=False, edit=edit)
    assert load_config(run_import(path, make)).model.final_norm is False


def test_a_dictionary_of_another_size_is_refused(make):
    path, _, _ = make()
    make.dictionary.write_text(make.dictionary.read_text() + "another 1\n")
    with pytest.raises(ValueError, match="vectors for 40 words, the dictionary has 41"):
        run_import(path, make)


class Call:
    """Pickled, it calls a function with arguments when it is read."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def scalar(*arguments):
    return Call(np.float64(1).__reduce__()[0], *arguments)


def array_of(*state):
    """An array that is given this state when it is read."""

    class Forged:
        def __reduce__(self):
            function, arguments, _ = np.zeros(1).__reduce__()
            return function, arguments, state

    return Forged()


@pytest.mark.parametrize(
    ("forge", "message"),
    [
        (lambda mkdir: mkdir, r"object of class posix\.mkdir"),
        (lambda mkdir: argparse.Namespace(x=mkdir), r"object of class posix\.mkdir"),
        (lambda mkdir: np.array([mkdir], dtype=object), r"object of class (posix\.mkdir|numpy dtype 'O8')"),
        (lambda mkdir: np.array([1], dtype=object), r"object of class numpy dtype 'O8'"),
        (lambda mkdir: np.array([(1, 2)], dtype="i4,i4"), r"object of class numpy dtype 'V8'"),
        (lambda mkdir: np.datetime64(1, "s"), r"object of class numpy dtype 'M8'"),
        (lambda mkdir: scalar(np.dtype("f8"), mkdir), r"object of class posix\.mkdir"),
        (lambda mkdir: scalar(np.dtype("f8"), b"short"), "a readable torch checkpoint"),
        (lambda mkdir: scalar(np.dtype("f8"), [1]), "a readable torch checkpoint"),
        (lambda mkdir: scalar("f8", bytes(8)), "a readable torch checkpoint"),
        (lambda mkdir: array_of(1, (1 << 40,), np.dtype("f8"), False, bytes(8)), "a readable torch checkpoint"),
        (lambda mkdir: array_of(1, (2,), np.dtype("f8"), False, [1.0, 2.0]), "a readable torch checkpoint"),
        (lambda mkdir: Call(np.load, "weights.npy"), r"object of class numpy"),
        (lambda mkdir: Call(bytes, 1 << 50), "a readable torch checkpoint"),
        (lambda mkdir: Call(np.dtype, mkdir), r"object of class posix\.mkdir"),
        (lambda mkdir: Path("x"), r"object of class pathlib"),
    ],
)
@pytest.mark.parametrize("zip_format", [True, False])
def test_nothing_in_a_checkpoint_is_executed(make, forge, message, zip_format):
    made = make.folder / "executed"
    path, _, _ = make(
        edit=lambda content: content.update(task_state=forge(Call(os.mkdir, str(made)))), zip_format=zip_format
    )
    with pytest.raises(ValueError, match=message):
        run_import(path, make)
    assert not made.exists() and not (make.folder / "run").exists()


@pytest.mark.parametrize("content", [b"", b"\x80\x04N.", b"PK\x03\x04 cut short", b"<html>not found</html>", None])
def test_files_that_are_no_checkpoints(make, content):
    path, _, _ = make()
    path.write_bytes(path.read_bytes()[:-3000] if content is None else content)
    with pytest.raises(ValueError, match=r"a readable torch checkpoint .*Is it complete|a fairseq checkpoint"):
        run_import(path, make)


# -- the script ------------------------------------------------------------------------------------------------


def script(*arguments):
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPT))["main"](arguments)
    return end.value.code


def test_the_script_imports(make, capsys):
    path, _, _ = make()
    folder = make.folder / "a = run [1]"
    settings = [f"checkpoint={path}", f"dictionary={make.dictionary}", f"output_dir={folder}"]
    assert script(*settings, "position=alibi") == 0
    out, err = capsys.readouterr()
    assert str(folder) in out and err == ""
    assert load_run(folder).num_parameters() > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "error: dictionary = b: there is no such file. Give the dict.txt of the checkpoint's data.\n"),
        ({"position": "rotary"}, "error: position = 'rotary'. Allowed: alibi, sinusoidal."),
        ({"position": None}, "error: missing: position=..."),
        ({"positions": "x"}, "error: 'positions=x' is not a setting here."),
        ({"overwrite": "maybe"}, "error: overwrite = maybe. Use true or false."),
        ({"checkpoint": ""}, "error: checkpoint is empty."),
    ],
)
def test_mistakes_end_in_words(changes, message, make, capsys):
    settings = {"checkpoint": "a", "dictionary": "b", "position": "alibi", "output_dir": f"{make.folder}/run"}
    arguments = [f"{name}={value}" for name, value in (settings | changes).items() if value is not None]
    assert script(*arguments) == 1
    assert message in capsys.readouterr().err
    assert not (make.folder / "run").exists()
