"""Bad input of every kind ends in a message that names the setting or file, and changes no existing file.

Most of the table runs in this process through the functions behind the scripts; a few go through the shell.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hydra.errors import HydraException
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alibi_lm.checkpoint import record_hash
from alibi_lm.config import from_dict, load_config
from alibi_lm.data.corpus import open_corpus
from alibi_lm.data.prepare import prepare
from alibi_lm.data.tokenizers import Tokenizer
from alibi_lm.evaluate.config import EvaluateConfig, EvaluateData
from alibi_lm.evaluate.sweep import evaluate
from alibi_lm.experiment import compose, run_folder
from alibi_lm.files import fingerprint
from alibi_lm.interop.fairseq import ImportConfig, import_fairseq
from alibi_lm.results.rows import read_rows
from alibi_lm.runs import run_lock
from alibi_lm.settings import describe_error
from alibi_lm.tracking import JsonlConfig
from alibi_lm.train import train

ROOT = Path(__file__).resolve().parent.parent
TINY = [
    "experiment=smoke", "data=wikitext2", "tokenizer=word", "tracking=jsonl", "device=cpu", "threads=1",
    "train_length=8", "steps=2", "tokens_per_step=32", "model.model_dim=16", "model.ffn_dim=16",
    "validate_every=2", "log_every=1", "checkpoint_every=1", "schedule.warmup_steps=1",
]  # fmt: skip
EXPECTED = (ValueError, HydraException, OSError, RuntimeError)
"""What the scripts turn into a message; anything else would be a traceback."""


@dataclass
class Place:
    """A folder of one test: `text`, `cache` and a finished run `run`, all its own copies."""

    folder: Path

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def train(self, *overrides: str) -> None:
        """Train as scripts/train.py does; the run folder is `run` unless an override says otherwise."""
        where = [f"data.path={self / 'text'}", f"data.cache_dir={self / 'cache'}", f"output_dir={self / 'run'}"]
        config = compose([*TINY, *where, *overrides])
        train(config, run_folder(config))

    def evaluate(self, **changes: Any) -> None:
        """Evaluate as scripts/evaluate.py does."""
        given = dict(runs=str(self / "run"), lengths=[8], device="cpu", threads=1, output_dir=str(self / "out"))
        for _ in evaluate(EvaluateConfig(**given | changes, tracking=JsonlConfig())):
            pass

    def streams(self) -> Path:
        """The folder of the run's prepared streams."""
        return next((self / "cache").glob("*/tokens-*"))

    def stamps(self) -> dict[str, tuple[int, int]]:
        """Time and size of everything that lies there."""
        found = {str(p): p.lstat() for p in self.folder.rglob("*")}
        return {name: (stat.st_mtime_ns, stat.st_size) for name, stat in found.items()}

    def contents(self) -> dict[str, str]:
        """Digest by name of every file; locks and marks of failure do not count."""
        return {
            str(p.relative_to(self.folder)): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(self.folder.rglob("*"))
            if p.is_file() and p.name not in (".lock", "failed.json")
        }


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, write_text: Callable[[Path], Path]) -> Place:
    place = Place(tmp_path_factory.mktemp("bad") / "place")
    write_text(place / "text")
    place.train()
    return place


@pytest.fixture(scope="module")
def backup(original: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(original.folder, tmp_path_factory.mktemp("backup") / "place"))


