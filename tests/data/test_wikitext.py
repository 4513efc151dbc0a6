"""Articles, folders of `.tokens` files, and the original splits."""

import os

import pytest

from alibi_lm.data.text import PASSAGE_LINES
from alibi_lm.data.wikitext import (
    ORIGINALS,
    FolderSource,
    check_vocabulary,
    heading_style,
    identify,
    wikitext_passages,
)

from .conftest import TRAIN

# -- articles --------------------------------------------------------------------------------------------------


def documents(text):
    lines = text.removesuffix("\n").split("\n")
    found: list[list[str]] = []
    for passage in wikitext_passages(lines, heading_style(lines)):
        if passage.starts_document:
            found.append([])
        found[-1] += passage.lines
    return found


def first_words(text):
    return [next((line for line in document if line.strip()), "").strip() for document in documents(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (TRAIN, ["= First article =", "= Second ="]),
        (" cut off in an article \n \n = Next = \n \n words \n", ["cut off in an article", "= Next ="]),
        (" \n \n = Only = \n \n words \n", ["= Only ="]),
        (" a \n \n = E = m c = \n", ["a", "= E = m c ="]),
        # Without blank lines, before headings alone, after them alone: all stand in one way.
        ("= A =\nx\n= = S = =\ny\n= B =\nz\n= C =\n", ["= A =", "= B =", "= C ="]),
        ("cut off\n= B =\nz\n= C =\nu\n", ["cut off", "= B =", "= C ="]),
        ("= A =\nx\n\n= B =\nz\n\n= C =\nu\n", ["= A =", "= B =", "= C ="]),
        ("x\n= B =\n\nz\n= C =\n\nu\n", ["x", "= B =", "= C ="]),
        # In more than one way: there is no telling headings from formulas.
        ("= A =\nx\n\n= B =\nz\n= C =\nu\n", ["= A ="]),
        ("plain\n\nlines\n", ["plain"]),
    ],
)
def test_articles_start_at_headings_only(text, expected):
    assert first_words(text) == expected


def test_the_way_headings_stand_is_found_without_reading_wikitext_through():
    def lines():
        yield from TRAIN.split("\n")[:5]
        raise AssertionError("read on after the first heading between blank lines")

    assert heading_style(lines()) == (True, True)


def test_no_line_is_lost_or_moved():
    for text in (TRAIN, "\n\n", "a\n", " = A = \n \n b \n \n = C = \n", "x \n = A = \n y \n = B = \n z \n"):
        assert "".join("\n".join(d) + "\n" for d in documents(text)) == text


def test_long_documents_come_in_passages_of_bounded_size():
    passages = list(wikitext_passages(["word"] * (2 * PASSAGE_LINES + 5)))
    assert [len(p.lines) for p in passages] == [PASSAGE_LINES, PASSAGE_LINES, 5]
    assert [p.starts_document for p in passages] == [True, False, False]


# -- folders ---------------------------------------------------------------------------------------------------


def lines_of(folder, split="validation"):
    source = FolderSource("wikitext2", str(folder))
    source.require(split)
    return [line for passage in source.passages(split) for line in passage.lines]


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        ("a\u2028b\x0bc\rd\x85e\nlast".encode(), ["a\u2028b\x0bc\rd\x85e", "last"]),
        (b"\xef\xbb\xbfthe cat\ndog\n", ["the cat", "dog"]),
        (b"\xef\xbb\xbf = A = \n\nx\n\n = B = \n", [" = A = ", "", "x", "", " = B = "]),
        ("a\n\ufeffb\n".encode(), ["a", "\ufeffb"]),  # elsewhere it is a character like others
    ],
)
def test_newlines_alone_end_lines_and_a_byte_order_mark_is_no_text(text_folder, content, lines):
    (text_folder / "wiki.valid.tokens").write_bytes(content)
    assert lines_of(text_folder) == lines


def replaced(content):
    def change(folder):
        (folder / "wiki.valid.tokens").write_bytes(content)
        return folder

    return change


def linked(name, target):
    def change(folder):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)
        return folder if name.endswith(".tokens") else folder / name

    return change


