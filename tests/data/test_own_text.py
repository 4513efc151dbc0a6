"""A user's own text: every kind of file, every way of splitting it, documents kept, bad files refused."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from alibi_lm import files
from alibi_lm.data.config import DataConfig
from alibi_lm.data.corpus import verify
from alibi_lm.data.own_text import HASHED_LINES
from alibi_lm.data.prepare import open_source, prepare
from alibi_lm.data.text import SPLITS
from alibi_lm.data.tokenizers import BPEConfig, BytesConfig, WordConfig

DOCUMENTS = [f"document {k} has the words\n of its number {k * k} \n" for k in range(300)]


def write(folder, kind, documents=DOCUMENTS, column="text", name="all"):
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "txt":
        for k, text in enumerate(documents):
            (folder / f"{k:03}.txt").write_text(text)
    elif kind == "jsonl":
        lines = [json.dumps({"id": k, column: text}) + "\n" for k, text in enumerate(documents)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    else:
        table = pa.table({"id": list(range(len(documents))), column: documents})
        pq.write_table(table, folder / f"{name}.parquet", row_group_size=37)
    return folder


def texts(config, split):
    """The documents of a split, as its source gives them."""
    found = []
    for passage in open_source(config).passages(split):
        found += [passage.text] if passage.starts_document else []
        assert found, "the first passage starts a document"
    return found


def settings(path, tmp_path, **more):
    return DataConfig("text", path=str(path), cache_dir=str(tmp_path / "cache"), **more)


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
@pytest.mark.parametrize("split_by", ["hash", "file", "none"])
def test_each_document_is_in_one_split(kind, split_by, tmp_path):
    folder = tmp_path / "text"
    if kind == "txt" or split_by != "file":
        write(folder, kind)
    else:
        for k in range(3):
            write(folder, kind, DOCUMENTS[k * 100 : (k + 1) * 100], name=f"part{k}")
    config = settings(folder, tmp_path, split_by=split_by)
    parts = {split: texts(config, split) for split in SPLITS}
    if split_by == "none":
        assert all(part == DOCUMENTS for part in parts.values())
        return
    assert sorted(t for part in parts.values() for t in part) == sorted(DOCUMENTS)
    assert all(parts.values()) and len(parts["train"]) >= 100
    assert parts["train"] == [t for t in DOCUMENTS if t in set(parts["train"])], "in the order of the text"


def test_given_splits_by_folder_and_by_file_name(tmp_path):
    write(tmp_path / "a" / "train", "txt", DOCUMENTS[:5])
    write(tmp_path / "a" / "dev", "jsonl", DOCUMENTS[5:8])
    write(tmp_path / "a" / "test", "parquet", DOCUMENTS[8:9])
    write(tmp_path / "b", "parquet", DOCUMENTS[:5], name="train-00000-of-00001")
    write(tmp_path / "b", "parquet", DOCUMENTS[5:8], name="validation-00000-of-00001")
    write(tmp_path / "b", "parquet", DOCUMENTS[8:9], name="test")
    for name in "ab":
        config = settings(tmp_path / name, tmp_path)
        assert open_source(config).split_by == "given", "what auto finds"
        assert [texts(config, split) for split in SPLITS] == [DOCUMENTS[:5], DOCUMENTS[5:8], DOCUMENTS[8:9]]
    assert open_source(settings(write(tmp_path / "c", "txt"), tmp_path)).split_by == "hash"


@pytest.mark.parametrize("pattern", ["*/*.txt", "[ab]/../*/*.txt", "**/*.txt"])
def test_files_of_a_glob_over_folders_are_split(pattern, tmp_path):
    for folder in "ab":
        write(tmp_path / "text" / folder, "txt", DOCUMENTS[:3], name=folder)
    for folder in ("a/train", "a/dev"):
        write(tmp_path / "named" / folder, "txt", DOCUMENTS[:2])
    config = settings(tmp_path / "text" / pattern, tmp_path, split_by="file")
    parts = [texts(config, split) for split in SPLITS]
    assert {text for part in parts for text in part} == set(DOCUMENTS[:3]) and all(parts)
    assert open_source(settings(tmp_path / "named" / "**" / "*.txt", tmp_path)).split_by == "given"


def test_a_long_file_is_dealt_in_blocks_of_lines(tmp_path):
    lines = [f"line {k}" for k in range(150 * HASHED_LINES)]
    (tmp_path / "long.txt").write_text("\n".join(lines))
    config = settings(tmp_path / "long.txt", tmp_path)
    parts = {split: texts(config, split) for split in SPLITS}
    assert all(text.count("\n") == HASHED_LINES for part in parts.values() for text in part)
    assert sum(map(len, parts.values())) == 150 and len(parts["train"]) > 120
    again = (line for text in texts(settings(tmp_path / "long.txt", tmp_path, split_by="none"), "test")
             for line in text.splitlines())  # fmt: skip
    assert next(again) == "line 0"


def test_borders_hashes_and_budget(tmp_path):
    folder = write(tmp_path / "text", "jsonl", column="body")
    config = settings(folder, tmp_path, column="body", split_by="none")
    corpus = prepare(config, BytesConfig(), ["validation"])
    stream = corpus.split("validation")
    assert stream.num_tokens == stream.bytes + len(DOCUMENTS) and stream.bytes == len("".join(DOCUMENTS).encode())
    ends = np.flatnonzero(stream.tokens == 0)
    assert stream.documents.tolist() == [0, *(ends[:-1] + 1)]
    first = bytes(int(t) - 1 for t in stream.tokens[: ends[0]])
    assert first.decode() == DOCUMENTS[0]
    assert corpus.name == "text" and len(corpus.manifest["splits"]["validation"]["source"]["sha256"]) == 64
    budget = settings(folder, tmp_path, column="body", split_by="none", max_tokens=100)
    assert texts(budget, "test") == DOCUMENTS[: len(texts(budget, "test"))]
    size = len("".join(texts(budget, "test")).encode())
    assert 400 <= size < 400 + max(map(len, DOCUMENTS))
    write(folder, "jsonl", [*DOCUMENTS[:-1], "changed\n"], column="body")
    with pytest.raises(ValueError, match="has changed since it was prepared"):
        prepare(config, BytesConfig(), ["validation"])


def test_a_small_change_in_a_large_file_is_for_verify(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SAMPLES", 2)
    monkeypatch.setattr(files, "SAMPLE_BYTES", 100)
    config = settings(write(tmp_path / "text", "jsonl"), tmp_path, split_by="none")
    path = tmp_path / "text" / "all.jsonl"
    verify(prepare(config, BytesConfig(), ["validation"]))
    path.write_text(path.read_text().replace("document 150", "document 051"))
    again = prepare(config, BytesConfig(), ["validation"])  # the samples do not see it
    with pytest.raises(ValueError, match="the validation text has changed since it was prepared"):
        verify(again)
    del again.manifest["splits"]["validation"]["source"]["content"]  # as an earlier version prepared it
    verify(again)


def test_bytes_come_back_whatever_they_are():
    tokenizer = BytesConfig().train([])
    text = "".join(map(chr, range(1, 300))) + "\n 大 <|endoftext|>\n"
    (ids,) = tokenizer.encode_batch([text])
    assert (tokenizer.vocab_size, tokenizer.start_id, tokenizer.document_end_id) == (257, 0, 0)
    assert [int(id) - 1 for id in ids] == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.hash == BytesConfig().train(["other"]).hash


@pytest.mark.parametrize("tokenizer", [WordConfig(), BPEConfig(vocab_size=300), BytesConfig()])
def test_every_tokenizer_takes_it(tokenizer, tmp_path):
    corpus = prepare(settings(write(tmp_path / "text", "parquet"), tmp_path), tokenizer)
    assert len(corpus.split("train").documents) > 200 and corpus.split("test").num_tokens > 0


def raw(content, name="bad.txt"):
    return lambda folder: (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("make", "more", "words"),
    [
        (lambda folder: None, {}, ["there is no such text", ".jsonl"]),
        (raw(b""), {"split_by": "none"}, ["there is no text for the train split"]),
        (raw(b" \n \n"), {"split_by": "none"}, ["there is no text for the train split"]),
        (raw(b"text\0\1\2"), {"split_by": "none"}, ["bad.txt", "NUL bytes"]),
        (raw("caf\u00e9\n".encode("latin1")), {"split_by": "none"}, ["bad.txt, line 1", "not UTF-8", "iconv"]),
        (raw(b"one file\n"), {}, ["no text for the", "data.split_by=file"]),
        (raw(b"one file\n"), {"split_by": "file"}, ["none of its 1 files", "three files"]),
        (raw(b"one file\n"), {"split_by": "given"}, ["split_by=given", "training"]),
        (raw(b'{"text": "x"}\n{"text": \n', "bad.jsonl"), {"split_by": "none"}, ["bad.jsonl, line 2 is not JSON"]),
        (raw(b'{"body": "x"}\n', "bad.jsonl"), {"split_by": "none"}, ["data.column = text", "line 1", "body"]),
        (raw(b'{"text": 5}\n', "bad.jsonl"), {"split_by": "none"}, ["data.column = text", "line 1"]),
        (raw(b"[1]\n", "bad.jsonl"), {"split_by": "none"}, ["no fields at all"]),
        (raw(b"no table", "bad.parquet"), {"split_by": "none"}, ["bad.parquet is not a .parquet file"]),
        (lambda folder: write(folder, "parquet"), {"column": "id"}, ["data.column = id", "id, text"]),
        (lambda folder: write(folder, "parquet"), {"column": "body"}, ["data.column = body", "id, text"]),
    ],
)
def test_bad_text_is_refused_with_its_place(make, more, words, tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    make(folder)
    with pytest.raises(ValueError) as error:
        prepare(settings(folder, tmp_path, **more), BytesConfig(), ["validation"])
    for part in words:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("settings_", "words"),
    [
        ({"name": "text"}, "data.path"),
        ({"name": "hub"}, "data.repo"),
        ({"name": "hub", "repo": "a/b", "path": "x"}, "no effect with data=hub"),
        ({"name": "python_stdlib", "column": "body"}, "data.column = body has no effect"),
        ({"name": "text", "path": "x", "split_by": "luck"}, "data.split_by"),
        ({"name": "text", "path": "x", "max_tokens": 0}, "data.max_tokens"),
        ({"name": "text", "path": "x", "repo": "a/b"}, "data.repo = a/b has no effect"),
    ],
)
def test_settings_that_do_not_fit(settings_, words):
    with pytest.raises(ValueError, match=words):
        DataConfig(**settings_)


def hub(path, tmp_path, **more):
    return DataConfig("hub", repo=str(path), cache_dir=str(tmp_path / "cache"), **more)


@pytest.mark.slow
def test_a_set_in_the_form_of_the_hub(tmp_path, monkeypatch):
    """`datasets` reads a folder as it reads the hub; the hub itself is in test_hub.py."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    folder = tmp_path / "set"
    write(folder, "parquet", DOCUMENTS[:280], name="train")
    write(folder, "parquet", DOCUMENTS[280:], name="validation")
    config = hub(folder, tmp_path)
    assert texts(config, "validation") == DOCUMENTS[280:] and texts(config, "train") == DOCUMENTS[:280]
    with pytest.raises(ValueError, match=r"has no test split; it has train, validation.*split_by=hash"):
        texts(config, "test")
    dealt = hub(folder, tmp_path, split_by="hash")
    parts = [texts(dealt, split) for split in SPLITS]
    assert sorted(t for part in parts for t in part) == sorted(DOCUMENTS[:280]) and all(parts)
    streamed = hub(folder, tmp_path, max_tokens=50)
    assert texts(streamed, "train") == DOCUMENTS[: len(texts(streamed, "train"))]
    assert 200 <= len("".join(texts(streamed, "train"))) < 200 + len(max(DOCUMENTS, key=len))
    for more in ({}, {"max_tokens": 50}):
        with pytest.raises(ValueError, match=r"data.column = body.*id, text"):
            texts(hub(folder, tmp_path, column="body", **more), "train")
    with pytest.raises(ValueError, match=r"data.repo = nobody/nothing could not be loaded: HF_HUB_OFFLINE"):
        texts(hub("nobody/nothing", tmp_path), "train")
