import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alibi_lm.data.tokenizers import TOKENIZERS, BPEConfig, Tokenizer, WordConfig, pad_vocabulary, word_tokenizer

from .conftest import TRAIN

LINES = TRAIN.removesuffix("\n").split("\n")


@pytest.fixture(scope="module")
def word():
    return WordConfig().train([TRAIN])


@pytest.fixture(scope="module")
def bpe():
    return BPEConfig(vocab_size=300).train([TRAIN])


def words_of(tokenizer, ids):
    return [tokenizer.decode([id]) for id in ids]


def test_word_ids_fall_by_count_with_ties_by_code_point():
    tokenizer = WordConfig(pad_to_multiple=1).train(["b a b é Z\na <unk> c </s> é b\n", "~ Z \U0001f600\n"])
    # b 3; then Z, a, é with 2 each; then c, ~, the emoji with 1 each: capitals before small, "~" before accents
    assert words_of(tokenizer, range(4, tokenizer.vocab_size)) == ["b", "Z", "a", "é", "c", "~", "\U0001f600"]
    assert words_of(tokenizer, range(2)) == ["<s>", "<pad>"] and tokenizer.decode([3]) == "<unk>"


def test_word_lines_end_with_the_line_end(word):
    ids = word.encode("the cat\n \n\n unheard <unk>\tthe\u00a0cat \n")
    the, cat = word.encode("the cat")
    assert ids.tolist() == [the, cat, 2, 2, 2, 3, 3, the, cat, 2]
    assert ids.dtype == np.int32 and word.start_id == 2 and word.document_end_id is None


def test_word_vocabulary_is_padded_with_made_up_words(word):
    distinct = set(TRAIN.split()) - {"<unk>"}
    assert word.vocab_size % 8 == 0 and 0 <= word.vocab_size - 4 - len(distinct) < 8
    assert pad_vocabulary(["a"], 8) == ["a", "madeupword0000", "madeupword0001", "madeupword0002"]
    assert pad_vocabulary(["madeupword0000", "b"], 7) == ["madeupword0000", "b", "madeupword0001"]
    assert pad_vocabulary(["a", "b", "c", "d"], 8) == ["a", "b", "c", "d"]


def test_word_text_comes_back_but_for_blanks(word):
    assert word.decode(word.encode("\nthe cat sat\n\n\non  the mat \n a")) == "\nthe cat sat\n\n\non the mat\na"


def test_word_file_alone_gives_the_same_ids(word, tmp_path):
    from tokenizers import Tokenizer as Backend

    word.save(tmp_path / "word.json")
    alone = Backend.from_file(str(tmp_path / "word.json"))
    for line in LINES:
        assert alone.encode(line).ids == word.encode(f"{line}\n").tolist()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"])), max_size=8))
def test_bpe_gives_any_text_back_exactly(bpe, lines):
    text = "".join(f"{line}\n" for line in lines)
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    by_line = [id for part in bpe.encode_batch([f"{line}\n" for line in lines]) for id in part]
    assert ids.tolist() == by_line, "ids depend on how the text is cut in pieces"


@pytest.mark.parametrize("kind", ["word", "bpe"])
def test_a_text_is_encoded_as_it_stands(kind, request):
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    line = tokenizer.encode("the cat\n").tolist()
    assert tokenizer.encode("the cat").tolist() == line[:-1] or kind == "bpe"
    assert tokenizer.decode(tokenizer.encode("the cat")) == "the cat"
    assert tokenizer.encode("the cat\nthe cat\n").tolist() == line * 2
    assert tokenizer.encode("").tolist() == []
    assert tokenizer.encode("a").dtype == np.int32


def test_bpe_treats_the_end_of_text_in_a_text_as_text(bpe, tmp_path):
    bpe.save(tmp_path / "bpe.json")
    for tokenizer in (bpe, Tokenizer.load(tmp_path / "bpe.json")):
        ids = tokenizer.encode("<|endoftext|>\n")
        assert 0 not in ids and tokenizer.decode(ids) == "<|endoftext|>\n"
        assert tokenizer.decode([0, *ids, 0]) == "<|endoftext|>\n"
    assert bpe.start_id == bpe.document_end_id == 0


def test_bpe_merges_and_respects_its_size(bpe):
    assert 257 < bpe.vocab_size <= 300
    assert len(bpe.encode(TRAIN)) < 0.8 * len(TRAIN.encode())
    assert BPEConfig(vocab_size=5000).train(["ab\n"]).vocab_size < 300


def test_training_is_the_same_in_another_process():
    code = (
        "import sys; from alibi_lm.data.tokenizers import TOKENIZERS\n"
        "text = sys.stdin.read()\n"
        "print(*(config().train([text]).hash for config in TOKENIZERS.values()))"
    )
    text = "\n".join(f"{k % 17} word{k % 91} {'x' * (k % 13)}\u00e9" for k in range(3000))
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=text,
        env={**os.environ, "PYTHONHASHSEED": "1", "PYTHONUTF8": "1"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=True,
    )
    assert done.stdout.split() == [config().train([text]).hash for config in TOKENIZERS.values()]


