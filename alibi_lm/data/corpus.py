"""Token streams: text encoded once, kept as memory-mapped files beside a manifest, and checked at each opening.

    <cache_dir>/<source>/               a source: name, and a hash of its folder or of its text
        source.json                     tokenizers built from it, digests of its evaluation texts
        <tokenizer>.json                e.g. word8.json, bpe4096.json
        tokens-<tokenizer hash>/        the streams of one tokenizer
            manifest.json, tokenizer.json, <split>.bin, <split>.documents.npy

`prepare` makes what is missing, from the text; `open_corpus` opens what exists, without the text. A split counts
only if the manifest lists it, and the manifest is replaced last, after its files are whole and on the disk. So an
interruption at any moment leaves either a finished split or none; a lock keeps two processes from preparing the
same source at once.

Each opening checks sizes and a fingerprint (samples; everything up to 16 MiB) of the token files, `prepare` also
those of the source's files; `verify` reads everything.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from alibi_lm import files
from alibi_lm.data import text as texts
from alibi_lm.data.config import DataConfig
from alibi_lm.data.text import SPLITS, Passage, Source
from alibi_lm.data.tokenizers import TextTokenizer, Tokenizer, TokenizerConfig
from alibi_lm.files import fingerprint, sha256_of, whole_file, write_json
from alibi_lm.settings import require

FORMAT = 1
"""Format number of the JSON files beside the streams; another number is refused."""
ENTRY_FIELDS: dict[str, type] = dict.fromkeys(
    ("dtype", "sha256", "text_sha256", "fingerprint", "documents_fingerprint"), str
) | dict.fromkeys(("tokens", "words", "bytes", "lines"), int)
"""The fields of a split in a manifest that are needed to open it."""
ONE_DOCUMENT = "1 document: no intervals, which need two or more."
BATCH_CHARACTERS = 2_000_000
"""Characters encoded at once: enough to keep all cores busy, but below about 200 MB of memory."""


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
        return short(self.tokenizer.hash, *(texts.get(split, "") for split in ("validation", "test")))

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


def prepare(
    data: DataConfig,
    tokenizer: TokenizerConfig | TextTokenizer,
    splits: Sequence[str] = SPLITS,
) -> Corpus:
    """Make the missing token streams of a text, and open all requested ones.

    Args:
        data: which text, and where streams are kept.
        tokenizer: settings of a tokenizer to be built from the training split (once; it is kept), or a finished
            one, such as that of a run: words unknown to it become `<unk>`.
        splits: the requested splits; only they must exist, and the training text if a tokenizer must be built.

    Raises:
        ValueError: text missing, empty, damaged or changed since it was prepared; prepared files truncated,
            changed or of another tokenizer. The message says what to do or delete.
    """
    for split in splits:
        require(split in SPLITS, f"split = {split!r}. Allowed: {', '.join(SPLITS)}.")
    source = open_source(data)
    try:
        home = _SourceFolder(Path(data.cache_dir).expanduser(), source)
        corpus = home.open(tokenizer, splits)
        if corpus is None:
            with _locked(home.folder):
                home.build(tokenizer, splits)
                corpus = home.open(tokenizer, splits)
    except (OSError, RuntimeError) as error:  # RuntimeError: no locks on this file system, ~ of an unknown user
        raise ValueError(
            f"data.cache_dir = {data.cache_dir}: the streams could not be prepared there ({error}). The folder "
            "must be writable and have room, and the text must be readable."
        ) from error
    assert corpus is not None
    return corpus


def open_source(config: DataConfig) -> Source:
    """The source that the settings name. Nothing is downloaded yet, but obvious mistakes raise.

    Raises:
        ValueError: `data.path` cannot be a folder, or the standard library has no sources.
    """
    if config.name == "python_stdlib":
        return texts.StandardLibrarySource()
    if config.name in ("text", "hub"):
        from alibi_lm.data.own_text import FileSource, HubTextSource

        return FileSource(config) if config.name == "text" else HubTextSource(config)
    if config.path is not None:
        return texts.FolderSource(config.name, config.path)
    from alibi_lm.data.hub import HubSource

    return HubSource(config.name)


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
    (path, documents_path), dtype = _stream_files(folder, split), _dtype(tokenizer)
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
        hash=short(tokenizer.hash, entry["text_sha256"]),
    )


def _stream_files(folder: Path, split: str) -> tuple[Path, Path]:
    return folder / f"{split}.bin", folder / f"{split}.documents.npy"


def _dtype(tokenizer: TextTokenizer) -> np.dtype[Any]:
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<i4")


def verify(corpus: Corpus) -> None:
    """Read every byte of the streams, and of the source's files if they are available, and compare digests.

    Raises:
        ValueError: something differs; the message says what to delete.
    """
    for split, stream in corpus.streams.items():
        entry = corpus.manifest["splits"][split]
        for path, digest in zip(_stream_files(corpus.folder, split), ("sha256", "documents_sha256"), strict=True):
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


# --- the folder of a source -----------------------------------------------------------------------


class _SourceFolder:
    """The folder of one source: its tokenizers, its digests, and a folder of streams for each tokenizer."""

    def __init__(self, cache: Path, source: Source) -> None:
        self.source, self.identity = source, source.identity()
        version = f"-{self.identity['python']}" if "python" in self.identity else ""
        self.folder = cache / f"{source.name}{version}-{short(json.dumps(self.identity, sort_keys=True))[:8]}"
        self.path = self.folder / "source.json"

    def open(self, wanted: TokenizerConfig | TextTokenizer, splits: Sequence[str]) -> Corpus | None:
        """The corpus if all of it exists and is unchanged, None if something has yet to be made."""
        tokenizer = self._find(wanted, self._index())
        entries = {} if tokenizer is None else self._entries(tokenizer)
        if tokenizer is None or any(split not in entries for split in splits):
            return None
        for split in splits:
            self._check(split, entries[split]["source"])
        corpus = open_corpus(self._streams(tokenizer), splits, tokenizer)
        corpus.source = self.source
        return corpus

    def build(self, wanted: TokenizerConfig | TextTokenizer, splits: Sequence[str]) -> None:
        """Make what is missing, under the lock; meanwhile other processes may have made a part."""
        index = self._index()
        tokenizer = self._find(wanted, index)
        if isinstance(wanted, TokenizerConfig) and tokenizer is None:
            self.source.require("train", f"tokenizer={wanted.name} is built from the training text")
        entries = {} if tokenizer is None else self._entries(tokenizer)
        missing = [split for split in splits if split not in entries]
        for split in missing:
            self.source.require(split)
        for leftover in [*self.folder.glob("*.tmp"), *self.folder.glob("tokens-*/*.tmp")]:
            leftover.unlink(missing_ok=True)  # from an interrupted preparation
        self._note_texts(index, missing)
        if isinstance(wanted, TokenizerConfig) and tokenizer is None:
            tokenizer = self._train(wanted, index)
        assert tokenizer is not None
        for split in missing:
            self._encode(split, tokenizer, index)

    def _streams(self, tokenizer: TextTokenizer) -> Path:
        return self.folder / f"tokens-{tokenizer.hash[:12]}"

    def _entries(self, tokenizer: TextTokenizer) -> dict[str, Any]:
        """The finished splits of a tokenizer."""
        return (read_manifest(self._streams(tokenizer)) or {"splits": {}})["splits"]

    def _index(self) -> dict[str, Any]:
        """The content of source.json; empty if nothing was prepared."""
        index = read_json(self.path, self.folder)
        if index is None:
            return {"format": FORMAT, "source": self.identity, "texts": {}, "tokenizers": {}}
        expect(self.path, self.folder, index, {"texts": dict, "tokenizers": dict})
        for entry in index["tokenizers"].values():
            expect(self.path, self.folder, entry, {"file": str, "sha256": str, "train": dict})
        return index

    def _find(self, wanted: TokenizerConfig | TextTokenizer, index: dict[str, Any]) -> TextTokenizer | None:
        """The finished tokenizer, None if it has yet to be built."""
        if not isinstance(wanted, TokenizerConfig):
            return wanted
        entry = index["tokenizers"].get(wanted.label)
        if entry is None:
            return None
        self._check("train", entry["train"])
        path = self.folder / entry["file"]
        if not path.is_file() or sha256_of(path) != entry["sha256"]:
            raise stale(f"{path} is missing or has changed since it was written", self.folder)
        return Tokenizer.load(path)

    def _check(self, split: str, record: dict[str, Any]) -> None:
        """Raise if the split's source is no longer what was prepared."""
        try:
            problem = self.source.check(split, record)
        except (KeyError, TypeError):
            problem = f"what was noted of the {split} text in {self.folder} is damaged"
        if problem:
            raise stale(problem, self.folder)

    def _note_texts(self, index: dict[str, Any], wanted: Sequence[str]) -> None:
        """Store the digests of the available evaluation texts, with line ends, so that each opening has one hash.

        This comes before the long work, so that damage in a requested split is found at once.
        """
        for split in ("validation", "test"):
            if split in index["texts"]:
                continue
            digest = hashlib.sha256()
            try:
                self.source.require(split)
                for passage in self.source.passages(split):
                    digest.update(passage.text.encode())
                index["texts"][split] = digest.hexdigest()
            except ValueError:
                if split in wanted:
                    raise
        write_json(self.path, index)

    def _train(self, config: TokenizerConfig, index: dict[str, Any]) -> Tokenizer:
        """Build a tokenizer from the training text and keep it."""
        record = self.source.record("train")

        def pieces() -> Iterator[str]:
            with _bar(self.source, "train", f"{config.label}: reading the training text") as bar:
                for passage in self.source.passages("train"):
                    text = passage.text
                    yield text
                    bar.update(len(text.encode()))

        tokenizer = config.train(pieces())
        file = f"{config.label}.json"
        tokenizer.save(self.folder / file)
        index["tokenizers"][config.label] = {"file": file, "sha256": tokenizer.hash, "train": record}
        write_json(self.path, index)
        return tokenizer

    def _encode(self, split: str, tokenizer: TextTokenizer, index: dict[str, Any]) -> None:
        """Encode one split; it counts as prepared once the manifest lists it."""
        folder = self._streams(tokenizer)
        folder.mkdir(parents=True, exist_ok=True)
        record = self.source.record(split)
        entry = encode_split(self.source, split, tokenizer, folder)
        self._check(split, record)
        if index["texts"].get(split, entry["text_sha256"]) != entry["text_sha256"]:
            raise stale(f"the {split} text has changed since its source was first prepared", self.folder)
        entry["source"] = record
        entry["identity"] = texts.identify(self.source.name, split, entry, index["texts"])
        labels = [k for k, v in index["tokenizers"].items() if v["sha256"] == tokenizer.hash]
        if split == "train":
            for label in labels:
                texts.check_vocabulary(entry["identity"], label, tokenizer.vocab_size)
        tokenizer.save(folder / "tokenizer.json")
        manifest = read_manifest(folder) or {
            "format": FORMAT,
            "tokenizer": {
                "kind": tokenizer.kind,
                "label": labels[0] if labels else None,
                "vocab_size": tokenizer.vocab_size,
                "sha256": tokenizer.hash,
            },
            "splits": {},
        }
        splits = {**manifest["splits"], split: entry}
        manifest["splits"] = {name: splits[name] for name in SPLITS if name in splits}
        manifest |= {"source": self.identity, "texts": index["texts"]}
        manifest["description"] = _description(self.identity, manifest["splits"])
        write_json(folder / "manifest.json", manifest)


