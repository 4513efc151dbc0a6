"""Token streams: text encoded once, kept as memory-mapped files beside a manifest, and checked at each opening.

    <cache_dir>/<source>/               a source: name, and a hash of its folder or of its text
        source.json                     tokenizers built from it, digests of its evaluation texts
        <tokenizer>.json                e.g. word8.json, bpe4096.json
        tokens-<tokenizer hash>/        the streams of one tokenizer
            manifest.json, tokenizer.json, <split>.bin, <split>.documents.npy

`prepare` makes what is missing, from the text; `open_corpus` opens what is there, without the text. A split is
believed only if the manifest lists it, and the manifest is replaced last, after its files are whole and on the
disk. So an interruption at any moment leaves either a finished split or none; a lock keeps two processes from
preparing the same source at once.

Each opening checks sizes and a fingerprint (samples; everything up to 16 MiB) of the token files, `prepare` also
of the source's files; `verify` reads everything.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from alibi_lm.data import wikitext
from alibi_lm.data.streams import (
    FORMAT,
    Corpus,
    TokenStream,
    expect,
    open_corpus,
    read_json,
    read_manifest,
    report,
    short,
    stale,
    verify,
)
from alibi_lm.data.text import SPLITS, DataConfig, Passage, Source, StandardLibrarySource
from alibi_lm.data.tokenizers import TextTokenizer, Tokenizer, TokenizerConfig
from alibi_lm.files import fingerprint, sha256_of, whole_file, write_json
from alibi_lm.settings import require

__all__ = ["Corpus", "TokenStream", "open_corpus", "prepare", "report", "verify"]

BATCH_CHARACTERS = 2_000_000
"""Text encoded at once: enough to keep all cores busy, little enough to stay below some 200 MB."""


def prepare(
    data: DataConfig,
    tokenizer: TokenizerConfig | TextTokenizer,
    splits: Sequence[str] = SPLITS,
    progress: bool = True,
) -> Corpus:
    """Make the token streams of a text that are not there yet, and open all that are wanted.

    Args:
        data: which text, and where streams are kept.
        tokenizer: settings of one to be built from the training split (once; it is kept), or a finished one,
            such as that of a run: words unknown to it become `<unk>`.
        splits: those wanted; only they, and the training text where a tokenizer must be built, have to exist.
        progress: show bars where standard error is a terminal.

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
                home.build(tokenizer, splits, progress)
                corpus = home.open(tokenizer, splits)
    except (OSError, RuntimeError) as error:  # RuntimeError: no locks on this file system, ~ of an unknown user
        raise ValueError(
            f"data.cache_dir = {data.cache_dir}: the streams could not be prepared there ({error}). The folder "
            "must be writable and have room, the text readable."
        ) from error
    assert corpus is not None
    return corpus


def open_source(config: DataConfig) -> Source:
    """The source that the settings name. Nothing is downloaded yet, but obvious mistakes raise.

    Raises:
        ValueError: `data.path` cannot be a folder, or the standard library has no sources.
    """
    if config.name == "python_stdlib":
        return StandardLibrarySource()
    if config.path is not None:
        return wikitext.FolderSource(config.name, config.path)
    from alibi_lm.data.hub import HubSource

    return HubSource(config.name)


