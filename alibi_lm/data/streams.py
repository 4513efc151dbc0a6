"""Prepared token streams as they lie on the disk: opening them, and noticing that they are damaged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alibi_lm.data.text import Source
from alibi_lm.data.tokenizers import Tokenizer
from alibi_lm.files import fingerprint

FORMAT = 1
"""Of the JSON files beside the streams; another number is refused."""
ENTRY_FIELDS: dict[str, type] = dict.fromkeys(
    ("file", "documents_file", "dtype", "sha256", "text_sha256", "fingerprint", "documents_fingerprint"), str
) | {"tokens": int, "words": int, "bytes": int, "source": dict}
"""Of a split in a manifest: what opening it relies on."""


@dataclass
class TokenStream:
    """One split as a single stream of tokens."""

    split: str
    tokens: NDArray[Any]
    """(num_tokens,) uint16 or int32, memory-mapped, read-only."""
    documents: NDArray[np.int64]
    """(D,) int64: where documents start in the stream, rising; the first is 0."""
    words: int
    """Whitespace-separated words plus one a line, whatever the tokenizer."""
    bytes: int
    """UTF-8 bytes of the text with its line ends."""
    sha256: str
    """Of the token file."""
    text_sha256: str
    """Of the text with its line ends."""
    hash: str
    """12 hex digits: this split's text and tokenizer, wherever they came from."""

    @property
    def num_tokens(self) -> int:
        """Length of the stream."""
        return len(self.tokens)


@dataclass
class Corpus:
    """Prepared streams of one source and tokenizer."""

    folder: Path
    """Holds the token files."""
    manifest: dict[str, Any]
    """What is known of source, tokenizer and streams; plain JSON."""
    tokenizer: Tokenizer
    streams: dict[str, TokenStream] = field(repr=False)
    source: Source | None = field(default=None, repr=False)

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.tokenizer.vocab_size

    @property
    def start_id(self) -> int:
        """The input before a stream's first token."""
        return self.tokenizer.start_id

    @cached_property
    def hash(self) -> str:
        """12 hex digits: the tokenizer and the source's validation and test texts, whatever splits are open.

        The training text shows in it only through the tokenizer; `split(name).hash` tells each text exactly.
        """
        texts = self.manifest["texts"]
        return short(self.tokenizer.hash, *(texts.get(split, "") for split in ("validation", "test")))

    @property
    def name(self) -> str:
        """The text in a few words, for titles; says so where it is not the original one."""
        return str(self.manifest["description"])

    @property
    def description(self) -> str:
        """Same as `name`."""
        return self.name

    def split(self, name: str) -> TokenStream:
        """The stream of one split.

        Raises:
            ValueError: unknown, or not among the splits that were opened.
        """
        if name not in self.streams:
            raise ValueError(f"split = {name!r} is not open here. Allowed: {', '.join(self.streams)}.")
        return self.streams[name]


def open_prepared(folder: Path, splits: Sequence[str], tokenizer: Tokenizer | None = None) -> Corpus:
    """Open the streams in a `tokens-...` folder as they are, without their source.

    Raises:
        ValueError: a split is not there, files are truncated or changed, or `tokenizer` is not the one that
            the streams were encoded with.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise ValueError(f"{folder} holds no finished streams (no manifest.json). Prepare them by `make data`.")
    if tokenizer is not None and manifest["tokenizer"]["sha256"] != tokenizer.hash:
        raise ValueError(
            f"{folder} was encoded with another tokenizer ({manifest['tokenizer']['sha256'][:12]}) than the one "
            f"in use ({tokenizer.hash[:12]}). Use the streams of this tokenizer, or delete {folder}."
        )
    if tokenizer is None:
        tokenizer = Tokenizer.load(folder / "tokenizer.json")
        if tokenizer.hash != manifest["tokenizer"]["sha256"]:
            raise stale(f"{folder / 'tokenizer.json'} has changed since it was written", folder)
    missing = [split for split in splits if split not in manifest["splits"]]
    if missing:
        raise ValueError(
            f"{folder} has no stream of {', '.join(missing)}; it has {', '.join(manifest['splits'])}."
        )
    streams = {split: _open_stream(folder, split, manifest["splits"][split], tokenizer) for split in splits}
    return Corpus(folder, manifest, tokenizer, streams)


def _open_stream(folder: Path, split: str, entry: dict[str, Any], tokenizer: Tokenizer) -> TokenStream:
    path, documents_path = folder / entry["file"], folder / entry["documents_file"]
    for file, size, digest in (
        (path, entry["tokens"] * np.dtype(entry["dtype"]).itemsize, entry["fingerprint"]),
        (documents_path, None, entry["documents_fingerprint"]),
    ):
        if not file.is_file():
            raise stale(f"{file} is missing", folder)
        if size is not None and file.stat().st_size != size:
            raise stale(f"{file} has {file.stat().st_size:,} bytes instead of {size:,}", folder)
        if fingerprint(file) != digest:
            raise stale(f"{file} has changed since it was written", folder)
    return TokenStream(
        split=split,
        tokens=np.memmap(path, dtype=entry["dtype"], mode="r"),
        documents=_documents(documents_path, folder),
        words=entry["words"],
        bytes=entry["bytes"],
        sha256=entry["sha256"],
        text_sha256=entry["text_sha256"],
        hash=short(tokenizer.hash, entry["text_sha256"]),
    )


def _documents(path: Path, folder: Path) -> NDArray[np.int64]:
    try:
        documents = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise stale(f"{path} is not an array of numbers ({error})", folder) from None
    if documents.ndim != 1 or documents.dtype != np.int64:
        raise stale(f"{path} holds {documents.dtype} of shape {documents.shape}, not a list of int64", folder)
    return documents


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """A stream folder's manifest with the fields that are relied on, None if there is none.

    Raises:
        ValueError: a field is missing, of the wrong type, or names a file elsewhere.
    """
    path = folder / "manifest.json"
    manifest = read_json(path, folder)
    if manifest is None:
        return None
    _expect(path, folder, manifest, {"tokenizer": dict, "splits": dict, "source": dict, "description": str})
    _expect(path, folder, manifest["tokenizer"], {"sha256": str})
    for split, entry in manifest["splits"].items():
        _expect(path, folder, {split: entry}, {split: dict})
        _expect(path, folder, entry, ENTRY_FIELDS)
        if entry["dtype"] not in ("<u2", "<i4"):
            raise stale(f"{path} says dtype {entry['dtype']!r} of {split}; <u2 and <i4 are known", folder)
        for name in (entry["file"], entry["documents_file"]):
            if Path(name).name != name:
                raise stale(f"{path} names the file {name!r}; it must lie beside the manifest", folder)
    return manifest


def _expect(path: Path, folder: Path, content: dict[str, Any], kinds: dict[str, type]) -> None:
    for name, kind in kinds.items():
        if type(content.get(name)) is not kind:
            raise stale(f"{path} has no {name}, or not one of type {kind.__name__}", folder)


def read_json(path: Path, folder: Path) -> dict[str, Any] | None:
    """A JSON file of ours, None if there is none; `folder` is what to delete if it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise stale(f"{path} cannot be read ({error})", folder) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise stale(f"{path} is not of format {FORMAT}", folder)
    return content


def stale(problem: str, folder: Path) -> ValueError:
    """The error for something that is not as it was when it was prepared."""
    return ValueError(f"{problem}. Delete {folder} to prepare it anew.")


def short(*parts: str) -> str:
    """12 hex digits that stand for these strings."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]
