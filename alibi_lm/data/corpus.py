"""Token streams: text encoded once, kept as memory-mapped files beside a manifest, and checked at each opening.

    <cache_dir>/<source>/               a source: name, and a hash of its folder or of its text
        source.json                     tokenizers built from it, digests of its evaluation texts
        <tokenizer>.json                e.g. word8.json, bpe4096.json
        tokens-<tokenizer hash>/        the streams of one tokenizer
            manifest.json, tokenizer.json, <split>.bin, <split>.documents.npy

`open_corpus` opens what exists, without the text; `data.prepare` makes what is missing, from the text. A split
counts only if the manifest lists it.

Each opening checks sizes and a fingerprint (samples; everything up to 16 MiB) of the token files, `prepare` also
those of the source's files; `verify` reads everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alibi_lm import files
from alibi_lm.data.text import SPLITS, Source
from alibi_lm.data.tokenizers import TextTokenizer, Tokenizer
from alibi_lm.files import fingerprint, sha256_of, short_digest
from alibi_lm.settings import require

FORMAT = 1
"""Format number of the JSON files beside the streams; another number is refused."""
ENTRY_FIELDS: dict[str, type] = dict.fromkeys(
    ("dtype", "sha256", "text_sha256", "fingerprint", "documents_fingerprint"), str
) | dict.fromkeys(("tokens", "words", "bytes", "lines"), int)
"""The fields of a split in a manifest that are needed to open it."""


@dataclass
class TokenStream:
    """One split as a single stream of tokens."""

    split: str
    tokens: NDArray[Any]
    """(num_tokens,) uint16 or int32, memory-mapped, read-only."""
    documents: NDArray[np.int64]
    """(D,) int64: where documents start in the stream, rising; the first is 0."""
    words: int
    """Whitespace-separated words plus one per line, for any tokenizer."""
    bytes: int
    """UTF-8 bytes of the text with its line ends."""
    sha256: str
    """Hash of the token file."""
    text_sha256: str
    """Hash of the text with its line ends."""
    hash: str
    """12 hex digits, a hash of this split's text and tokenizer; their place does not matter."""

    @property
    def num_tokens(self) -> int:
        """Length of the stream."""
        return len(self.tokens)


@dataclass
class Corpus:
    """Prepared streams of one source and tokenizer."""

    folder: Path
    """The folder of the token files."""
    manifest: dict[str, Any]
    """What is known about source, tokenizer and streams; plain JSON."""
    tokenizer: TextTokenizer
    streams: dict[str, TokenStream] = field(repr=False)
    source: Source | None = field(default=None, repr=False)
    """The source of the text, if it is available."""

    @property
    def vocab_size(self) -> int:
        """Vocabulary size of the tokenizer."""
        return self.tokenizer.vocab_size

    @property
    def start_id(self) -> int:
        """The input before a stream's first token."""
        return self.tokenizer.start_id

    @cached_property
    def hash(self) -> str:
        """12 hex digits, a hash of the tokenizer and the source's validation and test texts, open or not.

        The training text affects it only through the tokenizer; `split(name).hash` identifies each text exactly.
        """
        texts = self.manifest["texts"]
        return short_digest(self.tokenizer.hash, *(texts.get(split, "") for split in ("validation", "test")))

    @property
    def name(self) -> str:
        """The text in a few words, for titles; it says if the text is not the original one."""
        return str(self.manifest["description"])

    def split(self, name: str) -> TokenStream:
        """The stream of one split.

        Raises:
            ValueError: an unknown split, or one that was not opened.
        """
        require(name in self.streams, f"split = {name!r} is not open here. Allowed: {', '.join(self.streams)}.")
        return self.streams[name]


def open_corpus(folder: Path, splits: Sequence[str] = SPLITS, tokenizer: TextTokenizer | None = None) -> Corpus:
    """Open the existing streams in a `tokens-...` folder, without their text.

    Args:
        folder: the `Corpus.folder` of a prepared corpus.
        splits: the requested splits.
        tokenizer: the tokenizer in use; None: the one kept beside the streams.

    Raises:
        ValueError: a split is missing, files are truncated or changed, or `tokenizer` is not the one that
            the streams were encoded with.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise ValueError(f"{folder} holds no finished streams (no manifest.json). Prepare them with `make data`.")
    known = manifest["tokenizer"]["sha256"]
    if tokenizer is None:
        tokenizer = Tokenizer.load(folder / "tokenizer.json")
        if tokenizer.hash != known:
            raise stale(f"{folder / 'tokenizer.json'} has changed since it was written", folder)
    require(
        tokenizer.hash == known,
        f"{folder} was encoded with another tokenizer ({known[:12]}) than the one in use "
        f"({tokenizer.hash[:12]}). Use the streams of this tokenizer, or delete {folder}.",
    )
    missing = [split for split in splits if split not in manifest["splits"]]
    require(
        not missing, f"{folder} has no stream of {', '.join(missing)}; it has {', '.join(manifest['splits'])}."
    )
    streams = {split: _open_stream(folder, split, manifest["splits"][split], tokenizer) for split in splits}
    return Corpus(folder, manifest, tokenizer, streams)


def _open_stream(folder: Path, split: str, entry: dict[str, Any], tokenizer: TextTokenizer) -> TokenStream:
    (path, documents_path), dtype = stream_files(folder, split), stream_dtype(tokenizer)
    if entry["dtype"] != dtype.str:
        raise stale(
            f"{folder / 'manifest.json'} says dtype {entry['dtype']!r} of {split}, not {dtype.str}", folder
        )
    for file, digest in ((path, entry["fingerprint"]), (documents_path, entry["documents_fingerprint"])):
        if not file.is_file():
            raise stale(f"{file} is missing", folder)
        size = file.stat().st_size
        if file == path and size != entry["tokens"] * dtype.itemsize:
            raise stale(f"{file} has {size:,} bytes instead of {entry['tokens'] * dtype.itemsize:,}", folder)
        if fingerprint(file) != digest:
            raise stale(f"{file} has changed since it was written", folder)
    try:
        documents = np.load(documents_path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise stale(f"{documents_path} is not an array of numbers ({error})", folder) from None
    return TokenStream(
        split=split,
        tokens=np.memmap(path, dtype, mode="r"),
        documents=documents,
        words=entry["words"],
        bytes=entry["bytes"],
        sha256=entry["sha256"],
        text_sha256=entry["text_sha256"],
        hash=short_digest(tokenizer.hash, entry["text_sha256"]),
    )


def stream_files(folder: Path, split: str) -> tuple[Path, Path]:
    """The token file of a split, and the file of where its documents start."""
    return folder / f"{split}.bin", folder / f"{split}.documents.npy"


def stream_dtype(tokenizer: TextTokenizer) -> np.dtype[Any]:
    """The dtype of the ids in a token file: little-endian uint16 if the vocabulary allows it, else int32."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<i4")


