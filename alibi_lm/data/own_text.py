"""A user's own text: .txt, .jsonl and .parquet files, and any text dataset of the Hugging Face hub.

    .txt      a file is a document (and so is any file with another ending that is given by its name or by a glob)
    .jsonl    a line is a document: the text in its field `data.column`
    .parquet  a row is a document: the text in its column `data.column`

`data.split_by` says how documents are assigned to the three splits:

    given     folders or files named train, validation (valid, val, dev) and test; on the hub, the set's own splits
    file      whole files: of every 100, in an order drawn by their names, 2 are for validation and 2 for test
    hash      documents, 96 to 2 to 2 by a hash of their text, so that equal ones share a split. A .txt file is
              cut into documents of 64 lines each here.
    none      every split is the whole text, for evaluation
    auto      given if the text has such names, else hash
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from alibi_lm.data import hub
from alibi_lm.data.config import DataConfig
from alibi_lm.data.text import BYTE_ORDER_MARK, SPLITS, Passage, Source, passages_of, split_of_file
from alibi_lm.files import fingerprint, sha256_of
from alibi_lm.settings import require

SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}
HASHED_LINES = 64
"""Lines of a .txt file that form a document if documents are assigned to splits by hash."""
BYTES_PER_TOKEN = 4
"""Bytes per token of `data.max_tokens`, so that the budget takes the same text with every tokenizer."""


class DocumentSource(Source):
    """A source of documents, each a string, that are assigned to splits.

    Args:
        data: the settings.
        title: the text in a few words.
        place: the setting that names the text, for messages.
    """

    borders = "A document is a file, a line of a .jsonl file, or a row of a table."

    def __init__(self, data: DataConfig, title: str, place: str) -> None:
        self.data, self.name, self.title, self.place = data, data.name, title, place

    @abstractmethod
    def require_files(self, split: str) -> None:
        """Raise ValueError unless there is something to read."""

    @abstractmethod
    def documents(self, split: str) -> Iterable[str]:
        """The documents of a split, up to `data.max_tokens`; with split_by=hash, all documents."""

    @property
    def split_by(self) -> str:
        """What deals documents to the splits."""
        return self.data.split_by

    def identity(self) -> dict[str, Any]:
        settings = {"column": self.data.column, "split_by": self.split_by, "max_tokens": self.data.max_tokens}
        return {"kind": self.name, "name": self.name, "title": self.title} | settings

    def passages(self, split: str) -> Iterator[Passage]:
        dealt = self.split_by == "hash"
        budget = self.data.max_tokens and self.data.max_tokens * BYTES_PER_TOKEN
        for text in self.documents(split):
            if budget is not None and budget <= 0:
                return
            budget = budget and budget - len(text.encode())
            if not text.strip() or (dealt and split_of_file(text) != split):
                continue
            yield from passages_of(text)

    def require(self, split: str, reason: str = "") -> None:
        self.require_files(split)
        why = f" ({reason})" if reason else ""
        if next(self.passages(split), None) is None:
            advice = "Give more text, or data.split_by=file, given or none." if self.split_by == "hash" else ""
            raise ValueError(f"{self.place}: there is no text for the {split} split{why}. {advice}".strip())


class FileSource(DocumentSource):
    """Text files in a folder or matching a glob, or a single file."""

    def __init__(self, data: DataConfig) -> None:
        assert data.path is not None
        self.path = root = Path(data.path).expanduser().absolute()
        super().__init__(data, root.name, f"data.path = {data.path}")
        if root.is_dir():
            self.root, found = root, [p for p in root.rglob("*") if p.suffix in READERS]
        elif root.is_file():
            self.root, found = root.parent, [root]
        else:
            plain = itertools.takewhile(lambda part: not glob.has_magic(part), root.parts[:-1])
            self.root, found = Path(*plain), [Path(p) for p in glob.glob(str(root), recursive=True)]
        self.files = sorted(p for p in found if p.is_file() and not p.name.startswith("."))
        self.given = {split: [p for p in self.files if self._named(p, split)] for split in SPLITS}

    @property
    def split_by(self) -> str:
        if self.data.split_by != "auto":
            return self.data.split_by
        return "given" if self.given["train"] and self.given["validation"] else "hash"

    def _named(self, path: Path, split: str) -> bool:
        """Whether the folder or the name of a file says that it belongs to a split."""
        parts = path.relative_to(self.root).parts
        stem = parts[-1].replace("_", "-").replace(".", "-").split("-")[0]
        return any(part.lower() in SPLIT_NAMES[split] for part in (*parts[:-1], stem))

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"path": str(self.path)}

    def _files(self, split: str) -> list[Path]:
        if self.split_by == "given":
            return self.given[split]
        if self.split_by != "file":
            return self.files
        drawn = sorted(self.files, key=lambda p: hashlib.sha256(str(p.relative_to(self.root)).encode()).digest())
        held = max(1, len(drawn) * 2 // 100)
        parts = {"validation": drawn[:held], "test": drawn[held : 2 * held], "train": drawn[2 * held :]}
        return sorted(parts[split])

    def require_files(self, split: str) -> None:
        endings = ", ".join(READERS)
        require(
            bool(self.files),
            f"{self.place}: there is no such text. Give a file, a glob in quotes, or a folder that holds "
            f"{endings} files.",
        )
        found = self._files(split)
        names = ", ".join(SPLIT_NAMES[split])
        advice = f"Name a folder or a file {names}" if self.split_by == "given" else "Give three files or more"
        require(
            bool(found),
            f"{self.place} with data.split_by={self.split_by}: none of its {len(self.files)} files is in the "
            f"{split} split. {advice}, or use data.split_by=hash or none.",
        )

    def documents(self, split: str) -> Iterable[str]:
        for path in self._files(split):
            read = READERS.get(path.suffix, _read_text)
            for text in read(path, self.data.column):
                if read is _read_text and self.split_by == "hash":
                    yield from (block.text for block in passages_of(text, HASHED_LINES))
                else:
                    yield text

    def record(self, split: str) -> dict[str, Any]:
        files = self._files(split)
        size, digests = sum(path.stat().st_size for path in files), self._digest(split, fingerprint)
        content = self._digest(split, sha256_of)
        return {
            "folder": str(self.root), "files": len(files), "bytes": size, "sha256": digests, "content": content
        }  # fmt: skip

    def _digest(self, split: str, digest: Callable[[Path], str]) -> str:
        """A hash of the names and digests of a split's files."""
        lines = [f"{path.name}\n{digest(path)}\n" for path in self._files(split)]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def check(self, split: str, record: dict[str, Any], full: bool = False) -> str | None:
        if not self.files:
            return None
        same = self._digest(split, fingerprint) == record["sha256"]
        if same and full and "content" in record:  # an earlier version did not note it
            same = self._digest(split, sha256_of) == record["content"]
        return None if same else f"{self.place}: the {split} text has changed since it was prepared"

    def size(self, split: str) -> int | None:
        return None if self.split_by == "hash" else sum(path.stat().st_size for path in self._files(split))