def _description(identity: dict[str, Any], splits: dict[str, Any]) -> str:
    if "python" in identity:
        return f"Python {identity['python']} standard library"
    if "title" in identity:
        return str(identity["title"])
    other = [split for split, entry in splits.items() if str(entry.get("identity")).startswith("not")]
    return texts.TITLES[identity["name"]] + (f" (not the original: {', '.join(other)})" if other else "")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    from filelock import FileLock

    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        yield


# --- encoding: one pass over the text, bounded memory ----------------------------------------------


def encode_split(source: Source, split: str, tokenizer: TextTokenizer, folder: Path) -> dict[str, Any]:
    """Write `<split>.bin` and `<split>.documents.npy`; returns the split's part of the manifest.

    Ids are little-endian uint16 if the vocabulary allows it, else int32. If the tokenizer has a document end, it
    follows each document, including the last one.

    Raises:
        ValueError: the text is empty or not UTF-8.
    """
    (path, documents_path), dtype = _stream_files(folder, split), _dtype(tokenizer)
    digest, text_digest = hashlib.sha256(), hashlib.sha256()
    counts = {"tokens": 0, "words": 0, "bytes": 0, "lines": 0}
    unknown = None if tokenizer.unknown_id is None else 0
    documents: list[int] = []
    with whole_file(path) as file, _bar(source, split, f"{split}: encoding") as bar:

        def write(ids: NDArray[Any]) -> None:
            raw = ids.astype(dtype).tobytes()
            file.write(raw)
            digest.update(raw)
            counts["tokens"] += len(ids)

        end = np.array([] if tokenizer.document_end_id is None else [tokenizer.document_end_id])
        passages = source.passages(split)
        for batch in _batches(_whole(passages) if getattr(tokenizer, "whole_documents", False) else passages):
            pieces = [passage.text for passage in batch]
            for passage, text, ids in zip(batch, pieces, tokenizer.encode_batch(pieces), strict=True):
                if passage.starts_document:
                    if documents:
                        write(end)
                    documents.append(counts["tokens"])
                write(ids)
                raw = text.encode()
                text_digest.update(raw)
                counts["bytes"] += len(raw)
                counts["lines"] += len(passage.lines)
                counts["words"] += len(text.split()) + len(passage.lines)
                if unknown is not None:
                    unknown += int(np.count_nonzero(ids == tokenizer.unknown_id))
                bar.update(len(raw))
        require(bool(documents), f"data={source.name}: the {split} text is empty.")
        write(end)
    with whole_file(documents_path) as file:
        np.save(file, np.array(documents, dtype=np.int64))
    return {
        "file": path.name,
        "dtype": dtype.str,
        **counts,
        "documents": len(documents),
        "remark": None if len(documents) > 1 else f"{ONE_DOCUMENT} {source.borders}",
        "unknown": unknown,
        "sha256": digest.hexdigest(),
        "fingerprint": fingerprint(path),
        "documents_file": documents_path.name,
        "documents_sha256": sha256_of(documents_path),
        "documents_fingerprint": fingerprint(documents_path),
        "text_sha256": text_digest.hexdigest(),
    }


def _whole(passages: Iterator[Passage]) -> Iterator[Passage]:
    """Documents in one piece each, up to BATCH_CHARACTERS."""
    joined: Passage | None = None
    size = 0
    for passage in passages:
        if joined is None or passage.starts_document or size >= BATCH_CHARACTERS:
            if joined is not None:
                yield joined
            joined, size = Passage([], passage.starts_document), 0
        joined.lines.extend(passage.lines)
        size += passage.characters
    if joined is not None:
        yield joined


def _batches(passages: Iterator[Passage]) -> Iterator[list[Passage]]:
    batch: list[Passage] = []
    size = 0
    for passage in passages:
        batch.append(passage)
        size += passage.characters
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _bar(source: Source, split: str, description: str) -> tqdm[Any]:
    """A progress bar over the bytes of a split; hidden if standard error is not a terminal."""
    size = source.size(split)
    return tqdm(total=size, desc=description, unit="B", unit_scale=True, disable=None, leave=False)


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


def short(*parts: str) -> str:
    """A hash, 12 hex digits, of these strings."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]
