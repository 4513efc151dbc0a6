"""From lines of text to token ids and back: words, byte-level BPE or bytes, each kept as one JSON file.

Word level, as fairseq prepares WikiText-103 for the paper: a line becomes its whitespace-separated words followed
by `</s>`, a blank line only `</s>`. Ids: 0 `<s>`, 1 `<pad>`, 2 `</s>`, 3 `<unk>`, then the words of the training
text by falling count, ties by code points, then made-up words up to a multiple of 8. The order matters: an
adaptive vocabulary forms its bands by id. A word of the text that is spelled like one of the four gets its id.

BPE: all bytes can be encoded, so nothing is unknown and decoding gives the exact text. Each line with its line end
is encoded separately: no token crosses a line end, and a text gives the same ids however it is cut into pieces.
`<|endoftext|>` (id 0) is the input before the first token and ends each document of a prepared stream, where it is
a target too; the same characters in the text are ordinary text.

The file has the format of the `tokenizers` library, which can read it by itself; loading it runs no code.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from alibi_lm.files import whole_file
from alibi_lm.settings import require

WORD_SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
LINE_END_ID = 2
UNKNOWN_ID = 3
END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0
LARGEST = 1_000_000
"""Largest vocabulary, and largest padding, that is built here: about four times that of the largest models."""


class TextTokenizer(Protocol):
    """What preparing and opening a text need of a tokenizer, ours (`Tokenizer`) or another."""

    kind: str
    """Name of the kind of tokenizer, for manifests and reports."""
    hash: str
    """Hex digest: equal for tokenizers that give equal ids."""
    vocab_size: int
    start_id: int
    """The input before a stream's first token."""
    document_end_id: int | None
    """Id that ends each document in a stream; None if lines have their own end."""
    unknown_id: int | None
    """Id of words outside the vocabulary; None if there are none."""

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Ids of the texts, including newlines; nothing is added at their ends."""

    def save(self, path: str | Path) -> None:
        """Write it as one file, whole or not at all."""


@dataclass
class TokenizerConfig:
    """The settings that tokenizers of all kinds share."""

    name: str = ""

    @property
    def label(self) -> str:
        """Name of the tokenizer's file, from its kind and settings, such as `word8` or `bpe4096`."""
        return self.name

    def train(self, texts: Iterable[str]) -> Tokenizer:
        """Build the tokenizer from the training text, given in pieces that end with a line end."""
        raise NotImplementedError


@dataclass
class WordConfig(TokenizerConfig):
    """Whole words, every word of the training text."""

    name: str = "word"
    pad_to_multiple: int = 8
    """Made-up words are added until the vocabulary is a multiple of this."""

    def __post_init__(self) -> None:
        require(
            1 <= self.pad_to_multiple <= LARGEST,
            f"tokenizer.pad_to_multiple = {self.pad_to_multiple}. Allowed: 1 (no padding) to {LARGEST:,}; "
            "the paper's is 8.",
        )

    @property
    def label(self) -> str:
        return f"word{self.pad_to_multiple}"

    def train(self, texts: Iterable[str]) -> Tokenizer:
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(text.split())
        for special in WORD_SPECIALS:
            del counts[special]
        require(bool(counts), "tokenizer=word: the training text has no words. Give a text with words in it.")
        ranked = sorted(counts, key=lambda word: (-counts[word], word))
        return word_tokenizer(pad_vocabulary(ranked, self.pad_to_multiple))


