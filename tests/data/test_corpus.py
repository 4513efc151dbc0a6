"""Preparing and opening: exact streams, hashes that stand for text and tokenizer, damage, interruption, locks."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from alibi_lm import files
from alibi_lm.data import prepare as module
from alibi_lm.data.config import DataConfig
from alibi_lm.data.corpus import open_corpus, report, verify
from alibi_lm.data.prepare import prepare
from alibi_lm.data.text import SPLITS
from alibi_lm.data.tokenizers import BPEConfig, Tokenizer, TokenizerConfig, WordConfig

from .conftest import TEST, TRAIN, VALIDATION

TEXTS = {"train": TRAIN, "validation": VALIDATION, "test": TEST}
KINDS: dict[str, TokenizerConfig] = {"word": WordConfig(), "bpe": BPEConfig(vocab_size=300)}


def file_of(config, name):
    return Path(config.path or "") / f"wiki.{name}.tokens"


def times(folder):
    return {str(p): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


# -- what streams hold -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_streams_hold_the_text_and_its_counts(kind, config):
    corpus = prepare(config, KINDS[kind])
    assert list(corpus.manifest["splits"]) == list(SPLITS)
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


def test_documents_are_the_articles_also_where_blank_lines_were_removed(config):
    corpus = prepare(config, WordConfig())
    word = corpus.split("train")
    assert len(word.documents) == 2
    assert corpus.tokenizer.decode(word.tokens[word.documents[1] :]).startswith("= Second =\n")
    corpus = prepare(config, KINDS["bpe"])
    bpe = corpus.split("train")
    assert np.flatnonzero(bpe.tokens == 0).tolist() == [bpe.documents[1] - 1, bpe.num_tokens - 1]
    assert corpus.tokenizer.decode(bpe.tokens[bpe.documents[1] :]).startswith(" = Second = \n")
    shutil.rmtree(config.cache_dir)
    lines = [line for line in file_of(config, "valid").read_text().splitlines(True) if line.strip()]
    file_of(config, "valid").write_text("".join(lines) + " = Last = \n end \n")
    corpus = prepare(config, WordConfig(), ("validation",))
    assert len(corpus.split("validation").documents) == 2


def test_a_byte_order_mark_changes_no_count_and_no_hash(config, tmp_path):
    plain = prepare(config, WordConfig())
    for name in ("train", "valid", "test"):
        file_of(config, name).write_bytes(b"\xef\xbb\xbf" + file_of(config, name).read_bytes())
    marked = prepare(replace(config, cache_dir=str(tmp_path / "marked")), WordConfig())
    assert (marked.hash, marked.tokenizer.hash) == (plain.hash, plain.tokenizer.hash)
    for split in SPLITS:
        one, other = plain.split(split), marked.split(split)
        assert (one.sha256, one.text_sha256, one.words) == (other.sha256, other.text_sha256, other.words)
    verify(marked)


def test_one_document_is_said_to_give_no_intervals(config):
    file_of(config, "valid").write_text("words without\na heading\n")
    corpus = prepare(config, WordConfig())
    remark = corpus.manifest["splits"]["validation"]["remark"]
    assert remark.startswith("1 document: no intervals") and "` = Title = ` between blank lines" in remark
    assert remark in report(corpus) and "2 lines, 1 document\n" in report(corpus)
    assert corpus.manifest["splits"]["train"]["remark"] is None


def test_other_texts_are_named_in_manifest_and_report(config):
    corpus = prepare(config, WordConfig())
    assert corpus.name == "WikiText-103 (not the original: train, validation, test)"
    words = corpus.split("train").words
    identity = f"not the original WikiText-103 training split ({words} words, not 103,227,021)"
    assert corpus.manifest["splits"]["train"]["identity"] == identity
    for part in (identity, corpus.hash, corpus.tokenizer.hash, "2 documents", corpus.split("test").text_sha256):
        assert part in report(corpus)


@pytest.mark.skipif("ALIBI_LM_DATA_DIR" not in os.environ, reason="ALIBI_LM_DATA_DIR is not set")
def test_real_evaluation_splits_have_their_known_counts(tmp_path):
    shutil.copytree(Path(os.environ["ALIBI_LM_DATA_DIR"]) / "wikitext-103", tmp_path / "text")
    valid = tmp_path / "text" / "wiki.valid.tokens"
    valid.chmod(0o600)
    valid.write_bytes(b"\xef\xbb\xbf" + valid.read_bytes())
    config = DataConfig("wikitext103", str(tmp_path / "text"), str(tmp_path))
    corpus = prepare(config, WordConfig().train(["the , of\n"]), ("validation", "test"))
    for split, words in (("validation", 217_646), ("test", 245_569)):
        stream = corpus.split(split)
        assert stream.num_tokens == stream.words == words and len(stream.documents) == 60
        assert corpus.manifest["splits"][split]["identity"] == f"the original WikiText-103 {split} split"
    assert corpus.name == "WikiText-103"
    bpe = prepare(config, BPEConfig(vocab_size=300).train(["the\n"]), ("validation",)).split("validation")
    assert (bpe.words, bpe.bytes) == (217_646, 1_142_309)


# -- what a text is known by -----------------------------------------------------------------------------------


def test_the_second_time_nothing_is_written_or_read_again(config, monkeypatch):
    first = prepare(config, WordConfig())
    before = times(Path(config.cache_dir))
    monkeypatch.setattr(module, "encode_split", None)
    monkeypatch.setattr(WordConfig, "train", None)
    second = prepare(config, WordConfig())
    assert times(Path(config.cache_dir)) == before
    assert (second.hash, second.manifest) == (first.hash, first.manifest)


def test_hashes_stand_for_text_and_tokenizer_not_for_a_place(config, tmp_path):
    word = prepare(config, WordConfig())
    bpe = prepare(config, BPEConfig(vocab_size=300))
    assert len({word.hash, bpe.hash, *(s.hash for s in word.streams.values())}) == 5
    # Elsewhere and from another cache, all of it or one split: the same text has the same hashes.
    shutil.copytree(config.path or "", tmp_path / "copy")
    moved = DataConfig("wikitext103", str(tmp_path / "copy"), str(tmp_path / "cache2"))
    again = prepare(moved, WordConfig())
    assert (again.hash, again.tokenizer.hash) == (word.hash, word.tokenizer.hash)
    assert [again.split(s).sha256 for s in SPLITS] == [word.split(s).sha256 for s in SPLITS]
    alone = prepare(moved, word.tokenizer, ("validation",))
    assert (alone.hash, alone.split("validation").hash) == (word.hash, word.split("validation").hash)
    shutil.rmtree(tmp_path / "cache2")
    (tmp_path / "copy" / "wiki.valid.tokens").write_text(" the mat \n")
    other = prepare(moved, word.tokenizer, ("validation",))
    assert other.hash != word.hash and other.split("validation").hash != word.split("validation").hash


def test_prepared_streams_are_found_however_the_place_is_spelled(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = prepare(config, WordConfig()).folder
    (tmp_path / "link").symlink_to("text")
    for path in ("text", "text/", "link", "./link/../text/"):
        assert prepare(replace(config, path=path), WordConfig()).folder == folder
    shutil.rmtree("text")
    assert prepare(replace(config, path="text/"), WordConfig()).folder == folder, "streams outlive their source"


def test_tokenizers_never_share_streams(config):
    folders = {prepare(config, t).folder for t in (WordConfig(), WordConfig(pad_to_multiple=1), *KINDS.values())}
    assert len(folders) == 3
    own = prepare(config, WordConfig())
    assert prepare(config, own.tokenizer).folder == own.folder, "a run's own tokenizer finds its streams"
    with pytest.raises(ValueError, match="was encoded with another tokenizer"):
        open_corpus(own.folder, ["train"], prepare(config, BPEConfig(vocab_size=300)).tokenizer)


def test_a_foreign_dictionary_needs_only_the_evaluated_split(config, tmp_path):
    file_of(config, "train").unlink()
    file_of(config, "test").unlink()
    (tmp_path / "dict.txt").write_text("the 9\ndog 2\n")
    corpus = prepare(config, Tokenizer.from_fairseq_dictionary(tmp_path / "dict.txt"), ("validation",))
    assert corpus.split("validation").tokens.tolist() == [2, 3, 3, 3, 3, 2, 2, 4, 3, 3, 3, 4, 5, 2, 2]
    assert corpus.manifest["splits"]["validation"]["unknown"] == 7
    with pytest.raises(ValueError, match=r"split = 'train' is not open here\. Allowed: validation"):
        corpus.split("train")
    with pytest.raises(ValueError, match="built from the training text"):
        prepare(config, WordConfig(), ("validation",))


class Letters:
    """Another code base's tokenizer: a letter is a token, and so is a line end."""

    kind, hash, vocab_size, start_id, document_end_id, unknown_id = "letters", "5" * 64, 0x110000, 10, None, None

    def encode_batch(self, texts):
        return [np.array([ord(letter) for letter in text], dtype=np.int32) for text in texts]

    def decode(self, ids):
        return "".join(map(chr, ids))

    def save(self, path):
        Path(path).write_text("letters")