@pytest.fixture
def place(original: Place, backup: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """The same place for every test, and afterwards as it was before."""
    monkeypatch.chdir(original.folder)
    before = original.stamps()
    yield original
    if original.stamps() != before:
        os.chdir("/")
        shutil.rmtree(original.folder)
        shutil.copytree(backup, original.folder)


def refused(place: Place, action: Callable[[], object], *words: str) -> str:
    """The message of an action that must fail, quickly, naming `words`, leaving all files as they were."""
    before, started = place.contents(), time.monotonic()
    with pytest.raises(EXPECTED) as caught:
        action()
    assert time.monotonic() - started < 10
    message = describe_error(caught.value)
    assert message.startswith("error: ")
    for word in words:
        assert word in message, message
    assert len(message) > len(max(words, key=len)) + 10, f"says too little: {message}"
    after = place.contents()
    assert {name: after.get(name) for name in before} == before
    return message


# --- settings ------------------------------------------------------------------------------------

# The message repeats `name=value` as `name = value`; of several, joined by ";", the last.
NAMED = """
    train_length=0 train_length=-8 seed=-1 steps=0 tokens_per_step=0 batch_multiple=0 micro_batch_tokens=4
    micro_batch_tokens=-8 clip_norm=-1 clip_norm=nan log_every=0 validate_every=0 checkpoint_every=-1 keep_last=0
    keep_every=-1 runs_at_once=0 device=tpu precision=float16 threads=0 threads=-2 data.name=wikitext104
    model.num_layers=0 model.num_heads=0 model.num_heads=3 model.model_dim=-16 model.ffn_dim=0
    model.activation=tanh model.dropout=1 model.dropout=-0.1 model.attention_dropout=nan
    model.adaptive_cutoffs=[20,10] model.adaptive_cutoffs=[0] model.adaptive_cutoffs=[10];model.adaptive_factor=0.5
    model.initialisation=zeros position=rotary;position.theta=0
    position=rotary;position.scaling=linear;position.factor=-2 position=t5;position.num_buckets=1
    position=t5;position.max_distance=1 position=sinusoidal;position.variant=vaswani2 position.name=compass
    optimizer.lr=0 optimizer.lr=nan optimizer.lr=inf optimizer.betas=[0.9] optimizer.betas=[0.9,1.0]
    optimizer.eps=0 optimizer.weight_decay=-1 optimizer=nag;optimizer.momentum=1
    optimizer=nag;optimizer.weight_decay=-0.5
    schedule.warmup_steps=-1 schedule.min_lr_ratio=2 schedule=constant;schedule.warmup_steps=-1
    schedule=fairseq_cosine;schedule.warmup_init_lr=-1 schedule=fairseq_cosine;schedule.period_steps=0
    schedule=fairseq_cosine;schedule.t_mult=0.5 schedule=fairseq_cosine;schedule.shrink=0
    schedule=fairseq_cosine;schedule.min_lr=-1 tokenizer=bpe;tokenizer.vocab_size=100 tokenizer.pad_to_multiple=0
    tracking=wandb;tracking.mode=sometimes evaluation.lengths=[0] evaluation.mode=both evaluation.stride=4
    evaluation.split=train evaluation.tokens_per_forward=0 data=python_stdlib;data.path=text
    seed=9223372036854775808 seed=99999999999999999999 threads=100000 steps=2147483648
    tokens_per_step=99999999999;train_length=99999999999 checkpoint_every=1000000000000000000000
    model.num_layers=1000000000 schedule.warmup_steps=99999999999999999999
    tokenizer=bpe;tokenizer.vocab_size=1000000000 tokenizer=bpe1024;tokenizer.vocab_size=99999999999999999999
    evaluation.lengths=[8,10000000000] evaluation.tokens_per_forward=10000000000
    output_dir=/proc/alibi output_dir=new;data.cache_dir=/proc/alibi output_dir=new;data.path=nowhere
    output_dir=text/wiki.test.tokens output_dir=text/wiki.test.tokens/run
""".split()
# (overrides, what the message names)
SETTINGS = [(one, "") for one in NAMED] + [
    ("position=rope", "position"), ("position.slop=1", "slop"), ("+position.slop=1", "position.slop"),
    ("+surprise=1", "surprise"), ("+model.surprise=1", "model.surprise"), ("experiment=nosuch", "nosuch"),
    ("experiment=../../../etc/passwd", "passwd"), ("model=enormous", "enormous"), ("data=nosuch", "nosuch"),
    ("tokenizer=sentencepiece", "sentencepiece"), ("optimizer=sgd", "sgd"), ("schedule=steps", "schedule"),
    ("tracking=tensorboard", "tensorboard"), ("attention=flash", "flash"),
    ("train_length=eight", "train_length"), ("train_length=8.5", "train_length"),
    ("train_length=[8]", "train_length"), ("train_length=null", "train_length"),
    ("train_length=64", "tokens_per_step = 32"), ("batch_multiple=5", "tokens_per_step = 32"),
    ("seed=one", "seed"), ("steps=1e9", "steps"), ("compile=maybe", "compile"), ("overwrite=perhaps", "overwrite"),
    ("model.adaptive_cutoffs=[10];model.tied=false", "model.tied"),
    ("position=rotary;position.scaling=magic", "magic"),
    ("position=learned;position.random_offset=true", "position.rows=<longest test length>"),
    # Settings that the other settings leave without effect.
    ("position=rotary;position.factor=2", "position.factor = 2.0 with position.scaling = none"),
    ("position=alibi;position.factor=2", "position.factor = 2.0 with position.scaling = none"),
    ("position=rotary;position.scaling=ntk;position.ramp=turns", "ramp = turns with position.scaling = ntk"),
    ("position=fox;position.longest=9", "position.longest = 9.0 with position.gates = input"),
    ("position=fox;position.gates=fixed;position.start_bias=5", "start_bias = 5.0 with position.gates = fixed"),
    ("position=rotary;position.frequency_share=0.01;output_dir=new", "keeps none of"),
    (
        "position=learned;position.rows=30;position.random_offset=true;training_positions=randomised;"
        "training_positions.num_positions=30;output_dir=new",
        "training_positions = randomised with position = learned",
    ),
    ("tracking=wandb;tracking.project='a/b'", "tracking.project"),
    # An entry of a group is chosen by its name, not renamed.
    ("position.name=rotary", "Use position=rotary"), ("attention.name=eager", "Use attention=eager"),
    ("tokenizer.name=bpe", "Use tokenizer=bpe"), ("optimizer.name=nag", "Use optimizer=nag"),
    ("schedule.name=constant", "Use schedule=constant"), ("tracking.name=wandb", "Use tracking=wandb"),
    # Empty on purpose.
    ("experiment=", "experiment"), ("output_dir=", "output_dir"), ("output_dir=''", "output_dir is empty"),
    ("data.path=", "data.path"), ("data.path=' '", "data.path is empty"), ("device=", "device"),
    ("data.cache_dir=''", "data.cache_dir is empty"), ("tracking=wandb;tracking.group=''", "tracking.group"),
    ("evaluation.lengths=64", "lengths"),
    ("evaluation.mode=sliding;evaluation.stride=64;evaluation.lengths=[8]", "stride = 64"),
    # Settings whose limits depend on each other, on the text or on the machine: refused when training begins.
    ("train_length=1000000;tokens_per_step=1000000;output_dir=new", "train_length = 1000000"),
    ("model.model_dim=6;model.num_heads=2;position=rotary;output_dir=new", "head"),
    ("model.model_dim=5;model.num_heads=1;position=sinusoidal;output_dir=new", "model.model_dim = 5"),
    ("model.adaptive_cutoffs=[1000];output_dir=new", "adaptive_cutoffs"),
    ("model.adaptive_cutoffs=[8];model.adaptive_factor=64;output_dir=new", "adaptive_factor"),
    ("model.model_dim=1000000000;output_dir=new", "memory"),
    ("train_length=9", "train_length"),  # the folder holds a run with another
    ("output_dir=text", "holds files but no run"), ("output_dir=text;overwrite=true", "holds files but no run"),
    ("data.cache_dir=text/wiki.test.tokens;output_dir=new", "data.cache_dir = "),
    ("data.path=text/wiki.test.tokens;output_dir=new", "is a file"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "word"), SETTINGS, ids=[s[0] for s in SETTINGS])
def test_a_bad_setting_is_refused(place: Place, overrides: str, word: str) -> None:
    message = refused(place, lambda: place.train(*overrides.split(";")), word)
    if not word:
        name, _, value = overrides.split(";")[-1].partition("=")
        number = value.replace(",", ", ").strip("[]")
        given = {f"{name} = {value}", f"{name} = {value!r}", f"{name} = [{number}]", f"{name} = {value}.0"}
        short = {one.removeprefix("evaluation.") for one in given}  # settings of evaluate.py by the same name
        assert any(one in message for one in given | short), message


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("attention=flex", ["attention=flex", "on a CPU", "Use attention=sdpa"]),
        ("attention=flex;model.attention_dropout=0.1", ["attention=flex", "model.attention_dropout = 0.1"]),
        ("attention=native;position=cope", ["attention=native cannot run position=cope", "Use attention=eager"]),
    ],
)
def test_what_a_backend_cannot_train_is_refused_before_any_file_is_written(
    place: Place, overrides: str, words: list[str]
) -> None:
    refused(place, lambda: place.train(*overrides.split(";"), "output_dir=new", "data.cache_dir=other"), *words)
    assert not (place / "new").exists() and not (place / "other").exists()