@dataclass
class BPEConfig(TokenizerConfig):
    """Byte-level BPE, trained on the training split."""

    name: str = "bpe"
    vocab_size: int = 4096
    """Largest number of tokens, including the 256 bytes and `<|endoftext|>`; a small text may give fewer."""

    def __post_init__(self) -> None:
        require(
            257 <= self.vocab_size <= LARGEST,
            f"tokenizer.vocab_size = {self.vocab_size}. Allowed: 257 (256 bytes and {END_OF_TEXT}) to "
            f"{LARGEST:,}.",
        )

    @property
    def label(self) -> str:
        return f"bpe{self.vocab_size}"

    def train(self, texts: Iterable[str]) -> Tokenizer:
        from tokenizers import Tokenizer as Backend
        from tokenizers import decoders, models, pre_tokenizers, trainers

        backend = Backend(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split("\n", "merged_with_previous"),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        return Tokenizer(backend.to_str(pretty=True).encode())


@dataclass
class BytesConfig(TokenizerConfig):
    """The 256 bytes and `<|endoftext|>`: BPE without merges. Byte b has id b + 1."""

    name: str = "bytes"

    def train(self, texts: Iterable[str]) -> Tokenizer:
        from tokenizers import Tokenizer as Backend
        from tokenizers import decoders, models, pre_tokenizers

        # The library represents a byte by a visible character: itself, or the next free one from 256 on.
        visible = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
        free = iter(range(256, 512))
        characters = [chr(byte if byte in visible else next(free)) for byte in range(256)]
        vocabulary = {END_OF_TEXT: END_OF_TEXT_ID} | {c: 1 + byte for byte, c in enumerate(characters)}
        backend = Backend(models.BPE(vocabulary, []))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([END_OF_TEXT])
        return Tokenizer(backend.to_str(pretty=True).encode())


TOKENIZERS: dict[str, type[TokenizerConfig]] = {"word": WordConfig, "bpe": BPEConfig, "bytes": BytesConfig}
"""Kinds of tokenizer by name."""


class Tokenizer:
    """A fixed vocabulary; made by a config's `train`, `load` or `from_fairseq_dictionary`."""

    def __init__(self, content: bytes) -> None:
        from tokenizers import Tokenizer as Backend

        self._content = content
        self.hash = hashlib.sha256(content).hexdigest()
        try:
            model = json.loads(content)["model"]
            # With a prefix, or without this field, the library may abort the process.
            if model["type"] == "BPE" and model["continuing_subword_prefix"]:
                raise ValueError("its continuing_subword_prefix is not null")
            self._backend = Backend.from_str(content.decode())
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"not a file of the tokenizers library ({error})") from None
        vocabulary: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size = len(vocabulary)
        if sorted(vocabulary.values()) != list(range(self.vocab_size)):
            raise ValueError("its ids are not 0, 1, 2, ... without gaps")
        self.document_end_id: int | None = None
        self.unknown_id: int | None = None
        if model["type"] == "WordLevel":
            specials: tuple[str, ...] = WORD_SPECIALS
            self.kind, self.start_id, self.unknown_id = "word", LINE_END_ID, UNKNOWN_ID
            self._ids = _WordIds(vocabulary)
            self._words = sorted(vocabulary, key=vocabulary.__getitem__)
        elif model["type"] == "BPE":
            specials = (END_OF_TEXT,)
            self.kind, self.start_id, self.document_end_id = "bpe", END_OF_TEXT_ID, END_OF_TEXT_ID
            self._backend.encode_special_tokens = True  # "<|endoftext|>" in the text is text
        else:
            raise ValueError(f"its model is {model['type']}; only WordLevel and BPE are known here")
        for id, token in enumerate(specials):
            if vocabulary.get(token) != id:
                raise ValueError(f"{token} must have id {id}, but has {vocabulary.get(token)}")

    def encode(self, text: str) -> NDArray[np.int32]:
        """Ids of a text, (N,) int32; nothing is added at its ends, newlines are line ends."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """`encode` for several texts, on all cores if the kind of tokenizer allows it."""
        if self.kind == "word":
            # Python's whitespace is the same as fairseq's (\s+), and a dict is ten times faster than the library.
            words = [text.replace("\n", " </s> ").split() for text in texts]
            return [np.fromiter(map(self._ids.__getitem__, w), dtype=np.int32, count=len(w)) for w in words]
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids.

        Word level gives the words with one space between them and a newline for `</s>`; BPE gives the exact
        text, without `<|endoftext|>`.
        """
        if self.kind == "bpe":
            return self._backend.decode([int(id) for id in ids], skip_special_tokens=True)
        words = ("\n" if id == LINE_END_ID else self._words[id] for id in ids)
        return re.sub(" ?\n ?", "\n", " ".join(words))

    def save(self, path: str | Path) -> None:
        """Write the file, whole or not at all."""
        with whole_file(Path(path)) as file:
            file.write(self._content)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a saved tokenizer.

        Raises:
            ValueError: no such file, or not one of ours.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"There is no tokenizer file {path}. It is written beside prepared streams and runs.")
        try:
            return cls(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path} cannot be used as tokenizer: {error}.") from None

    @classmethod
    def from_fairseq_dictionary(cls, path: str | Path) -> Tokenizer:
        """Word level from a fairseq dict.txt: `word count` on each line; line i (from 0) has id 4 + i.

        Raises:
            ValueError: no such file, a malformed line, a repeated word, or one of the four special words.
        """
        return word_tokenizer(list(_read_dictionary(Path(path))))


class _WordIds(dict[str, int]):
    """Ids by word; unknown words have the id of `<unk>`."""

    def __missing__(self, word: str) -> int:
        return UNKNOWN_ID


def word_tokenizer(words: Sequence[str]) -> Tokenizer:
    """Word-level tokenizer of these words, ids from 4 on, in this order."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers, processors

    vocabulary = {word: id for id, word in enumerate([*WORD_SPECIALS, *words])}
    backend = Backend(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", LINE_END_ID)]
    )
    return Tokenizer(backend.to_str(pretty=True).encode())


def pad_vocabulary(words: Sequence[str], multiple: int) -> list[str]:
    """Add madeupword0000, madeupword0001, ... until the words and the four specials are a multiple."""
    padded, known, number = list(words), set(words), 0
    while (len(WORD_SPECIALS) + len(padded)) % multiple:
        made_up = f"madeupword{number:04d}"
        number += 1
        if made_up not in known:
            padded.append(made_up)
    return padded


def _read_dictionary(path: Path) -> Iterator[str]:
    if not path.is_file():
        raise ValueError(
            f"dictionary = {path}: there is no such file. Give the dict.txt of the checkpoint's data."
        )
    seen: set[str] = set(WORD_SPECIALS)
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as file:  # without a byte order mark
            for number, line in enumerate(file, start=1):
                word, _, count = line.rstrip("\r\n").rpartition(" ")
                where = f"dictionary = {path}, line {number}"
                if not word or not count.isascii() or not count.isdigit():
                    raise ValueError(f"{where}: expected `word count`, got {_shown(line)}.")
                if word in seen:
                    kind = "special word" if word in WORD_SPECIALS else "word that occurred before"
                    raise ValueError(f"{where}: {_shown(word)} is a {kind}. Each word must occur once.")
                seen.add(word)
                yield word
    except UnicodeDecodeError:
        raise ValueError(f"dictionary = {path} is not UTF-8 text. Give the dict.txt of the checkpoint.") from None
    if len(seen) == len(WORD_SPECIALS):
        raise ValueError(f"dictionary = {path} is empty. Give the dict.txt of the checkpoint's data.")


def _shown(text: Any) -> str:
    return repr(text if len(text) <= 60 else text[:60] + "...")