def test_a_foreign_tokenizer_is_enough_to_prepare_and_open_a_text(config):
    corpus = prepare(config, Letters())
    assert corpus.tokenizer.decode(corpus.split("test").tokens) == TEST
    assert corpus.split("test").tokens.dtype == np.int32
    again = open_corpus(corpus.folder, ("test",), Letters())
    assert again.split("test").hash == corpus.split("test").hash
    verify(corpus)


def test_splits_may_be_added_later_and_opening_needs_neither_text_nor_lock(config):
    first = prepare(config, WordConfig(), ("validation",))
    prepared = prepare(config, WordConfig(), ("train", "validation"))
    assert first.hash == prepared.hash and list(first.streams) == ["validation"]
    shutil.rmtree(config.path or "")
    shutil.rmtree(prepared.folder.parent / ".lock", ignore_errors=True)
    corpus = open_corpus(prepared.folder, ("train", "validation"))
    assert (corpus.hash, corpus.tokenizer.hash) == (prepared.hash, prepared.tokenizer.hash)
    for split in ("train", "validation"):
        assert np.array_equal(corpus.split(split).tokens, prepared.split(split).tokens)
    with pytest.raises(ValueError, match=r"has no stream of test; it has train, validation"):
        open_corpus(prepared.folder)
    with pytest.raises(ValueError, match=r"holds no finished streams .*make data"):
        open_corpus(prepared.folder.parent)