def test_a_missing_device_is_refused(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(place, lambda: place.train("device=cuda", "output_dir=new"), "device = cuda")


EVALUATIONS: list[tuple[dict[str, Any], str]] = [
    ({"runs": "nowhere"}, "runs = nowhere"), ({"runs": "nowhere/*"}, "runs = nowhere/*"),
    ({"runs": "text"}, "text"), ({"runs": None, "experiment": "nosuch"}, "outputs/nosuch/runs"),
    ({"runs": ""}, "runs"),
    ({"lengths": []}, "lengths"), ({"lengths": [0]}, "lengths = [0]"), ({"lengths": [8, -8]}, "lengths = [8, -8]"),
    ({"mode": "both"}, "mode = 'both'"), ({"mode": "sliding"}, "stride"),
    ({"mode": "sliding", "stride": 9}, "stride = 9"), ({"mode": "sliding", "stride": 0}, "stride = 0"),
    ({"mode": "nonoverlapping", "stride": 4}, "stride = 4"), ({"split": "train"}, "split = 'train'"),
    ({"tokens_per_forward": -1}, "tokens_per_forward = -1"), ({"tokens_per_forward": 0}, "tokens_per_forward = 0"),
    ({"checkpoint": "first"}, "checkpoint = 'first'"), ({"attention": "flash"}, "attention = 'flash'"),
    ({"device": "tpu"}, "device = 'tpu'"), ({"precision": "half"}, "precision = 'half'"),
    ({"threads": 0}, "threads = 0"), ({"position": {"scaling": "yarn"}}, "scaling"),
    ({"data": EvaluateData(path="nowhere")}, "data.path = nowhere"),
    ({"data": EvaluateData(path="run")}, "wiki.valid.tokens"),
    ({"data": EvaluateData(cache_dir="/proc/alibi")}, "data.cache_dir = /proc/alibi"),
    ({"output_dir": "text/wiki.test.tokens"}, "output_dir = text/wiki.test.tokens"),
    ({"output_dir": "/proc/alibi"}, "output_dir = /proc/alibi"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "word"), EVALUATIONS, ids=[str(c) for c, _ in EVALUATIONS])
def test_a_bad_evaluation_is_refused(place: Place, changes: dict[str, Any], word: str) -> None:
    refused(place, lambda: place.evaluate(**changes), word)


# --- damage --------------------------------------------------------------------------------------

Damage = Callable[[Place], object]


class _Trap:
    """Leaves a file behind when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("trapped",)


def text(name: str, content: bytes | None) -> Damage:
    """Another text of a split, or none; its streams are to be prepared anew."""

    def damage(place: Place) -> None:
        shutil.rmtree(place / "cache")
        path = place / "text" / f"wiki.{name}.tokens"
        path.unlink() if content is None else path.write_bytes(content)

    return damage


def file(pattern: str, change: Callable[[bytes], bytes | None]) -> Damage:
    """Other bytes in the files of a pattern; None: no such file."""

    def damage(place: Place) -> None:
        for path in list(place.folder.glob(pattern)):
            content = change(path.read_bytes())
            path.unlink() if content is None else path.write_bytes(content)

    return damage


def entries(pattern: str, change: Callable[[dict[str, Any]], object]) -> Damage:
    """Other entries in a JSON or YAML file."""
    load, dump = (yaml.safe_load, yaml.safe_dump) if pattern.endswith("yaml") else (json.loads, json.dumps)

    def changed(content: bytes) -> bytes:
        settings = load(content)
        change(settings)
        return dump(settings).encode()

    return file(pattern, changed)


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    """Other tensors in every checkpoint, with digests that fit."""

    def damage(place: Place) -> None:
        from safetensors.torch import load_file, save_file

        for folder in (place / "run" / "checkpoints").glob("step-*"):
            path = folder / "weights.safetensors"
            tensors = load_file(path)
            change(tensors)
            save_file(tensors, path)
            record = json.loads((folder / "state.json").read_text())
            del record["sha256"]
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            record["files"][path.name] = {"bytes": path.stat().st_size, "sha256": digest}
            (folder / "state.json").write_text(json.dumps(record | {"sha256": record_hash(record)}))

    return damage


def first(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return next(t for t in tensors.values() if t.dim() == 2)


def other_kind(name: str) -> Damage:
    """A folder where there should be a file, or the other way round."""

    def damage(place: Place) -> None:
        path = place / name
        if path.is_dir():
            shutil.rmtree(path)
            path.write_text("")
        else:
            path.unlink()
            path.mkdir()

    return damage


def flip(content: bytes) -> bytes:
    return content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]


def other_tokenizer(place: Place) -> None:
    """Streams of another vocabulary in the place of the run's."""
    own = place.streams()
    where = [f"data.path={place / 'text'}", "data.cache_dir=other"]
    config = compose([*TINY, "tokenizer.pad_to_multiple=64", *where])
    other = prepare(config.data, config.tokenizer)
    shutil.rmtree(own)
    shutil.copytree(other.folder, own)


def pickled_array(place: Place) -> None:
    """Document starts that run code when they are unpickled, with a fingerprint that fits."""
    path = place.streams() / "train.documents.npy"
    np.save(path, np.array([_Trap()], dtype=object), allow_pickle=True)
    entries(MANIFEST, lambda m: m["splits"]["train"].update(documents_fingerprint=fingerprint(path)))(place)


def more_words(tokenizer: dict[str, Any]) -> None:
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary.update({f"new{i}": len(vocabulary) + i for i in range(8)})


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


MANIFEST, SOURCE = "cache/*/tokens-*/manifest.json", "cache/*/source.json"
TRAIN, VALIDATION = "cache/*/tokens-*/train.bin", "cache/*/tokens-*/validation.bin"
CONFIG, TOKENIZER, BEST = "run/config.yaml", "run/tokenizer.json", "run/checkpoints/best.json"
WEIGHTS, STATE = "run/checkpoints/step-*/weights.safetensors", "run/checkpoints/step-*/state.json"
PICKLE = pickle.dumps(_Trap())
PYTHON_OBJECT = b"experiment: !!python/object/apply:os.mkdir [trapped]\n"

# What is damaged, how, and what the message names. tests/data and test_checkpoint.py damage files in more ways.
DATA: dict[str, tuple[Damage, str]] = {
    "no training text": (text("train", None), "wiki.train.tokens"),
    "no validation text": (text("valid", None), "wiki.valid.tokens"),
    "empty training text": (text("train", b""), "wiki.train.tokens is empty"),
    "training text without words": (text("train", b" \n\n \n"), "no words"),
    "training text of five tokens": (text("train", b"a b c d"), "train_length = 8"),
    "invalid UTF-8": (text("train", b"a b c\nd \xff\xfe e\n"), "line 2 is not UTF-8"),
    "text changed after preparation": (file("text/wiki.valid.tokens", lambda b: b"new words\n"), "changed"),
    "token file of odd size": (file(TRAIN, lambda b: b[:-1]), "train.bin"),
    "pickled document starts": (pickled_array, "train.documents.npy"),
    "manifest is a list": (file(MANIFEST, lambda b: b"[1, 2]"), "manifest.json"),
    "manifest not UTF-8": (file(MANIFEST, lambda b: b"\xff\xfe{}"), "manifest.json"),
    "manifest nested too deep": (file(MANIFEST, lambda b: b"[" * 200000), "manifest.json"),
    "manifest without splits": (entries(MANIFEST, lambda m: m.pop("splits")), "manifest.json"),
    "manifest without a count": (entries(MANIFEST, lambda m: m["splits"]["train"].pop("tokens")), "manifest.json"),
    "a word for a count": (
        entries(MANIFEST, lambda m: m["splits"]["train"].update(tokens="many")),
        "manifest.json",
    ),
    "an object dtype": (entries(MANIFEST, lambda m: m["splits"]["train"].update(dtype="O")), "manifest.json"),
    "source.json without tokenizers": (entries(SOURCE, lambda m: m.pop("tokenizers")), "source.json"),
    "streams of another tokenizer": (other_tokenizer, "another tokenizer"),
}
CONFIGS: dict[str, tuple[Damage, str]] = {
    "empty config": (file(CONFIG, lambda b: b""), "config.yaml"),
    "config is a list": (file(CONFIG, lambda b: b"- 1\n- 2\n"), "config.yaml"),
    "config is a word": (file(CONFIG, lambda b: b"hello"), "config.yaml"),
    "config is no YAML": (file(CONFIG, lambda b: b"a: [1,\nb: }"), "config.yaml"),
    "config is binary": (file(CONFIG, lambda b: bytes(range(256))), "config.yaml"),
    "config with a Python object": (file(CONFIG, lambda b: b + PYTHON_OBJECT), "config.yaml"),
    "an interpolation": (entries(CONFIG, lambda c: c.update(experiment="${oc.env:HOME}")), "config.yaml"),
    "an endless interpolation": (entries(CONFIG, lambda c: c.update(experiment="${experiment}")), "config.yaml"),
    "unknown setting": (entries(CONFIG, lambda c: c.update(colour="red")), "colour"),
    "unknown nested setting": (entries(CONFIG, lambda c: c["model"].update(colour="red")), "colour"),
    "no position": (entries(CONFIG, lambda c: c.pop("position")), "position"),
    "unknown position": (entries(CONFIG, lambda c: c["position"].update(name="compass")), "compass"),
    "position is a word": (entries(CONFIG, lambda c: c.update(position="alibi")), "position"),
    "heads that do not divide": (entries(CONFIG, lambda c: c["model"].update(num_heads=3)), "num_heads = 3"),
    "a word for a size": (entries(CONFIG, lambda c: c["model"].update(model_dim="wide")), "model_dim"),
    "a size of null": (entries(CONFIG, lambda c: c["model"].update(model_dim=None)), "model_dim"),
    "negative length": (entries(CONFIG, lambda c: c.update(train_length=-8)), "train_length = -8"),
    "model is a list": (entries(CONFIG, lambda c: c.update(model=[1])), "model"),
    "keys that are no words": (entries(CONFIG, lambda c: c.update({1: 2})), "config.yaml"),
}
RUNS: dict[str, tuple[Damage, str]] = {
    # The weights are whole, so the message names the file that is not as it was in training.
    "another width": (
        entries(CONFIG, lambda c: c["model"].update(model_dim=32)),
        "a setting in config.yaml was changed",
    ),
    "another depth": (
        entries(CONFIG, lambda c: c["model"].update(num_layers=2)),
        "a setting in config.yaml was changed",
    ),
    "no checkpoints": (lambda p: shutil.rmtree(p / "run/checkpoints"), "checkpoint"),
    "checkpoints is a file": (other_kind("run/checkpoints"), "checkpoint"),
    "weights altered": (file(WEIGHTS, flip), "checkpoint"),
    "a pickle as weights": (file(WEIGHTS, lambda b: PICKLE), "checkpoint"),
    "best.json cut short": (file(BEST, lambda b: b[:5]), "checkpoint = best"),
    "best.json names a place": (file(BEST, lambda b: b'{"step": "../../../text"}'), "checkpoint = best"),
    "best.json names no step": (file(BEST, lambda b: b'{"step": 99}'), "checkpoint = best"),
    "weights that are NaN": (weights(lambda t: first(t).fill_(float("nan"))), "NaN or infinite"),
    "one infinite weight": (weights(lambda t: first(t).view(-1)[:1].fill_(float("inf"))), "NaN or infinite"),
    "a missing weight": (weights(lambda t: t.pop(sorted(t)[0])), "does not fit"),
    "a foreign weight": (weights(lambda t: t.update(wpe=torch.zeros(2))), "does not fit"),
    "weights of another shape": (
        weights(lambda t: t.update({name: tensor[..., :-1].contiguous() for name, tensor in t.items()})),
        "does not fit",
    ),
}
EVALUATED: dict[str, tuple[Damage, str]] = {
    "no config": (file(CONFIG, lambda b: None), "config.yaml"),
    "config is a folder": (other_kind(CONFIG), "config.yaml"),
    "no tokenizer": (file(TOKENIZER, lambda b: None), "tokenizer.json"),
    "empty tokenizer": (file(TOKENIZER, lambda b: b""), "tokenizer.json"),
    "tokenizer is a pickle": (file(TOKENIZER, lambda b: PICKLE), "tokenizer.json"),
    "more words than the model knows": (entries(TOKENIZER, more_words), "tokenizer.json"),
}
ACTIONS: dict[str, Callable[[Place], object]] = {
    "train": lambda place: place.train("output_dir=new"),
    "train again": lambda place: place.train(),
    "evaluate": lambda place: place.evaluate(),
}
TABLES = {
    "train": DATA,
    "train again": {name: CONFIGS[name] for name in ("config with a Python object", "unknown setting")},
    "evaluate": CONFIGS | RUNS | EVALUATED,
}
CASES = [
    pytest.param(*case, action, id=f"{action}: {name}")
    for action, table in TABLES.items()
    for name, case in table.items()
]


@pytest.mark.parametrize(("damage", "word", "action"), CASES)
def test_damage_is_refused(place: Place, damage: Damage, word: str, action: str) -> None:
    damage(place)
    refused(place, lambda: ACTIONS[action](place), word)
    assert not (place / "trapped").exists()


def test_nan_weights_and_metrics_that_are_no_rows_are_not_trained_on(place: Place) -> None:
    (place / "run" / "finished.json").unlink()
    metrics = (place / "run" / "metrics.jsonl").read_text()
    (place / "run" / "metrics.jsonl").write_text("not a row\n" + metrics)
    refused(place, place.train, "metrics.jsonl, line 1")
    weights(lambda t: first(t).fill_(float("nan")))(place)
    refused(place, lambda: place.train("steps=3", "keep_last=1"), "steps: 2 there, 3 now", "another output_dir")
    refused(place, place.train, "NaN or infinite", "Delete that folder to resume from an earlier checkpoint")


def test_a_bad_folder_among_good_ones_stops_none(place: Place) -> None:
    """It is named at the end; the others have their rows."""
    shutil.copytree(place / "run", place / "run2")
    (place / "run2" / "config.yaml").write_text("colour: red\n")
    refused(place, lambda: place.evaluate(runs=str(place / "run*")), "run2", "colour")
    assert {row.run for row in read_rows(place / "out" / "results.jsonl")} == {None, "run"}


@pytest.mark.parametrize("content", [b"not a row\n", b"[]\n", b'{"run": "a"}\n', b"\xff\n"])
def test_result_rows_that_are_none_are_kept(place: Place, content: bytes) -> None:
    (place / "out").mkdir()
    (place / "out" / "results.jsonl").write_bytes(content)
    refused(place, place.evaluate, "results.jsonl")
    refused(place, lambda: read_rows(place / "out" / "results.jsonl"), "results.jsonl")


def test_a_run_in_use_is_refused(place: Place) -> None:
    with run_lock(place / "run"):
        refused(place, place.train, "output_dir = ", "in use")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"hello", PICKLE])
