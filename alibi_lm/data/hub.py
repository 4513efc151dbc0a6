"""Text from the Hugging Face hub through `datasets`, mainly WikiText: cache first, then the network.

Without a network `datasets` retries for 24 seconds, and for minutes if a server accepts but never answers. So the
cache is tried first with the network switched off, and the hub is probed once with a short time-out before
`datasets` downloads with its retries.
"""

from __future__ import annotations

import errno
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import Any, TypeVar, cast

REPOSITORY = "Salesforce/wikitext"
PROBE_SECONDS = 5.0
T = TypeVar("T")


def load_split(repository: str, config: str | None, split: str) -> Any:
    """One split as a `datasets.Dataset`, memory-mapped from the cache.

    Args:
        repository: name on the hub, or a folder with the same layout.
        config: its subset, such as `wikitext-103-v1`; None: its only one.
        split: the split's name there.

    Raises:
        ValueError: the text is neither cached nor available; the message says what to do instead.
    """
    import datasets

    return _loaded(repository, config, lambda: datasets.load_dataset(repository, config, split=split), split)


def texts(rows: Any, column: str) -> Iterator[str]:
    """The texts in a column of a `datasets.Dataset`, a piece of the table at a time; "" for a missing one."""
    for batch in rows.iter(batch_size=1000):
        yield from (text or "" for text in batch[column])


def split_names(repository: str, config: str | None) -> list[str]:
    """Names of the splits of a dataset on the hub, or of a folder with the same layout.

    Raises:
        ValueError: it is neither cached nor available; the message says what to do instead.
    """
    import datasets

    return list(_loaded(repository, config, lambda: datasets.get_dataset_split_names(repository, config)))


def stream_split(
    repository: str, config: str | None, split: str, column: str, most_bytes: int
) -> tuple[list[str] | None, list[str]]:
    """The texts of a split from its beginning, until they are `most_bytes` long; no more is downloaded.

    Returns:
        The texts, or None if there is no such column, and the names of the columns.

    Raises:
        ValueError: the dataset is not available.
    """
    import datasets

    def read() -> tuple[list[str] | None, list[str]]:
        texts: list[str] = []
        size = 0
        for row in datasets.load_dataset(repository, config, split=split, streaming=True):
            if not isinstance(row.get(column), str):
                return None, list(row)
            texts.append(row[column])
            size += len(texts[-1].encode())
            if size >= most_bytes:
                break
        return texts, [column]

    return _loaded(repository, config, read)


def _loaded(repository: str, config: str | None, load: Callable[[], T], split: str | None = None) -> T:
    """The result of `load` from the cache, else from the network; for a split, also from a locked cache."""
    import datasets
    from huggingface_hub import constants

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    offline = bool(constants.HF_HUB_OFFLINE) or bool(datasets.config.HF_HUB_OFFLINE)
    try:
        with _network_off():
            return load()
    except Exception as error:  # kinds differ by version; all except disk errors mean "not in the cache"
        not_cached = error
    if Path(repository).is_dir():
        raise unavailable(repository, config, _first_line(not_cached)) from not_cached
    blocked = _disk_error(not_cached)
    if blocked is not None:
        folder = datasets.config.HF_DATASETS_CACHE
        try:
            return cast(T, _read_without_lock(Path(folder), repository, config, split))
        except Exception:
            reason = f"its cache {folder} cannot be used ({blocked}); make it writable or set HF_DATASETS_CACHE"
            raise unavailable(repository, config, reason) from not_cached
    if offline:
        reason = "HF_HUB_OFFLINE is set and the text is not in the cache"
        raise unavailable(repository, config, reason) from not_cached
    obstacle = _obstacle(constants.ENDPOINT)
    if obstacle:
        raise unavailable(repository, config, obstacle) from not_cached
    try:
        return load()
    except Exception as error:  # download, format and disk errors of four libraries
        reason = f"{type(error).__name__}: {_first_line(error)}"
        raise unavailable(repository, config, reason) from error


def _disk_error(error: BaseException | None) -> OSError | None:
    """The error of the file system behind an error of `datasets`, such as a cache that cannot be written."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (
            errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ENOLCK,
        ):  # fmt: skip
            return error
        error = error.__cause__ or error.__context__
    return None


def _read_without_lock(cache: Path, repository: str, config: str | None, split: str | None) -> Any:
    """A finished split from the cache of `datasets`, which takes a lock there even to read.

    Raises:
        Exception: there is none, or it is damaged.
    """
    import datasets
    from datasets.arrow_reader import ArrowReader

    finished = cache.glob(f"{repository.replace('/', '___')}/{config or '*'}/*/*/dataset_info.json")
    folder = max(finished, key=lambda path: path.stat().st_mtime).parent
    info = datasets.DatasetInfo.from_directory(str(folder))
    reader = ArrowReader(str(folder), info)
    return datasets.Dataset(**reader.read(info.dataset_name, split, info.splits.values()))


@contextmanager
def _network_off() -> Iterator[None]:
    """Let `datasets` look in its cache only; both libraries read the environment only at import."""
    import datasets
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def _obstacle(endpoint: str) -> str | None:
    """Why the hub cannot be used now, or None if it answers; takes PROBE_SECONDS at most."""
    silent = f"{endpoint} does not answer within {PROBE_SECONDS:g} s"
    found = [silent]
    # A thread, because a socket's time-out does not cover the name look-up.
    probe = threading.Thread(target=lambda: found.append(_probe(endpoint) or ""), daemon=True)
    probe.start()
    probe.join(PROBE_SECONDS)
    return found[-1] or None


def _probe(endpoint: str) -> str | None:
    url = f"{endpoint}/api/datasets/{REPOSITORY}/revision/main"
    try:
        with urllib.request.urlopen(url, timeout=PROBE_SECONDS):
            return None
    except urllib.error.HTTPError as error:
        with error:
            return None if error.code < 500 else f"{endpoint} answers with status {error.code}"
    except (OSError, ValueError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        return f"{endpoint} does not answer ({_first_line(reason)})"


def _first_line(error: object) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def unavailable(repository: str, config: str | None, reason: str) -> ValueError:
    """The error for a text that could not be had, with what to do instead."""
    if repository != REPOSITORY:
        name = repository + (f" {config}" if config else "")
        return ValueError(
            f"data.repo = {name} could not be loaded: {reason}. Check the name and data.config; without a "
            "network, give text files with data=text data.path=<folder>. HF_ENDPOINT=<url> sets a mirror."
        )
    return ValueError(
        f"The text {config} of {REPOSITORY} could not be loaded from the hub: {reason}. Without a network, give "
        "a folder with wiki.train.tokens, wiki.valid.tokens and wiki.test.tokens as data.path=<folder>, or use "
        "the text that is on every machine with Python: data=python_stdlib. HF_ENDPOINT=<url> sets a mirror."
    )