# --- kinds of files ------------------------------------------------------------------------------


def _read_text(path: Path, column: str) -> Iterator[str]:
    yield _decoded(path, path.read_bytes())


def _decoded(path: Path, content: bytes) -> str:
    if b"\0" in content[:65536]:
        raise ValueError(f"{path} is not text: it contains NUL bytes. Give UTF-8 text, or leave the file out.")
    try:
        return content.decode("utf-8").removeprefix(BYTE_ORDER_MARK)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line} is not UTF-8 ({error.reason} at byte {error.start + 1} of the file). Convert "
            "the file, for example: iconv -f latin1 -t utf-8."
        ) from None


def _read_jsonl(path: Path, column: str) -> Iterator[str]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            try:
                record = json.loads(_decoded(path, raw))
            except (json.JSONDecodeError, RecursionError) as error:
                raise ValueError(
                    f"{path}, line {number} is not JSON ({error}). Correct or delete the line."
                ) from None
            fields = sorted(record) if isinstance(record, dict) else []
            if not isinstance(record, dict) or not isinstance(record.get(column), str):
                raise _no_column(f"{path}, line {number}", column, fields)
            yield record[column]


def _read_parquet(path: Path, column: str) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            schema, texts = file.schema_arrow, (pyarrow.string(), pyarrow.large_string())
            if column not in schema.names or schema.field(column).type not in texts:
                raise _no_column(str(path), column, schema.names)
            for batch in file.iter_batches(batch_size=1024, columns=[column]):
                yield from (text or "" for text in batch.column(0).to_pylist())
    except pyarrow.ArrowInvalid as error:
        line = str(error).splitlines()[0]
        raise ValueError(f"{path} is not a .parquet file, or a damaged one ({line}). Get it anew.") from None


def _no_column(where: str, column: str, names: Iterable[str]) -> ValueError:
    return ValueError(
        f"data.column = {column}: {where} has no text of that name; it has "
        f"{', '.join(names) or 'no fields at all'}. Give data.column=<name>."
    )


READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {
    ".txt": _read_text,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
"""Readers by file name ending; any other file is read as .txt if it is given by name."""


# --- the hub --------------------------------------------------------------------------------------


class HubTextSource(DocumentSource):
    """Any text dataset of the Hugging Face hub, or a folder with the same layout, through `datasets`.

    With `data.max_tokens` rows are streamed and only as many as needed are downloaded; they are kept in memory.
    """

    def __init__(self, data: DataConfig) -> None:
        title = str(data.repo) + (f" {data.config}" if data.config else "")
        super().__init__(data, title, f"data.repo = {title}")
        self._names: list[str] | None = None
        self._rows: dict[str, Any] = {}
        """What was read of the set's own splits: a `datasets.Dataset`, or a list of texts."""

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"repository": self.data.repo, "config": self.data.config}

    def require_files(self, split: str) -> None:
        self._load(split)

    def _load(self, split: str) -> Any:
        """The rows that the documents of a split are among."""
        repo, config, column = str(self.data.repo), self.data.config, self.data.column
        require(self.split_by != "file", f"data.split_by = file with {self.place}. Use given, hash or none.")
        if self._names is None:
            self._names = hub.split_names(repo, config)
        dealt = self.split_by in ("hash", "none")
        allowed = SPLIT_NAMES["train" if dealt else split]
        own = next((name for name in allowed if name in self._names), None)
        if own is None and dealt:
            own = next(iter(self._names), None)
        if own is None:
            raise ValueError(
                f"{self.place} has no {split} split; it has {', '.join(self._names)}. Use data.split_by=hash, "
                "which divides its documents among the three splits."
            )
        if own not in self._rows:
            if self.data.max_tokens is None:
                found = hub.load_split(repo, config, own)
                names, known = found.column_names, column in found.column_names
            else:
                most = self.data.max_tokens * BYTES_PER_TOKEN
                found, names = hub.stream_split(repo, config, own, column, most)
                known = found is not None
            if not known:
                raise _no_column(self.place, column, names)
            self._rows[own] = found
        return self._rows[own]

    def documents(self, split: str) -> Iterable[str]:
        rows = self._load(split)
        return rows if isinstance(rows, list) else hub.texts(rows, self.data.column)

    def record(self, split: str) -> dict[str, Any]:
        return {"repository": self.data.repo, "config": self.data.config, "rows": len(self._load(split))}
