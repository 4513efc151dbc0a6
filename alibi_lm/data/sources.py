"""Which text a run uses: Python's standard library, or WikiText from a folder of `.tokens` files or the hub.

In WikiText a document is an article, in the standard library a file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alibi_lm.data import hub
from alibi_lm.data.stdlib import StandardLibrarySource
from alibi_lm.data.text import Passage, Source, wikitext_passages
from alibi_lm.files import file_record, file_unchanged
from alibi_lm.settings import setting

NAMES = ("python_stdlib", "wikitext2", "wikitext103")
TOKENS_FILES = {
    "train": "wiki.train.tokens",
    "validation": "wiki.valid.tokens",
    "test": "wiki.test.tokens",
}
HUB_CONFIGS = {"wikitext2": "wikitext-2-v1", "wikitext103": "wikitext-103-v1"}


@dataclass
class DataConfig:
    """Which text, and where its prepared token streams are kept."""

    name: str = "python_stdlib"
    """`python_stdlib`, `wikitext2` or `wikitext103`."""
    path: str | None = setting(None, counts="no")
    """Folder with wiki.train.tokens, wiki.valid.tokens, wiki.test.tokens; null takes the text from the hub.
    Only the files of the splits that are used have to exist. Not for `python_stdlib`."""
    cache_dir: str = setting("data", counts="no")
    """Folder of prepared streams; a relative one is relative to the current folder."""

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f"data.name = {self.name!r}. Allowed: {', '.join(NAMES)}.")
        if self.name == "python_stdlib" and self.path is not None:
            raise ValueError(
                f"data.path = {self.path} has no effect with data=python_stdlib, which reads the running "
                "Python's own library. Leave data.path out, or use data=wikitext103 or data=wikitext2 with it."
            )
        if not self.cache_dir:
            raise ValueError("data.cache_dir is empty. Give a folder for the prepared streams, such as `data`.")


def open_source(config: DataConfig) -> Source:
    """The source that the settings name. Nothing is read or downloaded yet, but obvious mistakes raise.

    Raises:
        ValueError: `data.path` is not a folder with such files, or the standard library has no sources.
    """
    if config.name == "python_stdlib":
        return StandardLibrarySource()
    if config.path is not None:
        return FolderSource(config.name, Path(config.path))
    return HubSource(config.name)


class FolderSource(Source):
    """WikiText from a local folder of `.tokens` files."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder.expanduser().absolute()
        self._setting = f"data.path = {folder}"

    def identity(self) -> dict[str, Any]:
        """Kind, name and place of the text."""
        return {"kind": "folder", "name": self.name, "path": str(self.folder.resolve())}

    def file(self, split: str) -> Path:
        """Path of the split's text."""
        return self.folder / TOKENS_FILES[split]

    def require(self, split: str, reason: str = "") -> None:
        """Raise ValueError, with what to do, unless the split can be read."""
        path = self.file(split)
        need = f"{TOKENS_FILES[split]}{f' ({reason})' if reason else ''}"
        if self.folder.is_file():
            raise ValueError(f"{self._setting} is a file. Give the folder that holds {need}.")
        if not self.folder.is_dir():
            raise ValueError(f"{self._setting} does not exist. Give the folder that holds {need}.")
        if not path.is_file():
            here = sorted(p.name for p in self.folder.glob("*.tokens")) or ["no .tokens file"]
            inside = sorted(p.parent.name for p in self.folder.glob(f"*/{path.name}"))
            hint = f" Did you mean data.path={self.folder / inside[0]}?" if inside else ""
            raise ValueError(f"{self._setting} has no {need}; it holds {', '.join(here[:8])}.{hint}")
        if path.stat().st_size == 0:
            raise ValueError(f"{path} is empty. Put the {split} text there, one paragraph a line.")

    def passages(self, split: str) -> Iterator[Passage]:
        """The split's text in order."""
        return wikitext_passages(self._lines(split))

    def _lines(self, split: str) -> Iterator[str]:
        path = self.file(split)
        with path.open("rb") as file:  # text mode would also break lines at a lone carriage return
            for number, raw in enumerate(file, start=1):
                try:
                    yield raw.removesuffix(b"\n").decode("utf-8")
                except UnicodeDecodeError as error:
                    raise ValueError(
                        f"{path}: line {number} is not UTF-8 ({error.reason} at byte {error.start + 1} of "
                        "the line). Convert the file to UTF-8, or get it anew if it was damaged on its way."
                    ) from None

    def record(self, split: str) -> dict[str, Any]:
        """What to remember of the split's source."""
        return file_record(self.file(split))

    def check(self, split: str, record: dict[str, Any], full: bool = False) -> str | None:
        """What differs from the record, or None."""
        path = self.file(split)
        if not path.is_file():
            return None
        return None if file_unchanged(path, record, full) else f"{path} has changed since it was prepared"

    def size(self, split: str) -> int | None:
        """Bytes of the split's text, if known."""
        return self.file(split).stat().st_size


class HubSource(Source):
    """WikiText from the Hugging Face hub, through `datasets` and its cache."""

    def __init__(self, name: str) -> None:
        self.name, self.config = name, HUB_CONFIGS[name]
        self._splits: dict[str, Any] = {}

    def identity(self) -> dict[str, Any]:
        """Kind, name and place of the text."""
        return {"kind": "hub", "name": self.name, "repository": hub.REPOSITORY, "config": self.config}

    def require(self, split: str, reason: str = "") -> None:
        """Raise ValueError, with what to do, unless the split can be read."""
        if split not in self._splits:
            self._splits[split] = hub.load_split(self.config, split)
        if len(self._splits[split]) == 0:
            raise ValueError(f"data={self.name}: the hub's {split} split of {hub.REPOSITORY} is empty.")

    def passages(self, split: str) -> Iterator[Passage]:
        """The split's text in order."""
        self.require(split)
        return wikitext_passages(hub.lines(self._splits[split]))

    def record(self, split: str) -> dict[str, Any]:
        """What to remember of the split's source."""
        self.require(split)
        return hub.record(self._splits[split])

    def check(self, split: str, record: dict[str, Any], full: bool = False) -> str | None:
        """What differs from the record, or None."""
        # A prepared stream is used without the hub, so that it also serves offline.
        return None

    def size(self, split: str) -> int | None:
        """Bytes of the split's text, if known."""
        return None
