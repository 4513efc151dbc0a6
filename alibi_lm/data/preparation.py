"""The folder of one source: what was built from it, and building what is missing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alibi_lm.data import encode, wikitext
from alibi_lm.data.streams import FORMAT, Corpus, open_prepared, read_json, read_manifest, short, stale
from alibi_lm.data.text import SPLITS, Source
from alibi_lm.data.tokenizers import Tokenizer, TokenizerConfig
from alibi_lm.files import sha256_of, write_json


class SourceFolder:
    """The folder of one source: its tokenizers, its digests, and a folder of streams for each tokenizer."""

    def __init__(self, cache: Path, source: Source) -> None:
        self.source, self.identity = source, source.identity()
        self.folder = cache / _folder_name(self.identity)
        self.index = self.folder / "source.json"

    def stream_folder(self, tokenizer: Tokenizer) -> Path:
        """Where the streams of a tokenizer lie."""
        return self.folder / f"tokens-{tokenizer.hash[:12]}"

    def open(self, wanted: TokenizerConfig | Tokenizer, splits: Sequence[str]) -> Corpus | None:
        """The corpus if all of it is there and unchanged, None if something has yet to be made."""
        index = self.read()
        tokenizer = wanted if isinstance(wanted, Tokenizer) else self.built(wanted, index)
        if tokenizer is None:
            return None
        folder = self.stream_folder(tokenizer)
        manifest = read_manifest(folder)
        if manifest is None or any(split not in manifest["splits"] for split in splits):
            return None
        for split in splits:
            self.check(split, manifest["splits"][split]["source"])
        corpus = open_prepared(folder, splits, tokenizer)
        corpus.source = self.source
        return corpus

    def build(self, wanted: TokenizerConfig | Tokenizer, splits: Sequence[str], progress: bool) -> None:
        """Make what is missing, under the lock; other processes may have made a part meanwhile."""
        index = self.read()
        tokenizer = wanted if isinstance(wanted, Tokenizer) else self.built(wanted, index)
        if tokenizer is None:
            assert isinstance(wanted, TokenizerConfig)
            self.source.require("train", f"tokenizer={wanted.name} is built from the training text")
        entries: dict[str, Any] = {}
        if tokenizer is not None:
            folder = self.stream_folder(tokenizer)
            entries = (read_manifest(folder) or {"splits": {}})["splits"]
        missing = [split for split in splits if split not in entries]
        for split in missing:
            self.source.require(split)
        _remove_leftovers(self.folder)
        self.note_texts(index, missing)
        if tokenizer is None:
            assert isinstance(wanted, TokenizerConfig)
            tokenizer = self.train(wanted, index, progress)
        for split in missing:
            self.encode(split, tokenizer, index, progress)

    def read(self) -> dict[str, Any]:
        """The index of the source's folder; empty where nothing was prepared."""
        index = read_json(self.index, self.folder)
        for name in ("texts", "tokenizers"):
            if index is not None and not isinstance(index.get(name), dict):
                raise stale(f"{self.index} has no {name}", self.folder)
        return index or {"format": FORMAT, "source": self.identity, "texts": {}, "tokenizers": {}}

    def built(self, config: TokenizerConfig, index: dict[str, Any]) -> Tokenizer | None:
        """The tokenizer of these settings if it was built before."""
        entry = index["tokenizers"].get(config.label)
        if entry is None:
            return None
        self.check("train", entry["train"])
        path = self.folder / entry["file"]
        if not path.is_file() or sha256_of(path) != entry["sha256"]:
            raise stale(f"{path} is missing or has changed since it was written", self.folder)
        return Tokenizer.load(path)

    def check(self, split: str, record: dict[str, Any]) -> None:
        """Raise if the split's source is no longer what was prepared."""
        problem = self.source.check(split, record)
        if problem:
            raise stale(problem, self.folder)

    def note_texts(self, index: dict[str, Any], wanted: Sequence[str]) -> None:
        """Keep the digests of the evaluation texts, those at hand, so that each opening gives the same hash.

        Comes before the long work, so that damage in a wanted split is found at once.
        """
        for split in ("validation", "test"):
            if split in index["texts"]:
                continue
            try:
                self.source.require(split)
                index["texts"][split] = encode.text_sha256(self.source, split)
            except ValueError:
                if split in wanted:
                    raise
        write_json(self.index, index)

    def train(self, config: TokenizerConfig, index: dict[str, Any], progress: bool) -> Tokenizer:
        """Build a tokenizer from the training text and keep it."""
        record = self.source.record("train")
        tokenizer = config.train(encode.training_lines(self.source, config.label, progress))
        file = f"{config.label}.json"
        tokenizer.save(self.folder / file)
        index["tokenizers"][config.label] = {"file": file, "sha256": tokenizer.hash, "train": record}
        write_json(self.index, index)
        return tokenizer

    def encode(self, split: str, tokenizer: Tokenizer, index: dict[str, Any], progress: bool) -> None:
        """Encode one split; it counts as prepared once the manifest lists it."""
        folder = self.stream_folder(tokenizer)
        folder.mkdir(parents=True, exist_ok=True)
        record = self.source.record(split)
        entry = encode.encode_split(self.source, split, tokenizer, folder, progress)
        self.check(split, record)
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


def _folder_name(identity: dict[str, Any]) -> str:
    key = short(json.dumps(identity, sort_keys=True))[:8]
    version = f"-{identity['python']}" if "python" in identity else ""
    return f"{identity['name']}{version}-{key}"


def _description(identity: dict[str, Any], splits: dict[str, Any]) -> str:
    if "python" in identity:
        return f"Python {identity['python']} standard library"
    other = [split for split, entry in splits.items() if entry["identity"].startswith("not")]
    return wikitext.TITLES[identity["name"]] + (f" (not the original: {', '.join(other)})" if other else "")


def _remove_leftovers(folder: Path) -> None:
    """Delete what an interrupted preparation left; called under the lock."""
    for path in [*folder.glob("*.tmp"), *folder.glob("tokens-*/*.tmp")]:
        path.unlink(missing_ok=True)