def test_a_foreign_checkpoint_is_not_imported(place: Place, content: bytes) -> None:
    (place / "model.pt").write_bytes(content)
    (place / "dict.txt").write_text("a 1\nb 1\n")
    config = ImportConfig(
        checkpoint=str(place / "model.pt"), dictionary=str(place / "dict.txt"), position="alibi",
        output_dir=str(place / "imported"),
    )  # fmt: skip
    refused(place, lambda: import_fairseq(config), "model.pt")
    assert not (place / "trapped").exists() and not (place / "imported").exists()


# --- the command line ----------------------------------------------------------------------------

COMMANDS: list[tuple[str, list[str], list[str]]] = [
    ("train.py", ["model.num_heads=3"], ["model.num_heads = 3", "does not divide"]),
    ("train.py", ["seed"], ["seed", "name=value"]),
    ("train.py", ["--nonsense"], ["--nonsense"]),
    ("train.py", ["position=rope"], ["rope", "alibi", "rotary"]),
    ("train.py", ["stesp=5"], ["stesp: TrainConfig has no such setting. Did you mean steps?"]),
    ("train.py", ["position.slopes=2"], ["position.slopes: AlibiConfig has no such setting", "learned_slopes"]),
    # What Hydra's grammar does not have in a plain value is taken as it is.
    ("train.py", ["experiment=smoke", "data=text", "data.path=/a=b"], ["data.path = /a=b"]),
    ("train.py", ["experiment=smoke", "data=text", "data.path=/B\u00fccher #1"], ["data.path = /B\u00fccher #1"]),
    ("train.py", ["position\uff1drotary"], ["name=value"]),  # a full-width sign
    ("evaluate.py", ["runs=~/x"], ["runs = ~/x matches no folder"]),
    ("evaluate.py", ["runs=exp[12]/it's/*"], ["runs = exp[12]/it's/* matches no folder"]),
    # Where it bites, the message shows the quoting.
    ("evaluate.py", ["runs=[12]/runs/*"], ["""'runs="[12]/runs/*"'"""]),
    ("evaluate.py", ["runs=run", "lengths=[8"], ["'lengths=[8' is not understood"]),
    ("evaluate.py", ["runs=run", "lengths=[8,x]"], ["lengths"]),
    ("evaluate.py", ["runs=", "lengths=[8]"], ["runs is empty"]),
    ("evaluate.py", ["runs=run", "lengths=[8]", "+position.name=t5"], ["position.name = t5"]),
    ("analyse.py", ["runs=run", "contexts=[]", "view=fixed"], ["contexts"]),
    ("analyse.py", ["runs=run", "view=sideways"], ["view = 'sideways'", "decomposition"]),
    ("reproduce.py", ["experiment=smoke", "steps=0"], ["steps = 0"]),
    ("study.py", ["experiment=smoke", "measurements=['evaluate split=tset']"], ["split = 'tset'"]),
    ("sweep_status.py", ["experiment=smoke", "stesp=1"], ["stesp"]),
]


