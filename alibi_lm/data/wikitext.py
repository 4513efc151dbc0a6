"""WikiText: from a folder of `.tokens` files or from the hub, its articles, and what is known of the originals."""

from __future__ import annotations

import codecs
import stat
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from alibi_lm.data import hub
from alibi_lm.data.text import BYTE_ORDER_MARK, PASSAGE_LINES, Passage, Source
from alibi_lm.files import file_record, file_unchanged

TOKENS_FILES = {"train": "wiki.train.tokens", "validation": "wiki.valid.tokens", "test": "wiki.test.tokens"}


class WikiTextSource(Source):
    """WikiText, wherever its lines are."""

    borders = "A document begins at a line of the form ` = Title = ` between blank lines."

    @abstractmethod
    def lines(self, split: str) -> Iterator[str]:
        """The split's lines without their line ends, as in the original `.tokens` file."""

    def passages(self, split: str) -> Iterator[Passage]:
        return wikitext_passages(self.lines(split), heading_style(self.lines(split)))


class FolderSource(WikiTextSource):
    """WikiText from a local folder of `.tokens` files."""

    def __init__(self, name: str, path: str) -> None:
        self.name, self._setting = name, f"data.path = {path}"
        try:
            self.folder = Path(path).expanduser().absolute()
            self._place = str(self.folder.resolve())
        except (OSError, RuntimeError, ValueError) as error:  # a loop of links, ~ of an unknown user
            raise self._unreadable(error) from None

    def _unreadable(self, error: Exception) -> ValueError:
        return ValueError(f"{self._setting} cannot be read ({error}). Give a readable folder of .tokens files.")

    def identity(self) -> dict[str, Any]:
        # The place only names the prepared folder. Texts are compared by their digests.
        return {"kind": "folder", "name": self.name, "path": self._place}

    def require(self, split: str, reason: str = "") -> None:
        path = self.folder / TOKENS_FILES[split]
        need = f"{path.name}{f' ({reason})' if reason else ''}"
        folder = self._mode(self.folder)
        if not stat.S_ISDIR(folder):
            problem = "is a file" if folder else "does not exist"
            raise ValueError(f"{self._setting} {problem}. Give the folder that holds {need}.")
        if not stat.S_ISREG(self._mode(path)):
            here = sorted(p.name for p in self.folder.glob("*.tokens") if p.is_file()) or ["no .tokens file"]
            inside = sorted(p.parent.name for p in self.folder.glob(f"*/{path.name}"))
            hint = f" Did you mean data.path={self.folder / inside[0]}?" if inside else ""
            raise ValueError(f"{self._setting} has no {need}; it holds {', '.join(here[:8])}.{hint}")
        if path.stat().st_size <= len(codecs.BOM_UTF8) and path.read_bytes() in (b"", codecs.BOM_UTF8):
            raise ValueError(f"{path} is empty. Put the {split} text there, one paragraph per line.")

    def _mode(self, path: Path) -> int:
        """The file mode as in `stat`; 0 if nothing is there."""
        try:
            return path.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            return 0
        except (OSError, ValueError) as error:
            raise self._unreadable(error) from None

    def lines(self, split: str) -> Iterator[str]:
        path = self.folder / TOKENS_FILES[split]
        try:
            with path.open("rb") as file:  # text mode would also break lines at a lone carriage return
                for number, raw in enumerate(file, start=1):
                    line = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
                    yield line.removesuffix(b"\n").decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}: line {number} is not UTF-8 ({error.reason} at byte {error.start + 1} of "
                "the line). Convert the file to UTF-8, or get it again if it was damaged on its way."
            ) from None
        except OSError as error:
            raise self._unreadable(error) from None

    def record(self, split: str) -> dict[str, Any]:
        return file_record(self.folder / TOKENS_FILES[split])

    def check(self, split: str, record: dict[str, Any], full: bool = False) -> str | None:
        path = self.folder / TOKENS_FILES[split]
        if not path.is_file():
            return None
        return None if file_unchanged(path, record, full) else f"{path} has changed since it was prepared"

    def size(self, split: str) -> int | None:
        return (self.folder / TOKENS_FILES[split]).stat().st_size


