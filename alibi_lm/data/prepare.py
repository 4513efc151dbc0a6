"""Preparing token streams: a text is encoded once, by a tokenizer that is built from it or was made elsewhere.

See `data.corpus` for the files. `prepare` makes what is missing, from the text. A split counts only if the
manifest lists it, and the manifest is replaced last, after its files are whole and on the disk. So an interruption
at any moment leaves either a finished split or none; a lock keeps two processes from preparing the same source at
once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from alibi_lm.data import wikitext
from alibi_lm.data.config import DataConfig
from alibi_lm.data.corpus import (
    FORMAT,
    Corpus,
    expect,
    open_corpus,
    read_json,
    read_manifest,
    stale,
    stream_dtype,
    stream_files,
)
from alibi_lm.data.own_text import FileSource, HubTextSource
from alibi_lm.data.text import SPLITS, Passage, Source, StandardLibrarySource
from alibi_lm.data.tokenizers import TextTokenizer, Tokenizer, TokenizerConfig
from alibi_lm.files import fingerprint, sha256_of, short_digest, whole_file, write_json
from alibi_lm.settings import require, require_one_of

BATCH_CHARACTERS = 2_000_000
"""Characters encoded at once: enough to keep all cores busy, but below about 200 MB of memory."""


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
    from filelock import FileLock

    for split in splits:
        require_one_of("split", split, SPLITS)
    source = open_source(data)
    try:
        home = _SourceFolder(Path(data.cache_dir).expanduser(), source)
        corpus = home.open(tokenizer, splits)
        if corpus is None:
            home.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(home.folder / ".lock"):
                corpus = home.build(tokenizer, splits)
    except (OSError, RuntimeError) as error:  # RuntimeError: no locks on this file system, ~ of an unknown user
        raise ValueError(
            f"data.cache_dir = {data.cache_dir}: the streams could not be prepared there ({error}). The folder "
            "must be writable and have room, and the text must be readable."
        ) from error
    return corpus


def open_source(config: DataConfig) -> Source:
    """The source that the settings name. Nothing is downloaded yet, but obvious mistakes raise.

    Raises:
        ValueError: `data.path` cannot be a folder, or the standard library has no sources.
    """
    match config.name:
        case "python_stdlib":
            return StandardLibrarySource()
        case "text":
            return FileSource(config)
        case "hub":
            return HubTextSource(config)
    if config.path is not None:
        return wikitext.FolderSource(config.name, config.path)
    return wikitext.HubSource(config.name)


# --- the folder of a source -----------------------------------------------------------------------


class _SourceFolder:
    """The folder of one source: its tokenizers, its digests, and a folder of streams for each tokenizer."""

    def __init__(self, cache: Path, source: Source) -> None:
        self.source, self.identity = source, source.identity()
        version = f"-{self.identity['python']}" if "python" in self.identity else ""
        digest = short_digest(json.dumps(self.identity, sort_keys=True))
        self.folder = cache / f"{source.name}{version}-{digest[:8]}"
        self.path = self.folder / "source.json"

    def open(self, wanted: TokenizerConfig | TextTokenizer, splits: Sequence[str]) -> Corpus | None:
        """The corpus if all of it exists and is unchanged, None if something has yet to be made."""
        tokenizer = self._find(wanted, self._index())
        entries = self._entries(tokenizer)
        if tokenizer is None or any(split not in entries for split in splits):
            return None
        for split in splits:
            self._check(split, entries[split]["source"])
        corpus = open_corpus(self._streams(tokenizer), splits, tokenizer)
        corpus.source = self.source
        return corpus

    def build(self, wanted: TokenizerConfig | TextTokenizer, splits: Sequence[str]) -> Corpus:
        """Make what is missing, under the lock, and open it; meanwhile other processes may have made a part."""
        index = self._index()
        tokenizer = self._find(wanted, index)
        if isinstance(wanted, TokenizerConfig) and tokenizer is None:
            self.source.require("train", f"tokenizer={wanted.name} is built from the training text")
        entries = self._entries(tokenizer)
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
        corpus = self.open(wanted, splits)
        assert corpus is not None
        return corpus

    def _streams(self, tokenizer: TextTokenizer) -> Path:
        return self.folder / f"tokens-{tokenizer.hash[:12]}"

    def _entries(self, tokenizer: TextTokenizer | None) -> dict[str, Any]:
        """The finished splits of a tokenizer; None has none."""
        manifest = None if tokenizer is None else read_manifest(self._streams(tokenizer))
        return {} if manifest is None else manifest["splits"]

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
        entry["identity"] = wikitext.identify(self.source.name, split, entry, index["texts"])
        labels = [k for k, v in index["tokenizers"].items() if v["sha256"] == tokenizer.hash]
        if split == "train":
            for label in labels:
                wikitext.check_vocabulary(entry["identity"], label, tokenizer.vocab_size)
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
    return wikitext.TITLES[identity["name"]] + (f" (not the original: {', '.join(other)})" if other else "")


# --- encoding: one pass over the text, bounded memory ----------------------------------------------


def encode_split(source: Source, split: str, tokenizer: TextTokenizer, folder: Path) -> dict[str, Any]:
    """Write `<split>.bin` and `<split>.documents.npy`; returns the split's part of the manifest.

    Where the tokenizer has a document end, it follows each document, the last one too.

    Raises:
        ValueError: the text is empty or not UTF-8.
    """
    (path, documents_path), dtype = stream_files(folder, split), stream_dtype(tokenizer)
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
    alone = "1 document: no intervals, which need two or more."
    return {
        "file": path.name,
        "dtype": dtype.str,
        **counts,
        "documents": len(documents),
        "remark": None if len(documents) > 1 else f"{alone} {source.borders}",
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
    joined, size = Passage([], True), 0
    for passage in passages:
        if joined.lines and (passage.starts_document or size >= BATCH_CHARACTERS):
            yield joined
            joined, size = Passage([], passage.starts_document), 0
        joined.lines.extend(passage.lines)
        size += passage.characters
    if joined.lines:
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