@pytest.mark.parametrize("kind", ["word", "bpe"])
def test_saved_tokenizer_is_the_same(kind, request, tmp_path):
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    loaded = Tokenizer.load(path)
    assert loaded.hash == tokenizer.hash == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (loaded.kind, loaded.vocab_size, loaded.start_id) == (kind, tokenizer.vocab_size, tokenizer.start_id)
    assert loaded.encode(TRAIN).tolist() == tokenizer.encode(TRAIN).tolist()


def changed(part, **values):
    def change(content):
        place = content["model"]["vocab"] if part == "vocab" else content["model"]
        place.update(values)
        return json.dumps(content).encode()

    return change


def swapped(content):
    vocabulary = content["model"]["vocab"]
    vocabulary["<pad>"], vocabulary["the"] = vocabulary["the"], vocabulary["<pad>"]
    return json.dumps(content).encode()


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("word", changed("vocab", the=999), "without gaps"),
        ("word", swapped, "<pad> must have id 1"),
        ("word", changed("model", type="Unigram"), "cannot be used as tokenizer"),
        ("bpe", changed("model", continuing_subword_prefix="x"), "continuing_subword_prefix"),
        ("bpe", lambda c: [c["model"].pop("continuing_subword_prefix"), json.dumps(c).encode()][1], "cannot be"),
        ("bpe", changed("model", merges=[["no", "such"]]), "cannot be used as tokenizer"),
        ("word", lambda content: b"\x80\x04not json", "cannot be used as tokenizer"),
        ("word", lambda content: b"[1]", "cannot be used as tokenizer"),
    ],
)
def test_files_that_are_no_tokenizers_of_ours_are_refused(kind, change, message, request, tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(ValueError, match="There is no tokenizer file"):
        Tokenizer.load(path)
    request.getfixturevalue(kind).save(path)
    path.write_bytes(change(json.loads(path.read_text(encoding="utf-8"))))
    with pytest.raises(ValueError, match=message):
        Tokenizer.load(path)


def test_fairseq_dictionary_gives_line_i_the_id_4_plus_i(tmp_path):
    path = tmp_path / "dict.txt"
    path.write_text("the 10\nÄ 7\n@-@ 7\nmadeupword0000 0\n", encoding="utf-8")
    tokenizer = Tokenizer.from_fairseq_dictionary(path)
    assert tokenizer.vocab_size == 8
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert Tokenizer.from_fairseq_dictionary(path).hash == tokenizer.hash, "a byte order mark is no part of a word"
    assert tokenizer.encode("Ä @-@ the never <unk> madeupword0000\n").tolist() == [5, 6, 4, 3, 3, 7, 2]
    assert tokenizer.hash == word_tokenizer(["the", "Ä", "@-@", "madeupword0000"]).hash


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"the 10\ncat\n", r"line 2: expected `word count`, got 'cat"),
        (b"the ten\n", "line 1: expected `word count`"),
        (b"the 10\n\ncat 2\n", "line 2: expected `word count`"),
        (b"the 10\ncat 2\nthe 1\n", "line 3: 'the' is a word that occurred before"),
        (b"the 10\n<unk> 2\n", "line 2: '<unk>' is a special word"),
        (b"the 10 #fairseq:overwrite\n", "line 1: expected `word count`"),
        (b"\xff\xfe 1\n", "is not UTF-8"),
        (b"", "is empty"),
    ],
)
def test_malformed_dictionaries_are_refused(content, message, tmp_path):
    path = tmp_path / "dict.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_fairseq_dictionary(path)
    with pytest.raises(ValueError, match="no such file"):
        Tokenizer.from_fairseq_dictionary(tmp_path / "other.txt")


@pytest.mark.parametrize("number", [10**6 + 1, 10**20, 256, 0, -1])
def test_sizes_out_of_range_are_refused_before_anything_is_allocated(number):
    with pytest.raises(ValueError, match=rf"tokenizer\.vocab_size = {number}\. Allowed: 257 .* to 1,000,000"):
        BPEConfig(vocab_size=number)
    if number != 256:
        with pytest.raises(ValueError, match=rf"pad_to_multiple = {number}\. Allowed: 1 .* to 1,000,000"):
            WordConfig(pad_to_multiple=number)


def test_small_texts():
    assert BPEConfig(vocab_size=10**6).train(["a b\n"]).vocab_size < 300
    with pytest.raises(ValueError, match="has no words"):
        WordConfig().train(["\n \n", "<unk>\n"])


@pytest.mark.skipif("ALIBI_LM_GOLDEN_DIR" not in os.environ, reason="ALIBI_LM_GOLDEN_DIR is not set")
def test_order_of_words_is_that_of_fairseq():
    path = Path(os.environ["ALIBI_LM_GOLDEN_DIR"]) / "dict.txt"
    dictionary = Tokenizer.from_fairseq_dictionary(path)
    ours = [line.rsplit(" ", 1) for line in path.read_text(encoding="utf-8").splitlines()]
    shuffled = sorted((word for word, count in ours for _ in range(int(count))), key=lambda w: w[::-1])
    assert WordConfig(pad_to_multiple=8).train([" ".join(shuffled)]).hash == dictionary.hash