HUB_CONFIGS = {"wikitext2": "wikitext-2-v1", "wikitext103": "wikitext-103-v1"}


class HubSource(WikiTextSource):
    """WikiText from the Hugging Face hub, through `datasets` and its cache."""

    def __init__(self, name: str) -> None:
        self.name, self.config = name, HUB_CONFIGS[name]
        self._splits: dict[str, Any] = {}

    def identity(self) -> dict[str, Any]:
        return {"kind": "hub", "name": self.name, "repository": hub.REPOSITORY, "config": self.config}

    def require(self, split: str, reason: str = "") -> None:
        if split not in self._splits:
            rows = hub.load_split(hub.REPOSITORY, self.config, split)
            if "text" not in rows.column_names:
                reason = f"its rows have no `text` column, only {', '.join(rows.column_names)}"
                raise hub.unavailable(hub.REPOSITORY, self.config, reason)
            if len(rows) == 0:
                raise ValueError(f"data={self.name}: the hub's {split} split of {hub.REPOSITORY} is empty.")
            self._splits[split] = rows

    def lines(self, split: str) -> Iterator[str]:
        # The hub stores a blank line as an empty row, while the files have a line of one space; the space is put
        # back, so that both give the same bytes and the same hash.
        self.require(split)
        mark = BYTE_ORDER_MARK
        for row in hub.texts(self._splits[split], "text"):
            yield row.removeprefix(mark).removesuffix("\n") or " "
            mark = ""

    def record(self, split: str) -> dict[str, Any]:
        from huggingface_hub import constants

        self.require(split)
        info = self._splits[split].info
        checksums = info.download_checksums or {}
        return {
            "endpoint": constants.ENDPOINT,
            "repository": hub.REPOSITORY,
            "config": info.config_name,
            "rows": len(self._splits[split]),
            "downloaded": {url: (value or {}).get("num_bytes") for url, value in checksums.items()},
        }


# --- articles -------------------------------------------------------------------------------------

HeadingStyle = tuple[bool, bool]
"""Whether there is a blank line before each heading, and whether there is one after it."""
BETWEEN_BLANK_LINES: HeadingStyle = (True, True)


def heading_style(lines: Iterable[str]) -> HeadingStyle:
    """Find out how headings of articles are set off in a text; no more lines are read than needed.

    In WikiText a heading is a line with one "=" at each end between blank lines, and other lines with one "=" at
    each end are formulas and keys of tables. If no such line is between blank lines, and all of them are set off
    in the same way, as in a text whose blank lines were removed, they are taken for headings.
    """
    seen: set[HeadingStyle] = set()
    for before, line, after in _with_neighbours(lines):
        if _is_title(line):
            style = (before is None or not before.strip(), after is None or not after.strip())
            if style == BETWEEN_BLANK_LINES:
                return style
            if before is not None and after is not None:  # at the border of the text this is undecided
                seen.add(style)
    return seen.pop() if len(seen) == 1 else BETWEEN_BLANK_LINES


def wikitext_passages(lines: Iterable[str], style: HeadingStyle = BETWEEN_BLANK_LINES) -> Iterator[Passage]:
    """Group WikiText lines in passages; documents begin at ` = Title = ` lines that are set off as `style` says.

    The border of the text may count as a blank line or not. Blank lines before the first heading belong to the
    first document.
    """
    block: list[str] = []
    starts, has_words = True, False
    for before, line, after in _with_neighbours(lines):
        if (
            has_words
            and _is_title(line)
            and (before is None or bool(before.strip()) != style[0])
            and (after is None or bool(after.strip()) != style[1])
        ):
            if block:
                yield Passage(block, starts)
            block, starts, has_words = [], True, False
        elif len(block) >= PASSAGE_LINES:
            yield Passage(block, starts)
            block, starts = [], False
        block.append(line)
        has_words = has_words or bool(line.strip())
    if block:
        yield Passage(block, starts)


def _is_title(line: str) -> bool:
    if "=" not in line[:3]:
        return False
    words = line.split()
    return len(words) >= 3 and words[0] == words[-1] == "=" and words[1] != "=" and words[-2] != "="


