"""Sums per document come back as they were, and damaged files are named."""

import json

import numpy as np
import pytest

from alibi_lm.results.documents import DocumentSums, read_documents, upsert_documents
from alibi_lm.results.rows import RowKey


def make_sums(run="alibi_L8_s1", length=8, changes=None, nats=(1.5, 2.0000004)):
    key = RowKey(
        run, "text", "perplexity", length, "sliding", 4, "validation", "c0ffee", json.dumps(changes or {})
    )
    return DocumentSums(key, np.array(nats), np.arange(1, len(nats) + 1))


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


@pytest.mark.parametrize(
    "line",
    ["{", "[]", "{}", json.dumps({name: None for name in RowKey._fields})]
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