def verify(corpus: Corpus) -> None:
    """Read every byte of the streams, and of the source's files if they are available, and compare digests.

    Raises:
        ValueError: something differs; the message says what to delete.
    """
    for split, stream in corpus.streams.items():
        entry = corpus.manifest["splits"][split]
        for path, digest in zip(stream_files(corpus.folder, split), ("sha256", "documents_sha256"), strict=True):
            if sha256_of(path) != entry[digest]:
                raise stale(f"{path} has changed since it was written", corpus.folder)
        largest = max(int(stream.tokens[k : k + (1 << 24)].max()) for k in range(0, stream.num_tokens, 1 << 24))
        if largest >= corpus.vocab_size:
            raise stale(f"the {split} stream holds id {largest}, out of range", corpus.folder)
        problem = corpus.source and corpus.source.check(split, entry["source"], full=True)
        if problem:
            raise stale(problem, corpus.folder.parent)


def report(corpus: Corpus) -> str:
    """A description of a corpus: source, digests, tokenizer, and the counts of each split."""
    manifest, tokenizer = corpus.manifest, corpus.manifest["tokenizer"]
    source = ", ".join(f"{key} {value}" for key, value in manifest["source"].items() if key != "name")
    lines = [
        f"corpus      {corpus.name} ({corpus.hash})",
        f"source      {source}",
        f"folder      {corpus.folder}",
        f"tokenizer   {tokenizer.get('label') or corpus.tokenizer.kind}, vocabulary {corpus.vocab_size:,}, "
        f"sha256 {tokenizer['sha256']}",
    ]
    for split, stream in corpus.streams.items():
        entry = manifest["splits"][split]
        unknown = "" if entry.get("unknown") is None else f", {entry['unknown']:,} of them <unk>"
        count = f"{len(stream.documents):,} document{'s' if len(stream.documents) > 1 else ''}"
        lines += [
            f"{split:<11} {stream.num_tokens:,} tokens{unknown}; {stream.words:,} words, {stream.bytes:,} bytes, "
            f"{entry['lines']:,} lines, {count}",
            f"            text sha256 {stream.text_sha256}",
            f"            tokens sha256 {stream.sha256}",
            *(f"            {entry[key]}" for key in ("identity", "remark") if entry.get(key)),
        ]
    return "\n".join(lines)


# --- JSON files of ours -----------------------------------------------------------------------------


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """A stream folder's manifest with all fields that are needed, None if there is none."""
    path = folder / "manifest.json"
    manifest = read_json(path, folder)
    if manifest is None:
        return None
    top: dict[str, type] = {"tokenizer": dict, "splits": dict, "source": dict, "texts": dict, "description": str}
    expect(path, folder, manifest, top)
    expect(path, folder, manifest["tokenizer"], {"sha256": str})
    for entry in manifest["splits"].values():
        expect(path, folder, entry, ENTRY_FIELDS | {"source": dict})
    return manifest


def expect(path: Path, folder: Path, content: Any, kinds: dict[str, type]) -> None:
    """Raise, saying to delete `folder`, unless a part of the JSON file at `path` has these fields."""
    for name, kind in kinds.items():
        if type(content.get(name) if isinstance(content, dict) else None) is not kind:
            raise stale(f"{path} has no {name}, or not one of type {kind.__name__}", folder)


def read_json(path: Path, folder: Path) -> dict[str, Any] | None:
    """A JSON file of ours, None if there is none; `folder` is what to delete if it is damaged."""
    try:
        content = files.read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise stale(f"{path} cannot be read ({error})", folder) from None
    if content.get("format") != FORMAT:
        raise stale(f"{path} is not of format {FORMAT}", folder)
    return content


def stale(problem: str, folder: Path) -> ValueError:
    """The error for something that has changed since it was prepared."""
    return ValueError(f"{problem}. Delete {folder} to prepare it again.")