# -- change and damage -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["train", "valid"])
def test_a_changed_source_is_an_error(name, config):
    corpus = prepare(config, WordConfig())
    path = file_of(config, name)
    os.utime(path)
    prepare(config, WordConfig())  # touched, not changed
    path.write_bytes(path.read_bytes().replace(b"the dog", b"the cow"))
    with pytest.raises(ValueError, match=f"{path.name} has changed since it was prepared. Delete .*wikitext103-"):
        prepare(config, WordConfig())
    path.unlink()
    assert prepare(config, WordConfig()).hash == corpus.hash, "prepared streams outlive their source"


def test_an_evaluation_text_that_changed_before_its_turn_is_noticed(config):
    prepare(config, WordConfig(), ("train",))
    file_of(config, "valid").write_text(" other \n")
    with pytest.raises(ValueError, match="the validation text has changed since"):
        prepare(config, WordConfig())


def truncate(path):
    os.truncate(path, path.stat().st_size - 2)


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def without_the_source(path):
    content = json.loads(path.read_text())
    for entry in [*content.get("tokenizers", {}).values(), *content.get("splits", {}).values()]:
        entry["train" if "train" in entry else "source"] = {}
    path.write_text(json.dumps(content))


WITHOUT_FIELDS = '{"format": 1, "texts": {}, "tokenizers": {"word8": []}, "splits": {"train": []}}'
DAMAGES = (
    lambda path: path.write_text(path.read_text()[:-20]),
    lambda path: path.write_text('{"format": 999}'),
    lambda path: path.write_text(WITHOUT_FIELDS),
    without_the_source,
)


@pytest.mark.parametrize(
    ("name", "damage"),
    [(n, d) for n in ("train.bin", "train.documents.npy", "../word8.json") for d in (truncate, flip, Path.unlink)]
    + [(n, d) for n in ("manifest.json", "../source.json") for d in DAMAGES],
)
def test_damage_is_an_error_that_says_what_to_delete(name, damage, config):
    corpus = prepare(config, WordConfig())
    damage(corpus.folder / name)
    with pytest.raises(ValueError, match=r"Delete .*wikitext103-\S+ to prepare it again") as error:
        prepare(config, WordConfig())
    shutil.rmtree(str(error.value).split("Delete ")[1].split(" to prepare")[0])
    verify(prepare(config, WordConfig()))


def test_a_missing_manifest_means_not_prepared(config):
    for name in ("manifest.json", "../source.json"):
        (prepare(config, WordConfig()).folder / name).unlink()
        verify(prepare(config, WordConfig()))


@pytest.mark.parametrize("what", ["tokens", "text"])
def test_small_changes_in_large_files_are_for_verify(what, config, monkeypatch):
    file_of(config, "train").write_text(TRAIN * 100)
    monkeypatch.setattr(files, "SAMPLES", 2)
    monkeypatch.setattr(files, "SAMPLE_BYTES", 100)
    corpus = prepare(config, WordConfig())
    verify(corpus)
    path = corpus.folder / "train.bin" if what == "tokens" else file_of(config, "train")
    before = path.stat().st_mtime_ns
    flip(path)
    os.utime(path, ns=(before, before))
    again = prepare(config, WordConfig())  # the samples do not see it
    with pytest.raises(ValueError, match=rf"{path.name} has changed since it was (written|prepared)"):
        verify(again)


