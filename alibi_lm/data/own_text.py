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
import json
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from alibi_lm.data.config import DataConfig
from alibi_lm.data.text import BYTE_ORDER_MARK, SPLITS, Passage, Source, passages_of, split_of_file
from alibi_lm.files import fingerprint
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
    """

    borders = "A document is a file, a line of a .jsonl file, or a row of a table."

    def __init__(self, data: DataConfig, title: str) -> None:
        self.data, self.name, self.title = data, data.name, title

    @abstractmethod
    def documents(self, split: str) -> Iterable[str]:
        """The documents of a split, up to `data.max_tokens`; with split_by=hash, all documents."""

    @property
    @abstractmethod
    def split_by(self) -> str:
        """`data.split_by`, with `auto` resolved."""

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

    @property
    @abstractmethod
    def place(self) -> str:
        """The setting that names the text, for messages."""

    @abstractmethod
    def require_files(self, split: str) -> None:
        """Raise ValueError unless there is something to read."""


class FileSource(DocumentSource):
    """Text files in a folder or matching a glob, or a single file."""

    def __init__(self, data: DataConfig) -> None:
        assert data.path is not None
        root = Path(data.path).expanduser().absolute()
        super().__init__(data, root.name)
        self.root = root if root.is_dir() else root.parent
        if root.is_dir():
            found = [p for p in root.rglob("*") if p.suffix in READERS]
        else:
            found = [root] if root.is_file() else [Path(p) for p in glob.glob(str(root), recursive=True)]
        self.files = sorted(p for p in found if p.is_file() and not p.name.startswith("."))
        self.given = {split: [p for p in self.files if self._named(p, split)] for split in SPLITS}

    @property
    def place(self) -> str:
        return f"data.path = {self.data.path}"

    @property
    def split_by(self) -> str:
        if self.data.split_by != "auto":
            return self.data.split_by
        return "given" if self.given["train"] and self.given["validation"] else "hash"

    def _named(self, path: Path, split: str) -> bool:
        """Whether the folder or the name of a file says that it belongs to a split."""
        try:
            parts = path.relative_to(self.root).parts
        except ValueError:  # a glob that leaves the folder it begins in
            parts = path.parts[-2:]
        stem = parts[-1].replace("_", "-").replace(".", "-").split("-")[0]
        return any(part.lower() in SPLIT_NAMES[split] for part in (*parts[:-1], stem))

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"path": str(Path(str(self.data.path)).expanduser().absolute())}

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
            for text in READERS.get(path.suffix, _read_text)(path, self.data.column):
                if (path.suffix in READERS and path.suffix != ".txt") or self.split_by != "hash":
                    yield text
                    continue
                lines = text.removesuffix("\n").split("\n")
                for start in range(0, len(lines), HASHED_LINES):
                    yield "\n".join(lines[start : start + HASHED_LINES]) + "\n"

    def record(self, split: str) -> dict[str, Any]:
        files = self._files(split)
        digest = hashlib.sha256()
        for path in files:
            digest.update(f"{path.name}\n{fingerprint(path)}\n".encode())
        size = sum(path.stat().st_size for path in files)
        return {"folder": str(self.root), "files": len(files), "bytes": size, "sha256": digest.hexdigest()}

    def check(self, split: str, record: dict[str, Any], full: bool = False) -> str | None:
        if not self.files:
            return None
        same = self.record(split)["sha256"] == record["sha256"]
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
            names = file.schema_arrow.names
            if column not in names or not _is_text(file.schema_arrow.field(column).type):
                raise _no_column(str(path), column, names)
            for batch in file.iter_batches(batch_size=1024, columns=[column]):
                yield from (text or "" for text in batch.column(0).to_pylist())
    except pyarrow.ArrowInvalid as error:
        line = str(error).splitlines()[0]
        raise ValueError(f"{path} is not a .parquet file, or a damaged one ({line}). Get it anew.") from None


def _is_text(kind: Any) -> bool:
    import pyarrow

    return pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)


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
        super().__init__(data, title)
        self._rows: dict[str, Any] = {}
        self._names: list[str] | None = None

    @property
    def place(self) -> str:
        return f"data.repo = {self.title}"

    @property
    def split_by(self) -> str:
        return self.data.split_by

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"repository": self.data.repo, "config": self.data.config}

    def passages(self, split: str) -> Iterator[Passage]:
        self.require_files(split)
        return super().passages(split)

    def _own(self, split: str) -> str | None:
        """The dataset's own name of a split; None if it has none."""
        from alibi_lm.data.hub import split_names

        if self._names is None:
            self._names = split_names(str(self.data.repo), self.data.config)
        return next((name for name in SPLIT_NAMES[split] if name in (self._names or [])), None)

    def require_files(self, split: str) -> None:
        from alibi_lm.data.hub import load_split, stream_split

        require(self.split_by != "file", f"data.split_by = file with {self.place}. Use given, hash or none.")
        own = self._own(split)
        if self.split_by in ("hash", "none"):
            own = self._own("train") or next(iter(self._names or []), None)
        require(
            own is not None,
            f"{self.place} has no {split} split; it has {', '.join(self._names or [])}. Use data.split_by=hash, "
            "which divides its documents among the three splits.",
        )
        if split in self._rows:
            return
        if shared := next((rows for rows in self._rows.values() if rows.name == own), None):
            self._rows[split] = shared
            return
        repo, config, column = str(self.data.repo), self.data.config, self.data.column
        if self.data.max_tokens is None:
            rows = load_split(config, str(own), repo)
            if column not in rows.column_names:
                raise _no_column(self.place, column, rows.column_names)
            self._rows[split] = _Rows(str(own), rows, column)
        else:
            texts, names = stream_split(repo, config, str(own), column, self.data.max_tokens * BYTES_PER_TOKEN)
            if texts is None:
                raise _no_column(self.place, column, names)
            self._rows[split] = _Rows(str(own), texts, None)

    def documents(self, split: str) -> Iterable[str]:
        return iter(self._rows[split])

    def record(self, split: str) -> dict[str, Any]:
        self.require_files(split)
        return {"repository": self.data.repo, "config": self.data.config, "rows": len(self._rows[split].rows)}

    def check(self, split: str, record: dict[str, Any], full: bool = False) -> str | None:
        return None  # a prepared stream is used without the hub, so that it also serves offline

    def size(self, split: str) -> int | None:
        return None


class _Rows:
    """The documents of one of the dataset's own splits."""

    def __init__(self, name: str, rows: Any, column: str | None) -> None:
        self.name, self.rows, self.column = name, rows, column

    def __iter__(self) -> Iterator[str]:
        if self.column is None:
            yield from self.rows
            return
        for batch in self.rows.iter(batch_size=256):
            yield from (text or "" for text in batch[self.column])
