from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from alibi_lm.data import encode, preparation, storage
from alibi_lm.data.corpus import Corpus, open_prepared, prepare, report, verify
from alibi_lm.data.sources import DataConfig
from alibi_lm.data.tokenizers import BPEConfig, Tokenizer, TokenizerConfig, WordConfig

from .conftest import TEST, TRAIN, VALIDATION

TEXTS = {"train": TRAIN, "validation": VALIDATION, "test": TEST}
KINDS: dict[str, TokenizerConfig] = {"word": WordConfig(), "bpe": BPEConfig(vocab_size=300)}


def times(folder: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


@pytest.mark.parametrize("kind", KINDS)
def test_streams_hold_the_text_and_its_counts(kind: str, config: DataConfig):
    corpus = prepare(config, KINDS[kind])
    assert list(corpus.manifest["splits"]) == ["train", "validation", "test"]
    for split, text in TEXTS.items():
        stream = corpus.split(split)
        assert stream.tokens.dtype == np.uint16 and stream.num_tokens == len(stream.tokens)
        assert stream.words == len(text.split()) + text.count("\n")
        assert stream.bytes == len(text.encode())
        assert stream.documents[0] == 0 and stream.documents.dtype == np.int64
        decoded = corpus.tokenizer.decode(stream.tokens)
        if kind == "word":
            assert stream.num_tokens == stream.words
            assert split != "train" or decoded.split() == text.split()
            assert decoded.count("\n") == text.count("\n")
        else:
            assert decoded == text
    verify(corpus)


def test_documents_are_the_articles(config: DataConfig):
    word = prepare(config, WordConfig()).split("train")
    title = prepare(config, WordConfig()).tokenizer.encode_lines(["= Second ="])[:-1]
    assert len(word.documents) == 2
    assert word.tokens[word.documents[1] :][:3].tolist() == title.tolist()
    corpus = prepare(config, BPEConfig(vocab_size=300))
    bpe = corpus.split("train")
    assert np.flatnonzero(bpe.tokens == 0).tolist() == [bpe.documents[1] - 1, bpe.num_tokens - 1]
    assert corpus.tokenizer.decode(bpe.tokens[bpe.documents[1] :]).startswith(" = Second = \n")


def test_the_second_time_nothing_is_written_or_read_again(config: DataConfig, monkeypatch: pytest.MonkeyPatch):
    first = prepare(config, WordConfig())
    before = times(Path(config.cache_dir))
    monkeypatch.setattr(encode, "encode_split", None)
    monkeypatch.setattr(encode, "training_lines", None)
    second = prepare(config, WordConfig())
    assert times(Path(config.cache_dir)) == before
    assert (second.hash, second.manifest) == (first.hash, first.manifest)


def test_hashes_stand_for_text_and_tokenizer(config: DataConfig, tmp_path: Path):
    word = prepare(config, WordConfig())
    bpe = prepare(config, BPEConfig(vocab_size=300))
    assert len({word.hash, bpe.hash, *(s.hash for s in word.streams.values())}) == 5
    # Elsewhere, from another cache, or with only one split open: the same text has the same hash.
    shutil.copytree(config.path or "", tmp_path / "copy")
    moved = DataConfig("wikitext103", str(tmp_path / "copy"), str(tmp_path / "cache2"))
    alone = prepare(moved, word.tokenizer, ("validation",))
    assert (alone.hash, alone.split("validation").hash) == (word.hash, word.split("validation").hash)
    (tmp_path / "copy" / "wiki.valid.tokens").write_text(" the mat \n")
    shutil.rmtree(tmp_path / "cache2")
    other = prepare(moved, word.tokenizer, ("validation",))
    assert other.hash != word.hash and other.split("validation").hash != word.split("validation").hash


def test_tokenizers_never_share_streams(config: DataConfig):
    folders = {prepare(config, t).folder for t in (WordConfig(), WordConfig(pad_to_multiple=1), *KINDS.values())}
    assert len(folders) == 3
    own = prepare(config, WordConfig())
    assert prepare(config, own.tokenizer).folder == own.folder, "a run's own tokenizer finds its streams"
    with pytest.raises(ValueError, match="was encoded with another tokenizer"):
        open_prepared(own.folder, ["train"], prepare(config, BPEConfig(vocab_size=300)).tokenizer)


def test_a_foreign_dictionary_needs_only_the_evaluated_split(config: DataConfig, tmp_path: Path):
    folder = Path(config.path or "")
    (folder / "wiki.train.tokens").unlink()
    (folder / "wiki.test.tokens").unlink()
    (tmp_path / "dict.txt").write_text("the 9\ndog 2\n")
    corpus = prepare(config, Tokenizer.from_fairseq_dictionary(tmp_path / "dict.txt"), ("validation",))
    assert corpus.split("validation").tokens.tolist() == [2, 3, 3, 3, 3, 2, 2, 4, 3, 3, 3, 4, 5, 2, 2]
    assert corpus.manifest["splits"]["validation"]["unknown"] == 7
    with pytest.raises(ValueError, match=r"split = 'train' is not open here\. Allowed: validation"):
        corpus.split("train")
    with pytest.raises(ValueError, match="built from the training text"):
        prepare(config, WordConfig(), ("validation",))


def test_splits_may_be_added_later(config: DataConfig):
    prepare(config, WordConfig(), ("validation",))
    before = prepare(config, WordConfig(), ("validation",)).hash
    corpus = prepare(config, WordConfig(), ("test", "train"))
    assert sorted(corpus.streams) == ["test", "train"] and corpus.hash == before


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_changed_source_is_an_error(split: str, config: DataConfig):
    corpus = prepare(config, WordConfig())
    path = Path(config.path or "") / {"train": "wiki.train.tokens", "validation": "wiki.valid.tokens"}[split]
    content = path.read_bytes()
    os.utime(path)
    prepare(config, WordConfig())  # touched, not changed
    path.write_bytes(content.replace(b"the dog", b"the cow"))
    with pytest.raises(ValueError, match=f"{path.name} has changed since it was prepared. Delete .*wikitext103-"):
        prepare(config, WordConfig())
    path.unlink()
    assert prepare(config, WordConfig()).hash == corpus.hash, "prepared streams outlive their source"


def test_an_evaluation_text_that_changed_before_its_turn_is_noticed(config: DataConfig):
    prepare(config, WordConfig(), ("train",))
    (Path(config.path or "") / "wiki.valid.tokens").write_text(" other \n")
    with pytest.raises(ValueError, match="the validation text has changed since"):
        prepare(config, WordConfig())


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 2)


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
@pytest.mark.parametrize("name", ["train.bin", "train.documents.npy", "../word8.json"])
def test_damaged_files_are_errors_that_say_what_to_delete(
    name: str, damage: Callable[[Path], None], config: DataConfig
):
    corpus = prepare(config, WordConfig())
    damage(corpus.folder / name)
    with pytest.raises(ValueError, match=r"Delete .*wikitext103-\S+ to prepare it anew") as error:
        prepare(config, WordConfig())
    shutil.rmtree(str(error.value).split("Delete ")[1].split(" to prepare")[0])
    verify(prepare(config, WordConfig()))


