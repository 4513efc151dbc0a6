from __future__ import annotations

import pytest

from alibi_lm.data.wikitext import ORIGINALS, check_vocabulary, identify

TEXTS = {s: ORIGINALS["wikitext103"][s].sha256 or "" for s in ("validation", "test")}
TRAIN = {"lines": 1_801_350, "words": 103_227_021, "text_sha256": "t"}


def test_originals_are_recognised():
    for split, words in (("validation", 217_646), ("test", 245_569)):
        counts = {"lines": 1, "words": words, "text_sha256": TEXTS[split]}
        assert identify("wikitext103", split, counts, {}) == f"the original WikiText-103 {split} split"
    assert identify("wikitext103", "train", TRAIN, TEXTS) == (
        "the original WikiText-103 training split (by its counts)"
    )


def test_other_texts_are_named_as_such():
    other = {**TRAIN, "lines": 2_224_399, "words": 103_255_692}
    assert identify("wikitext103", "train", other, TEXTS) == (
        "not the original WikiText-103 training split (103,255,692 words, not 103,227,021)"
    )
    counts = {"lines": 3760, "words": 217_646, "text_sha256": "other"}
    assert identify("wikitext103", "validation", counts, {}) == "not the original WikiText-103 validation split"
    assert identify("python_stdlib", "train", counts, {}) is None


def test_known_counts_are_asserted():
    with pytest.raises(ValueError, match=r"has 103,227,021 words with line ends, but 103,227,020 were counted"):
        identify("wikitext103", "train", {**TRAIN, "words": 103_227_020}, TEXTS)
    counts = {"lines": 3760, "words": 217_645, "text_sha256": TEXTS["validation"]}
    with pytest.raises(ValueError, match="has 217,646 words"):
        identify("wikitext103", "validation", counts, {})
    original = identify("wikitext103", "train", TRAIN, TEXTS)
    check_vocabulary(original, "word8", 267_744)
    check_vocabulary(original, "bpe4096", 4_096)
    check_vocabulary("not the original WikiText-103 training split", "word8", 5)
    with pytest.raises(ValueError, match="267,744"):
        check_vocabulary(original, "word8", 267_736)


def test_wikitext2_is_told_from_wikitext103_by_its_evaluation_texts():
    counts = {"lines": 3760, "words": 217_646, "text_sha256": "w2"}
    assert identify("wikitext2", "validation", counts, {"validation": "w2"}) == (
        "the original WikiText-2 validation split (by its counts)"
    )
    borrowed = {**counts, "text_sha256": TEXTS["validation"]}
    assert (identify("wikitext2", "validation", borrowed, TEXTS) or "").startswith("not the original")