@pytest.fixture(scope="module")
def loaded(command: Callable[..., Any]) -> Callable[..., Any]:
    """`command`, after the first one, which waits until all modules are loaded."""
    command(ROOT, "claims.py", "--help")
    return command


@pytest.mark.parametrize(("script", "arguments", "words"), COMMANDS, ids=[" ".join(c[1]) for c in COMMANDS])
def test_a_bad_command_ends_with_a_message(
    place: Place, loaded: Callable[..., Any], script: str, arguments: list[str], words: list[str]
) -> None:
    before = place.contents()
    started = time.monotonic()
    done = loaded(place.folder, script, *arguments)
    assert time.monotonic() - started < 10
    assert done.returncode != 0
    assert "Traceback" not in done.stderr + done.stdout
    for word in words:
        assert word in done.stderr, done.stderr
    assert place.contents() == before


def test_a_tab_in_a_yaml_file_is_found(place: Place, command: Callable[..., Any]) -> None:
    (place / "position").mkdir()
    (place / "position" / "mine.yaml").write_text("defaults: [rotary, _self_]\nscaling:\n\tyarn\n")
    done = command(place.folder, "train.py", "--config-dir", str(place.folder), "position=mine")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "mine.yaml" in done.stderr and "line 3" in done.stderr and "tabs" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_neither_a_poor_terminal_nor_a_full_disk_below_the_output_ends_a_run(place: Place) -> None:
    where = [f"data.path={place / 'text'}", f"data.cache_dir={place / 'cache'}", "output_dir='L\u00e4ufe'"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, str(ROOT / "scripts" / "train.py"), *TINY, *where],
            stdout=full, stderr=subprocess.PIPE, text=True, cwd=place.folder,
            env=os.environ | {"PYTHONIOENCODING": "ascii"},
        )  # fmt: skip
    assert done.returncode == 0 and (place / "L\u00e4ufe" / "finished.json").exists()
    assert "Traceback" not in done.stderr and "No space left" in done.stderr