def without_test(folder):
    (folder / "wiki.valid.tokens").unlink()
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replaced(b"good\nb\xffd\n"), r"wiki\.valid\.tokens: line 2 is not UTF-8 .*byte 2"),
        (replaced("a b\n".encode("utf-16")), r"wiki\.valid\.tokens: line 1 is not UTF-8"),
        (replaced(b""), r"wiki\.valid\.tokens is empty"),
        (replaced(b"\xef\xbb\xbf"), r"wiki\.valid\.tokens is empty"),
        (without_test, r"has no wiki\.valid\.tokens; it holds wiki\.test\.tokens, wiki\.train\.tokens\."),
        (lambda folder: folder.parent, r"Did you mean data\.path=.*/text\?"),
        (lambda folder: folder / "nowhere", r"data\.path = .*nowhere does not exist"),
        (lambda folder: folder / "wiki.test.tokens", r"data\.path = .*tokens is a file"),
        (lambda folder: folder / "wiki.test.tokens" / "x", r"data\.path = .*tokens/x does not exist"),
        (lambda folder: folder / ("x" * 300), r"data\.path = .*xxx cannot be read .*too long"),
        (lambda folder: "~nobody-of-this-name/text", r"data\.path = ~nobody-of-this-name/text cannot be read"),
        (linked("loop", "loop"), r"data\.path = .*loop cannot be read"),
        (linked("wiki.valid.tokens", "wiki.valid.tokens"), r"data\.path = .*text cannot be read .*symbolic links"),
        (linked("wiki.valid.tokens", "gone"), r"has no wiki\.valid\.tokens; it holds wiki\.test\.tokens"),
        (linked("wiki.valid.tokens", "."), r"has no wiki\.valid\.tokens; it holds wiki\.test\.tokens"),
    ],
)
def test_what_cannot_be_read_is_named(text_folder, change, message):
    place = change(text_folder)
    with pytest.raises(ValueError, match=message):
        lines_of(place)


def test_a_place_has_one_identity_however_it_is_spelled(text_folder, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(text_folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    places = ["text", "text/", "./text", "text/../text", "link", "link/", "~/text", str(text_folder)]
    assert len({str(FolderSource("wikitext103", place).identity()) for place in places}) == 1
    assert os.sep + "link" not in str(FolderSource("wikitext103", "link").identity())


# -- the original splits ---------------------------------------------------------------------------------------

TEXTS = {s: ORIGINALS["wikitext103"][s].sha256 or "" for s in ("validation", "test")}
TRAINING = {"lines": 1_801_350, "words": 103_227_021, "text_sha256": "t"}
VALIDATION = {"lines": 3760, "words": 217_646, "text_sha256": TEXTS["validation"]}
TEST = {"lines": 1, "words": 245_569, "text_sha256": TEXTS["test"]}
OTHER = {"lines": 2_224_399, "words": 103_255_692, "text_sha256": "o"}
UNKNOWN = {**VALIDATION, "text_sha256": "w2"}


@pytest.mark.parametrize(
    ("name", "split", "counts", "texts", "expected"),
    [
        ("103", "validation", VALIDATION, {}, "the original {}103 validation split"),
        ("103", "test", TEST, {}, "the original {}103 test split"),
        ("103", "train", TRAINING, TEXTS, "the original {}103 training split (by its counts)"),
        (
            "103",
            "train",
            OTHER,
            TEXTS,
            "not the original {}103 training split (103,255,692 words, not 103,227,021)",
        ),
        ("103", "validation", UNKNOWN, {}, "not the original {}103 validation split"),
        # WikiText-2 has the same counts; only the digest tells the two apart.
        ("2", "validation", UNKNOWN, {"validation": "w2"}, "the original {}2 validation split (by its counts)"),
        ("2", "validation", VALIDATION, TEXTS, "not the original {}2 validation split"),
    ],
)
def test_originals_are_told_from_other_texts(name, split, counts, texts, expected):
    assert identify(f"wikitext{name}", split, counts, texts) == expected.format("WikiText-")


def test_known_counts_are_asserted():
    assert identify("python_stdlib", "train", TRAINING, TEXTS) is None
    with pytest.raises(ValueError, match=r"has 103,227,021 words with line ends, but 103,227,020 were counted"):
        identify("wikitext103", "train", {**TRAINING, "words": 103_227_020}, TEXTS)
    with pytest.raises(ValueError, match="has 217,646 words"):
        identify("wikitext103", "validation", {**VALIDATION, "words": 217_645}, {})
    original = identify("wikitext103", "train", TRAINING, TEXTS)
    check_vocabulary(original, "word8", 267_744)
    check_vocabulary(original, "bpe4096", 4_096)
    check_vocabulary("not the original WikiText-103 training split", "word8", 5)
    with pytest.raises(ValueError, match="267,744"):
        check_vocabulary(original, "word8", 267_736)
