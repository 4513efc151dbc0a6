"""What the original WikiText splits are known by, so that each result can say which text it stands on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Original:
    """Facts of an original word-level split (`.tokens`, not raw)."""

    lines: int
    words: int
    """Words, one line end a line included."""
    sha256: str | None = None


# Words: the paper's and fairseq's counts. Lines: torchtext's tables. The digests are of the published files.
ORIGINALS: dict[str, dict[str, Original]] = {
    "wikitext103": {
        "train": Original(1_801_350, 103_227_021),
        "validation": Original(3_760, 217_646, "9aee9f52d6e77de6c7751fc5e7c44287db3ec0eaf15477098acc6b93c1c4250b"),
        "test": Original(4_358, 245_569, "56db52eb157b1ab5c89646eef70510c1eca6e12a3bfdb99f0d6b05b4eacb75b9"),
    },
    "wikitext2": {
        "train": Original(36_718, 2_088_628),
        "validation": Original(3_760, 217_646),
        "test": Original(4_358, 245_569),
    },
}
WIKITEXT103_VOCAB_SIZE = 267_744
"""Word-level ids of the original training split, padded to a multiple of 8."""
TITLES = {"wikitext2": "WikiText-2", "wikitext103": "WikiText-103"}


def identify(name: str, split: str, counts: Mapping[str, Any], texts: Mapping[str, str]) -> str | None:
    """Say whether a split's text is the original one.

    WikiText-2 and WikiText-103 share the articles of validation and test, and so their counts; only the digest
    tells them apart. The training splits are known by lines and words.

    Args:
        name: `wikitext103` or `wikitext2`; others give None.
        split: train, validation or test.
        counts: the split's `lines`, `words` and `text_sha256`.
        texts: `text_sha256` of the evaluation splits beside it, as far as they are at hand.

    Returns:
        A phrase that begins with "the original" or "not the original".

    Raises:
        ValueError: the text is the original by its digest or its lines, but its words are not as many as known.
    """
    if name not in ORIGINALS:
        return None
    title, original = f"{TITLES[name]} {'training' if split == 'train' else split} split", ORIGINALS[name][split]
    different = f"not the original {title}"
    if original.sha256 is not None:
        if counts["text_sha256"] != original.sha256:
            return different
    elif not _beside_originals(name, texts) or counts["lines"] != original.lines:
        return f"{different} ({counts['words']:,} words, not {original.words:,})"
    if counts["words"] != original.words:
        if name == "wikitext2":
            return f"{different} ({counts['words']:,} words, not {original.words:,})"
        raise ValueError(
            f"The {title} has {original.words:,} words with line ends, but {counts['words']:,} were counted in "
            f"{counts['lines']:,} lines. The file was changed; get the word-level wikitext-103-v1 text anew."
        )
    return f"the original {title}" + ("" if original.sha256 else " (by its counts)")


def check_vocabulary(identity: str | None, tokenizer_label: str, vocab_size: int) -> None:
    """Assert the known vocabulary of WikiText-103's training split.

    Raises:
        ValueError: the training split is the original one and its word-level vocabulary is not.
    """
    known = identity is not None and identity.startswith("the original WikiText-103 training")
    if known and tokenizer_label == "word8" and vocab_size != WIKITEXT103_VOCAB_SIZE:
        raise ValueError(
            f"The original WikiText-103 has a vocabulary of {WIKITEXT103_VOCAB_SIZE:,}, but {vocab_size:,} were "
            "found in its training split. The file was changed; get the word-level wikitext-103-v1 text anew."
        )


def _beside_originals(name: str, texts: Mapping[str, str]) -> bool:
    """Whether the evaluation splits at hand do not speak against the originals of this name."""
    known = {split: o.sha256 for split, o in ORIGINALS["wikitext103"].items() if o.sha256}
    same = [texts[split] == sha256 for split, sha256 in known.items() if split in texts]
    return all(same) if name == "wikitext103" else not any(same)
