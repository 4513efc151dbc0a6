"""Sums per document come back as they were; old files are read, damaged ones named."""

import json
import zipfile

import numpy as np
import pytest

from alibi_lm.results.documents import DocumentSums, read_documents, upsert_documents
from alibi_lm.results.rows import RowKey


def make_sums(run="alibi_L8_s1", length=8, changes=None, nats=(1.5, 2.0000004)):
    key = RowKey(
        run, "text", "perplexity", length, "sliding", 4, "validation", "c0ffee", json.dumps(changes or {})
    )
    return DocumentSums(key, np.array(nats), np.arange(1, len(nats) + 1))


def write_summary(path, entries, index=None):
    """A `summary.npz` as earlier versions wrote it: all numbers of a dtype in one array."""
    pools = {"float64": np.array([9.0, 1.5, 2.5]), "int64": np.array([7, 3, 4])}
    index = np.frombuffer(json.dumps(entries).encode(), dtype=np.uint8) if index is None else index
    np.savez_compressed(path, index=index, **pools)


def old_entry(run="alibi_L8_s1", last=3):
    plain = dict(
        run=run, position="alibi", train_length=8, inference_length=16, mode="nonoverlapping", stride=None
    )
    arrays = {"document_nats": ["float64", 1, last], "document_tokens": ["int64", 1, 3]}
    return plain | dict(split="validation", corpus="c0ffee", arrays=arrays)


def test_sums_come_back_and_those_of_the_same_key_are_replaced(tmp_path):
    path = tmp_path / "new" / "documents.jsonl"
    sums = [make_sums(), make_sums(length=16), make_sums(changes={"position.scaling": "yarn"})]
    upsert_documents(path, sums)
    upsert_documents(path, [make_sums(length=16, nats=(4.0, 5.0, 6.0))])
    found = read_documents(path.parent)
    assert set(found) == {one.key for one in sums}
    assert found[sums[0].key].nats.tolist() == [1.5, 2.0] and found[sums[0].key].tokens.tolist() == [1, 2]
    assert found[sums[1].key].nats.tolist() == [4, 5, 6]
    before = path.read_bytes()
    path.unlink()
    for one in reversed(list(found.values())):
        upsert_documents(path, [one])
    assert path.read_bytes() == before  # whatever the order of evaluation


def test_no_file_means_no_sums(tmp_path):
    assert read_documents(tmp_path) == {}


def test_the_file_of_an_earlier_version_is_read_and_taken_over(tmp_path):
    write_summary(tmp_path / "summary.npz", [old_entry(), old_entry("alibi_L8_s1+scaling=yarn")])
    found = read_documents(tmp_path)
    keys = {(key.run, key.changes) for key in found}
    assert keys == {("alibi_L8_s1", "{}"), ("alibi_L8_s1", '{"position.scaling": "yarn"}')}
    for sums in found.values():
        assert sums.nats.tolist() == [1.5, 2.5] and sums.tokens.tolist() == [3, 4]
        assert sums.key[1:8] == ("text", "perplexity", 16, "nonoverlapping", None, "validation", "c0ffee")
    upsert_documents(tmp_path / "documents.jsonl", [make_sums()])
    assert set(read_documents(tmp_path)) == {*found, make_sums().key}


@pytest.mark.parametrize(
    "line",
    ["{", "[]", "{}", json.dumps({name: None for name in RowKey._fields}), "\x00"]
    + [
        json.dumps(dict(zip(RowKey._fields, [*make_sums().key[:8], {}], strict=True)) | sums)
        for sums in ({"nats": [1.0]}, {"nats": [1.0], "tokens": [1, 2]}, {"nats": "a", "tokens": "b"})
    ],
)
def test_a_damaged_line_is_named_and_nothing_is_lost(tmp_path, line):
    path = tmp_path / "documents.jsonl"
    upsert_documents(path, [make_sums()])
    path.write_text(path.read_text() + line + "\n")
    before = path.read_bytes()
    for action in (lambda: read_documents(tmp_path), lambda: upsert_documents(path, [make_sums(length=16)])):
        with pytest.raises(ValueError, match=r"documents\.jsonl, line 2 is damaged"):
            action()
    assert path.read_bytes() == before


def _object_array(path):
    with zipfile.ZipFile(path, "w") as archive, archive.open("index.npy", "w") as out:
        np.lib.format.write_array(out, np.array([{}], dtype=object), allow_pickle=True)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"PK\x03\x04 no archive"),
        lambda path: write_summary(path, [old_entry(last=99)]),
        lambda path: write_summary(path, [{"run": "a"}]),
        _object_array,  # could run code when it is read
    ],
)
def test_a_damaged_file_of_an_earlier_version_is_named(tmp_path, write):
    write(tmp_path / "summary.npz")
    with pytest.raises(ValueError, match=r"summary\.npz is damaged"):
        read_documents(tmp_path)