@pytest.mark.parametrize("name", ["manifest.json", "../source.json"])
def test_a_damaged_manifest_is_an_error_and_a_missing_one_means_not_prepared(name: str, config: DataConfig):
    path = prepare(config, WordConfig()).folder / name
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ValueError, match=r"cannot be read .* Delete .* to prepare it anew"):
        prepare(config, WordConfig())
    path.write_text('{"format": 999}')
    with pytest.raises(ValueError, match="is not of format 1"):
        prepare(config, WordConfig())
    path.unlink()
    verify(prepare(config, WordConfig()))


def test_small_changes_in_large_files_are_for_verify(config: DataConfig, monkeypatch: pytest.MonkeyPatch):
    text = Path(config.path or "") / "wiki.train.tokens"
    text.write_text(TRAIN * 2000)
    monkeypatch.setattr(storage, "SAMPLES", 2)
    monkeypatch.setattr(storage, "SAMPLE_BYTES", 1000)
    corpus = prepare(config, WordConfig())
    verify(corpus)
    path = corpus.folder / "train.bin"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"train\.bin has changed since it was written"):
        verify(prepare(config, WordConfig()))


def interrupt_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Stop at the n-th file that would take its name."""
    real, count = os.replace, [0]

    def replace_or_stop(source: str, target: str) -> None:
        count[0] += 1
        if count[0] == number:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(storage.os, "replace", replace_or_stop)


def believed(config: DataConfig) -> list[str]:
    manifests = list(Path(config.cache_dir).glob("*/tokens-*/manifest.json"))
    return [split for path in manifests for split in json.loads(path.read_text())["splits"]]


def test_an_interruption_at_any_file_leaves_nothing_half_done(config: DataConfig, tmp_path: Path):
    whole = prepare(replace(config, cache_dir=str(tmp_path / "whole")), WordConfig())
    stopped = 0
    for number in range(1, 40):
        trial = replace(config, cache_dir=str(tmp_path / f"trial{number}"))
        with pytest.MonkeyPatch.context() as patch:
            interrupt_at(patch, number)
            try:
                prepare(trial, WordConfig())
                break
            except KeyboardInterrupt:
                stopped += 1
        for split in believed(trial):
            stream = open_prepared(next(Path(trial.cache_dir).glob("*/tokens-*")), [split]).split(split)
            assert np.array_equal(stream.tokens, whole.split(split).tokens)
        assert not list(Path(trial.cache_dir).rglob("*.tmp"))
        again = prepare(trial, WordConfig())
        verify(again)
        assert again.hash == whole.hash
    assert stopped >= 12


def test_a_killed_process_leaves_nothing_believed_and_nothing_behind(config: DataConfig):
    code = (
        "import sys, time\n"
        "from alibi_lm.data import encode, preparation\n"
        "from alibi_lm.data.corpus import prepare\n"
        "from alibi_lm.data.sources import DataConfig\n"
        "from alibi_lm.data.tokenizers import WordConfig, Tokenizer\n"
        "real = Tokenizer.encode_blocks\n"
        "def slow(self, blocks):\n"
        "    if len(blocks[0]) == 5:  # the validation text\n"
        "        print('encoding', flush=True)\n"
        "        time.sleep(60)\n"
        "    return real(self, blocks)\n"
        "Tokenizer.encode_blocks = slow\n"
        "prepare(DataConfig('wikitext103', sys.argv[1], sys.argv[2]), WordConfig())\n"
    )
    command = [sys.executable, "-c", code, config.path or "", config.cache_dir]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "encoding\n"
        process.send_signal(signal.SIGKILL)
        process.wait()
    cache = Path(config.cache_dir)
    assert believed(config) == ["train"] and list(cache.rglob("validation.bin.*.tmp"))
    verify(prepare(config, WordConfig()))
    assert believed(config) == ["train", "validation", "test"] and not list(cache.rglob("*.tmp"))


def test_two_processes_prepare_once(config: DataConfig):
    code = (
        "import sys, time\n"
        "from alibi_lm.data import preparation\n"
        "from alibi_lm.data.corpus import prepare\n"
        "from alibi_lm.data.sources import DataConfig\n"
        "from alibi_lm.data.tokenizers import WordConfig\n"
        "real, made = preparation.encode.encode_split, []\n"
        "def counted(source, split, *rest):\n"
        "    made.append(split)\n"
        "    time.sleep(0.3)\n"
        "    return real(source, split, *rest)\n"
        "preparation.encode.encode_split = counted\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "corpus = prepare(DataConfig('wikitext103', sys.argv[1], sys.argv[2]), WordConfig())\n"
        "print(len(made), corpus.hash)\n"
    )
    command = [sys.executable, "-c", code, config.path or "", config.cache_dir]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    running = [subprocess.Popen(command, **pipes) for _ in range(2)]
    assert all(process.stdout and process.stdout.readline() == "ready\n" for process in running)
    for process in running:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = [process.communicate()[0].split() for process in running]
    assert sum(int(count) for count, _ in outputs) == 3 and outputs[0][1] == outputs[1][1]


def test_a_folder_that_cannot_be_written_is_named(config: DataConfig, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"data\.cache_dir = .*/file"):
        prepare(replace(config, cache_dir=str(tmp_path / "file")), WordConfig())
    with pytest.raises(ValueError, match=r"split = 'valid'\. Allowed: train, validation, test"):
        prepare(config, WordConfig(), ("valid",))


def test_bad_text_stops_before_the_long_work(config: DataConfig, monkeypatch: pytest.MonkeyPatch):
    (Path(config.path or "") / "wiki.valid.tokens").write_bytes(b"\xff\n")
    monkeypatch.setattr(preparation.SourceFolder, "train", None)
    with pytest.raises(ValueError, match="line 1 is not UTF-8"):
        prepare(config, WordConfig())


def test_other_texts_are_named_in_manifest_and_report(config: DataConfig):
    corpus: Corpus = prepare(config, WordConfig())
    assert corpus.name == "WikiText-103 (not the original: train, validation, test)"
    identity = corpus.manifest["splits"]["train"]["identity"]
    assert (
        identity
        == f"not the original WikiText-103 training split ({corpus.split('train').words} words, not 103,227,021)"
    )
    text = report(corpus)
    for part in (identity, corpus.hash, corpus.tokenizer.hash, "2 documents", corpus.split("test").text_sha256):
        assert part in text


def test_prepared_streams_open_fast(config: DataConfig):
    prepare(config, WordConfig())
    start = time.perf_counter()
    prepare(config, WordConfig())
    assert time.perf_counter() - start < 2


@pytest.mark.skipif("ALIBI_LM_DATA_DIR" not in os.environ, reason="ALIBI_LM_DATA_DIR is not set")
def test_real_evaluation_splits_have_their_known_counts(tmp_path: Path):
    folder = Path(os.environ["ALIBI_LM_DATA_DIR"]) / "wikitext-103"
    config = DataConfig("wikitext103", str(folder), str(tmp_path))
    tokenizer = WordConfig().train([["the , of"]])
    corpus = prepare(config, tokenizer, ("validation", "test"))
    for split, words in (("validation", 217_646), ("test", 245_569)):
        stream = corpus.split(split)
        assert stream.num_tokens == stream.words == words and len(stream.documents) == 60
        assert corpus.manifest["splits"][split]["identity"] == f"the original WikiText-103 {split} split"
    assert corpus.name == "WikiText-103"
    bpe = prepare(config, BPEConfig(vocab_size=300).train([["the"]]), ("validation",)).split("validation")
    assert (bpe.words, bpe.bytes) == (217_646, 1_142_309)
