"""The settings of a text."""

from __future__ import annotations

from dataclasses import dataclass, fields

from alibi_lm.settings import require, require_at_least, require_one_of, setting

NAMES = ("python_stdlib", "wikitext2", "wikitext103", "text", "hub")
USERS: dict[str, tuple[str, ...]] = dict.fromkeys(("repo", "config"), ("hub",))
USERS |= dict.fromkeys(("column", "split_by", "max_tokens"), ("text", "hub"))
"""The texts that a setting is for, where it is not for all."""
SPLIT_BY = ("auto", "given", "file", "hash", "none")


@dataclass
class DataConfig:
    """Which text, and where its prepared token streams are kept."""

    name: str = "python_stdlib"
    """`python_stdlib`, `wikitext2`, `wikitext103`, `text` (your own files) or `hub` (a Hugging Face dataset)."""
    path: str | None = setting(None, counts="no")
    """wikitext: folder with wiki.train.tokens, wiki.valid.tokens, wiki.test.tokens; null takes the text from the
    hub. Only the files of the splits in use must exist. text: a folder, a file or a glob of .txt, .jsonl or
    .parquet files."""
    cache_dir: str = setting("data", counts="no")
    """Folder of prepared streams; a relative one is relative to the current folder."""
    repo: str | None = setting(None, counts="run", later=True)
    """hub: name of the dataset, such as roneneldan/TinyStories."""
    config: str | None = setting(None, counts="run", later=True)
    """hub: subset (configuration) of the dataset, if it has several."""
    column: str = setting("text", counts="run", later=True)
    """text, hub: the field of .jsonl lines, or the column, that holds the text."""
    split_by: str = setting("auto", counts="run", later=True)
    """text, hub: how documents are assigned to splits: auto, given, file, hash or none (see data/own_text.py)."""
    max_tokens: int | None = setting(None, counts="run", later=True)
    """text, hub: read at most about this many tokens, counted as 4 bytes each; the hub's text is streamed."""

    def __post_init__(self) -> None:
        require_one_of("data.name", self.name, NAMES)
        require_one_of("data.split_by", self.split_by, SPLIT_BY)
        require(
            self.path is None or self.name not in ("python_stdlib", "hub"),
            f"data.path = {self.path} has no effect with data={self.name}. Leave data.path out, or use data=text, "
            "data=wikitext103 or data=wikitext2 with it.",
        )
        for field in fields(self):
            users, value = USERS.get(field.name, NAMES), getattr(self, field.name)
            require(
                value == field.default or self.name in users,
                f"data.{field.name} = {value} has no effect with data={self.name}. It belongs to data="
                f"{' and data='.join(users)}.",
            )
        require(self.name != "text" or self.path is not None, "data=text needs data.path=<file, folder or glob>.")
        require(self.name != "hub" or self.repo is not None, "data=hub needs data.repo=<owner>/<name>.")
        require_at_least("data.max_tokens", self.max_tokens, 1)