# --- any content ---------------------------------------------------------------------------------

FUZZ = settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    derandomize=True,
    database=None,
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_subnormal=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def _paths(content: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in nested dictionaries, the inner ones too."""
    if not isinstance(content, dict):
        return []
    return [path for k, v in content.items() for path in [(*prefix, k), *_paths(v, (*prefix, k))]]


def _put(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy with another value in one place."""
    return {
        k: (_put(v, path[1:], value) if path[1:] else value) if k == path[0] else v for k, v in content.items()
    }


@FUZZ
@given(data=st.data())
def test_any_value_in_a_config_is_taken_or_refused(original: Place, data: st.DataObject) -> None:
    content = yaml.safe_load((original / "run" / "config.yaml").read_text())
    path = data.draw(st.sampled_from(_paths(content)))
    try:
        config = from_dict(_put(content, path, data.draw(VALUES)))
    except ValueError as error:
        assert str(error)
    else:
        assert config.train_length >= 1


@FUZZ
@given(data=st.data())
def test_any_value_in_a_manifest_is_taken_or_refused(original: Place, tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "streams"
    if not folder.exists():
        shutil.copytree(original.streams(), folder)
    content = json.loads((original.streams() / "manifest.json").read_text())
    path = data.draw(st.sampled_from(_paths(content)))
    (folder / "manifest.json").write_text(json.dumps(_put(content, path, data.draw(VALUES))))
    try:
        open_corpus(folder, ("train", "validation"))
    except ValueError as error:
        assert str(folder) in str(error)


@FUZZ
@given(content=st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_bytes_in_a_file_are_refused(tmp_path: Path, content: bytes) -> None:
    readers: dict[str, Callable[[Path], object]] = {
        "config.yaml": lambda path: load_config(path.parent),
        "manifest.json": lambda path: open_corpus(path.parent, ("train",)),
        "tokenizer.json": Tokenizer.load,
    }
    for name, reader in readers.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name.replace(".", r"\.")):
            reader(tmp_path / name)
