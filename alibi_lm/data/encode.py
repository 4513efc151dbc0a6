"""From a source's text to a token file: one pass, bounded memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from alibi_lm.data.text import Passage, Source
from alibi_lm.data.tokenizers import Tokenizer
from alibi_lm.files import fingerprint, sha256_of, whole_file

BATCH_CHARACTERS = 2_000_000
"""Text encoded at once: enough to keep all cores busy, little enough to stay below some 200 MB."""


def text_of(lines: list[str]) -> str:
    """The text of some lines, each with its line end."""
    return "\n".join(lines) + "\n"


def text_sha256(source: Source, split: str) -> str:
    """Digest of a split's text with its line ends; for an original WikiText file that of the file."""
    digest = hashlib.sha256()
    for passage in source.passages(split):
        digest.update(text_of(passage.lines).encode())
    return digest.hexdigest()


def training_lines(source: Source, label: str, progress: bool) -> Iterator[list[str]]:
    """The training text in lists of lines, behind a progress bar."""
    with _bar(source, "train", f"{label}: reading the training text", progress) as bar:
        for passage in source.passages("train"):
            yield passage.lines
            bar.update(len(text_of(passage.lines).encode()))


def encode_split(source: Source, split: str, tokenizer: Tokenizer, folder: Path, progress: bool) -> dict[str, Any]:
    """Write `<split>.bin` and `<split>.documents.npy`.

    Ids are little-endian uint16 where the vocabulary allows it, else int32. Where the tokenizer has a document
    end, it follows each document, the last one too.

    Returns:
        The split's part of the manifest: files, digests, and counts of tokens, words, bytes, lines, documents
        and unknown words.

    Raises:
        ValueError: the text is empty or not UTF-8.
    """
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<i4")
    path = folder / f"{split}.bin"
    digest, text_digest = hashlib.sha256(), hashlib.sha256()
    counts = {"tokens": 0, "words": 0, "bytes": 0, "lines": 0}
    unknown = 0
    documents: list[int] = []
    with whole_file(path) as file, _bar(source, split, f"{split}: encoding", progress) as bar:

        def write(ids: NDArray[Any]) -> None:
            raw = ids.astype(dtype).tobytes()
            file.write(raw)
            digest.update(raw)
            counts["tokens"] += len(ids)

        end = np.array([] if tokenizer.document_end_id is None else [tokenizer.document_end_id])
        for batch in _batches(source.passages(split)):
            blocks = tokenizer.encode_blocks([passage.lines for passage in batch])
            for passage, ids in zip(batch, blocks, strict=True):
                if passage.starts_document:
                    if documents:
                        write(end)
                    documents.append(counts["tokens"])
                write(ids)
                text = text_of(passage.lines)
                raw = text.encode()
                text_digest.update(raw)
                counts["bytes"] += len(raw)
                counts["lines"] += len(passage.lines)
                counts["words"] += len(text.split()) + len(passage.lines)
                if tokenizer.unknown_id is not None:
                    unknown += int(np.count_nonzero(ids == tokenizer.unknown_id))
                bar.update(len(raw))
        if not documents:
            raise ValueError(f"data={source.name}: the {split} text is empty.")
        write(end)
    documents_path = folder / f"{split}.documents.npy"
    with whole_file(documents_path) as file:
        np.save(file, np.array(documents, dtype=np.int64))
    return {
        "file": path.name,
        "dtype": dtype.str,
        **counts,
        "documents": len(documents),
        "unknown": unknown if tokenizer.unknown_id is not None else None,
        "sha256": digest.hexdigest(),
        "fingerprint": fingerprint(path),
        "documents_file": documents_path.name,
        "documents_sha256": sha256_of(documents_path),
        "documents_fingerprint": fingerprint(documents_path),
        "text_sha256": text_digest.hexdigest(),
    }


def _batches(passages: Iterator[Passage]) -> Iterator[list[Passage]]:
    batch: list[Passage] = []
    size = 0
    for passage in passages:
        batch.append(passage)
        size += sum(map(len, passage.lines)) + len(passage.lines)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _bar(source: Source, split: str, description: str, progress: bool) -> tqdm[Any]:
    """A bar over the bytes of a split; hidden where standard error is no terminal."""
    return tqdm(
        total=source.size(split),
        desc=description,
        unit="B",
        unit_scale=True,
        disable=None if progress else True,
        leave=False,
    )