class _SourceFolder:
    """The folder of one source: its tokenizers, its digests, and a folder of streams for each tokenizer."""

    def __init__(self, cache: Path, source: Source) -> None:
        self.source, self.identity = source, source.identity()
        version = f"-{self.identity['python']}" if "python" in self.identity else ""
        key = short(json.dumps(self.identity, sort_keys=True))[:8]
        self.folder = cache / f"{source.name}{version}-{key}"
        self.path = self.folder / "source.json"

    def open(self, wanted: TokenizerConfig | TextTokenizer, splits: Sequence[str]) -> Corpus | None:
        """The corpus if all of it is there and unchanged, None if something has yet to be made."""
        tokenizer = self._find(wanted, self._index())
        if tokenizer is None:
            return None
        entries = self._entries(tokenizer)
        if any(split not in entries for split in splits):
            return None
        for split in splits:
            self._check(split, entries[split]["source"])
        corpus = open_corpus(self._streams(tokenizer), splits, tokenizer)
        corpus.source = self.source
        return corpus

    def build(self, wanted: TokenizerConfig | TextTokenizer, splits: Sequence[str], progress: bool) -> None:
        """Make what is missing, under the lock; other processes may have made a part meanwhile."""
        index = self._index()
        tokenizer = self._find(wanted, index)
        if isinstance(wanted, TokenizerConfig) and tokenizer is None:
            self.source.require("train", f"tokenizer={wanted.name} is built from the training text")
        entries = {} if tokenizer is None else self._entries(tokenizer)
        missing = [split for split in splits if split not in entries]
        for split in missing:
            self.source.require(split)
        for leftover in [*self.folder.glob("*.tmp"), *self.folder.glob("tokens-*/*.tmp")]:
            leftover.unlink(missing_ok=True)  # of an interrupted preparation
        self._note_texts(index, missing)
        if isinstance(wanted, TokenizerConfig) and tokenizer is None:
            tokenizer = self._train(wanted, index, progress)
        assert tokenizer is not None
        for split in missing:
            self._encode(split, tokenizer, index, progress)

    def _streams(self, tokenizer: TextTokenizer) -> Path:
        return self.folder / f"tokens-{tokenizer.hash[:12]}"

    def _entries(self, tokenizer: TextTokenizer) -> dict[str, Any]:
        """The finished splits of a tokenizer."""
        manifest = read_manifest(self._streams(tokenizer))
        return {} if manifest is None else dict(manifest["splits"])

    def _index(self) -> dict[str, Any]:
        """The content of source.json; empty where nothing was prepared."""
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
        """Keep the digests of the evaluation texts, those at hand, so that each opening gives the same hash.

        Comes before the long work, so that damage in a wanted split is found at once.
        """
        for split in ("validation", "test"):
            if split in index["texts"]:
                continue
            try:
                self.source.require(split)
                index["texts"][split] = text_sha256(self.source, split)
            except ValueError:
                if split in wanted:
                    raise
        write_json(self.path, index)

    def _train(self, config: TokenizerConfig, index: dict[str, Any], progress: bool) -> Tokenizer:
        """Build a tokenizer from the training text and keep it."""
        record = self.source.record("train")
        tokenizer = config.train(_training_lines(self.source, config.label, progress))
        file = f"{config.label}.json"
        tokenizer.save(self.folder / file)
        index["tokenizers"][config.label] = {"file": file, "sha256": tokenizer.hash, "train": record}
        write_json(self.path, index)
        return tokenizer

    def _encode(self, split: str, tokenizer: TextTokenizer, index: dict[str, Any], progress: bool) -> None:
        """Encode one split; it counts as prepared once the manifest lists it."""
        folder = self._streams(tokenizer)
        folder.mkdir(parents=True, exist_ok=True)
        record = self.source.record(split)
        entry = encode_split(self.source, split, tokenizer, folder, progress)
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
    other = [split for split, entry in splits.items() if str(entry.get("identity")).startswith("not")]
    return wikitext.TITLES[identity["name"]] + (f" (not the original: {', '.join(other)})" if other else "")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    from filelock import FileLock

    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        yield


# -- encoding: one pass over the text, bounded memory ----------------------------------------------------------


def text_sha256(source: Source, split: str) -> str:
    """Digest of a split's text with its line ends; for an original WikiText file that of the file."""
    digest = hashlib.sha256()
    for passage in source.passages(split):
        digest.update(_text_of(passage.lines).encode())
    return digest.hexdigest()


def encode_split(
    source: Source, split: str, tokenizer: TextTokenizer, folder: Path, progress: bool
) -> dict[str, Any]:
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
                text = _text_of(passage.lines)
                raw = text.encode()
                text_digest.update(raw)
                counts["bytes"] += len(raw)
                counts["lines"] += len(passage.lines)
                counts["words"] += len(text.split()) + len(passage.lines)
                if tokenizer.unknown_id is not None:
                    unknown += int(np.count_nonzero(ids == tokenizer.unknown_id))
                bar.update(len(raw))
        require(bool(documents), f"data={source.name}: the {split} text is empty.")
        write(end)
    documents_path = folder / f"{split}.documents.npy"
    with whole_file(documents_path) as file:
        np.save(file, np.array(documents, dtype=np.int64))
    return {
        "file": path.name,
        "dtype": dtype.str,
        **counts,
        "documents": len(documents),
        "remark": _remark(len(documents), source.borders),
        "unknown": unknown if tokenizer.unknown_id is not None else None,
        "sha256": digest.hexdigest(),
        "fingerprint": fingerprint(path),
        "documents_file": documents_path.name,
        "documents_sha256": sha256_of(documents_path),
        "documents_fingerprint": fingerprint(documents_path),
        "text_sha256": text_digest.hexdigest(),
    }


def _remark(documents: int, borders: str) -> str | None:
    return None if documents > 1 else f"1 document: no intervals, which need two or more. {borders}"


def _training_lines(source: Source, label: str, progress: bool) -> Iterator[list[str]]:
    """The training text in lists of lines, behind a progress bar."""
    with _bar(source, "train", f"{label}: reading the training text", progress) as bar:
        for passage in source.passages("train"):
            yield passage.lines
            bar.update(len(_text_of(passage.lines).encode()))


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


def _text_of(lines: list[str]) -> str:
    return "\n".join(lines) + "\n"


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