# -- interruption and locks ------------------------------------------------------------------------------------


def believed(config):
    manifests = list(Path(config.cache_dir).glob("*/tokens-*/manifest.json"))
    return [split for path in manifests for split in json.loads(path.read_text())["splits"]]


def test_an_interruption_at_any_file_leaves_nothing_half_done(config, tmp_path):
    whole = prepare(replace(config, cache_dir=str(tmp_path / "whole")), WordConfig())
    real, stopped = os.replace, 0
    for number in range(1, 40):
        trial = replace(config, cache_dir=str(tmp_path / f"trial{number}"))
        count = [0]

        def replace_or_stop(source, target, count=count, last=number):
            count[0] += 1
            if count[0] == last:
                raise KeyboardInterrupt
            real(source, target)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(files.os, "replace", replace_or_stop)
            try:
                prepare(trial, WordConfig())
                break
            except KeyboardInterrupt:
                stopped += 1
        for split in believed(trial):
            stream = open_corpus(next(Path(trial.cache_dir).glob("*/tokens-*")), [split]).split(split)
            assert np.array_equal(stream.tokens, whole.split(split).tokens)
        assert not list(Path(trial.cache_dir).rglob("*.tmp"))
        again = prepare(trial, WordConfig())
        verify(again)
        assert again.hash == whole.hash
    assert stopped >= 12


PROCESS = """\
import sys, time
from alibi_lm.data import prepare
from alibi_lm.data.config import DataConfig
from alibi_lm.data.tokenizers import Tokenizer, WordConfig
encode_split, encode_batch, made = prepare.encode_split, Tokenizer.encode_batch, []
def counted(source, split, *rest):
    made.append(split)
    return encode_split(source, split, *rest)
def slow(self, texts):
    if made[-1] == "validation":
        print("encoding", flush=True)
        time.sleep(float(sys.argv[3]))
    return encode_batch(self, texts)
prepare.encode_split, Tokenizer.encode_batch = counted, slow
if sys.argv[4] == "wait":
    sys.stdin.readline()
prepared = prepare.prepare(DataConfig("wikitext103", sys.argv[1], sys.argv[2]), WordConfig())
print(len(made), prepared.hash)
"""


def process(config, seconds, wait=""):
    command = [sys.executable, "-c", PROCESS, config.path or "", config.cache_dir, str(seconds), wait]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_a_killed_process_leaves_nothing_believed_and_nothing_behind(config):
    with process(config, 60) as running:
        assert running.stdout is not None and running.stdout.readline() == "encoding\n"
        running.send_signal(signal.SIGKILL)
        running.wait()
    cache = Path(config.cache_dir)
    assert believed(config) == ["train"] and list(cache.rglob("validation.bin.*.tmp"))
    verify(prepare(config, WordConfig()))
    assert believed(config) == list(SPLITS) and not list(cache.rglob("*.tmp"))


def test_two_processes_prepare_once(config):
    running = [process(config, 0.5, "wait") for _ in range(2)]
    outputs = []
    for one in running:
        assert one.stdin is not None
        one.stdin.write("go\n")
        one.stdin.flush()
    for one in running:
        outputs.append(one.communicate()[0].removeprefix("encoding\n").split())
    assert sum(int(count) for count, _ in outputs) == 3 and outputs[0][1] == outputs[1][1]


# -- mistakes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["file", "loop", "~nobody-of-this-name/cache"])
def test_a_folder_that_cannot_be_written_is_named(place, config, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    cache = place if place.startswith("~") else str(tmp_path / place)
    with pytest.raises(ValueError, match=rf"data\.cache_dir = {cache}: the streams could not be prepared there"):
        prepare(dataclasses.replace(config, cache_dir=cache), WordConfig())


def test_bad_text_stops_before_the_long_work(config, monkeypatch):
    file_of(config, "valid").write_bytes(b"\xff\n")
    monkeypatch.setattr(WordConfig, "train", None)
    with pytest.raises(ValueError, match="line 1 is not UTF-8"):
        prepare(config, WordConfig())
    with pytest.raises(ValueError, match=r"split = 'valid'\. Allowed: train, validation, test"):
        prepare(config, WordConfig(), ("valid",))