def _with_neighbours(lines: Iterable[str]) -> Iterator[tuple[str | None, str, str | None]]:
    """Each line with the line before it and the line after it."""
    before: str | None = None
    for line, after in pairwise(chain(lines, [None])):
        assert line is not None
        yield before, line, after
        before = line


# --- the original texts ---------------------------------------------------------------------------


class Original(NamedTuple):
    """Facts of an original word-level split (`.tokens`, not raw)."""

    lines: int
    words: int
    """Words, including one line end per line."""
    sha256: str | None = None


# Words: the paper's and fairseq's counts. Lines: torchtext's tables. The digests are of the published files.
ORIGINALS: dict[str, dict[str, Original]] = {
    "wikitext103": {
        "train": Original(1_801_350, 103_227_021),
        "validation": Original(3_760, 217_646, "9aee9f52d6e77de6c7751fc5e7c44287db3ec0eaf15477098acc6b93c1c4250b"),
        "test": Original(4_358, 245_569, "56db52eb157b1ab5c89646eef70510c1eca6e12a3bfdb99f0d6b05b4eacb75b9"),
    },
    "wikitext2": {
        "train": Original(36_718, 2_088_628),
        "validation": Original(3_760, 217_646),
        "test": Original(4_358, 245_569),
    },
}
WIKITEXT103_VOCAB_SIZE = 267_744
"""Word-level ids of the original training split, padded to a multiple of 8."""
TITLES = {"wikitext2": "WikiText-2", "wikitext103": "WikiText-103"}


def identify(name: str, split: str, counts: Mapping[str, Any], texts: Mapping[str, str]) -> str | None:
    """Say whether a split's text is the original one.

    WikiText-2 and WikiText-103 share the articles of validation and test, and so their counts; only the digest
    tells them apart. The training splits are known by lines and words.

    Args:
        name: the source's name.
        split: train, validation or test.
        counts: the split's `lines`, `words` and `text_sha256`.
        texts: `text_sha256` of the evaluation splits beside it, if available.

    Returns:
        A phrase that begins with "the original" or "not the original"; None if the source is not WikiText.

    Raises:
        ValueError: the text is the original by its digest or its lines, but not by its number of words.
    """
    if name not in ORIGINALS:
        return None
    title, original = f"{TITLES[name]} {'training' if split == 'train' else split} split", ORIGINALS[name][split]
    same_count = counts["words"] == original.words
    different = f"not the original {title}"
    if original.sha256 is not None:
        if counts["text_sha256"] != original.sha256:
            return different
    elif not _beside_originals(name, texts) or counts["lines"] != original.lines:
        return different + ("" if same_count else f" ({counts['words']:,} words, not {original.words:,})")
    if not same_count:
        if name == "wikitext2":
            return f"{different} ({counts['words']:,} words, not {original.words:,})"
        raise ValueError(
            f"The {title} has {original.words:,} words with line ends, but {counts['words']:,} were counted in "
            f"{counts['lines']:,} lines. The file was changed; get the word-level wikitext-103-v1 text anew."
        )
    return f"the original {title}" + ("" if original.sha256 else " (by its counts)")


def check_vocabulary(identity: str | None, tokenizer_label: str, vocab_size: int) -> None:
    """Assert the known vocabulary of WikiText-103's training split.

    Raises:
        ValueError: the training split is the original one and its word-level vocabulary is not.
    """
    known = identity is not None and identity.startswith("the original WikiText-103 training")
    if known and tokenizer_label == "word8" and vocab_size != WIKITEXT103_VOCAB_SIZE:
        raise ValueError(
            f"The original WikiText-103 has a vocabulary of {WIKITEXT103_VOCAB_SIZE:,}, but {vocab_size:,} were "
            "found in its training split. The file was changed; get the word-level wikitext-103-v1 text anew."
        )


def _beside_originals(name: str, texts: Mapping[str, str]) -> bool:
    """Whether the available evaluation splits are consistent with the originals of this name."""
    known = {split: o.sha256 for split, o in ORIGINALS["wikitext103"].items() if o.sha256}
    same = [texts[split] == sha256 for split, sha256 in known.items() if split in texts]
    return all(same) if name == "wikitext103" else not any(same)
