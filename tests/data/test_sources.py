from __future__ import annotations

from pathlib import Path

import pytest

from alibi_lm.data.sources import DataConfig, open_source
from alibi_lm.data.text import PASSAGE_LINES, wikitext_passages

from .conftest import TRAIN


def documents(text: str) -> list[list[str]]:
    found: list[list[str]] = []
    for passage in wikitext_passages(text.removesuffix("\n").split("\n")):
        if passage.starts_document:
            found.append([])
        found[-1] += passage.lines
    return found


def test_articles_start_at_titles_only():
    starts = [next(line for line in document if line.strip()) for document in documents(TRAIN)]
    assert starts == [" = First article = ", " = Second = "]


def test_no_line_is_lost_or_moved():
    for text in (TRAIN, "\n\n", "a\n", " = A = \n \n b \n \n = C = \n", "x \n \n = A = \n \n y \n"):
        assert "".join("\n".join(d) + "\n" for d in documents(text)) == text


def test_text_before_the_first_title_is_a_document_of_its_own():
    assert len(documents(" cut off in an article \n \n = Next = \n \n words \n")) == 2
    assert len(documents(" \n \n = Only = \n \n words \n")) == 1


def test_a_title_may_close_the_text_and_hold_an_equals_sign():
    assert len(documents(" a \n \n = E = m c = \n")) == 2


def test_long_documents_come_in_passages_of_bounded_size():
    passages = list(wikitext_passages(["word"] * (2 * PASSAGE_LINES + 5)))
    assert [len(p.lines) for p in passages] == [PASSAGE_LINES, PASSAGE_LINES, 5]
    assert [p.starts_document for p in passages] == [True, False, False]


def lines_of(folder: Path, split: str = "validation") -> list[str]:
    source = open_source(DataConfig("wikitext2", path=str(folder)))
    source.require(split)
    return [line for passage in source.passages(split) for line in passage.lines]


def test_only_newlines_end_lines(text_folder: Path):
    (text_folder / "wiki.valid.tokens").write_bytes("a\u2028b\x0bc\rd\x85e\nlast".encode())
    assert lines_of(text_folder) == ["a\u2028b\x0bc\rd\x85e", "last"]


def test_bytes_that_are_not_utf8_name_file_and_line(text_folder: Path):
    (text_folder / "wiki.valid.tokens").write_bytes(b"good\nb\xffd\n")
    with pytest.raises(ValueError, match=r"wiki\.valid\.tokens: line 2 is not UTF-8 .*byte 2"):
        lines_of(text_folder)


def test_missing_files_are_named_with_what_is_there(text_folder: Path):
    (text_folder / "wiki.test.tokens").unlink()
    with pytest.raises(ValueError, match=r"has no wiki\.test\.tokens; it holds wiki\.train\.tokens"):
        lines_of(text_folder, "test")
    with pytest.raises(ValueError, match=r"Did you mean data\.path=.*/text\?"):
        lines_of(text_folder.parent)
    with pytest.raises(ValueError, match="does not exist"):
        lines_of(text_folder / "nowhere")
    with pytest.raises(ValueError, match="is a file"):
        lines_of(text_folder / "wiki.train.tokens")


def test_an_empty_file_is_an_error(text_folder: Path):
    (text_folder / "wiki.valid.tokens").write_bytes(b"")
    with pytest.raises(ValueError, match="is empty"):
        lines_of(text_folder)


def test_settings_are_checked():
    with pytest.raises(ValueError, match=r"data\.name = 'ptb'\. Allowed: python_stdlib, wikitext2, wikitext103"):
        DataConfig("ptb")
    with pytest.raises(ValueError, match=r"data\.path = x has no effect with data=python_stdlib"):
        DataConfig("python_stdlib", path="x")
    with pytest.raises(ValueError, match="cache_dir is empty"):
        DataConfig(cache_dir="")
