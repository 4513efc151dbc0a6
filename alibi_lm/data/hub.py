"""WikiText from the Hugging Face hub through `datasets`: cache first, then the network.

Without a network `datasets` retries for 24 seconds, and for minutes where a server accepts and never answers.
So the cache is asked first with the network switched off, and the hub is probed once with a short time-out
before the download is handed to the retries.
"""

from __future__ import annotations

import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from typing import Any

REPOSITORY = "Salesforce/wikitext"
PROBE_SECONDS = 5.0


def load_split(config: str, split: str) -> Any:
    """One split as a `datasets.Dataset` with a `text` column, a row a line, memory-mapped from the cache.

    Args:
        config: the repository's subset, such as `wikitext-103-v1`.
        split: train, validation or test.

    Raises:
        ValueError: the text is neither cached nor to be had, with what to do instead.
    """
    import datasets
    from huggingface_hub import constants

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    offline = bool(constants.HF_HUB_OFFLINE) or bool(datasets.config.HF_HUB_OFFLINE)
    try:
        with _network_off():
            dataset = datasets.load_dataset(REPOSITORY, config, split=split)
    except Exception as not_cached:  # whatever it is, it means "not in the cache": the kinds differ by version
        if offline:
            raise _unavailable(config, "HF_HUB_OFFLINE is set and the text is not in the cache") from not_cached
        obstacle = _obstacle(constants.ENDPOINT)
        if obstacle:
            raise _unavailable(config, obstacle) from not_cached
        try:
            dataset = datasets.load_dataset(REPOSITORY, config, split=split)
        except Exception as error:  # download, format and disk errors of four libraries
            raise _unavailable(config, f"{type(error).__name__}: {_first_line(error)}") from error
    if "text" not in dataset.column_names:
        columns = ", ".join(dataset.column_names)
        raise _unavailable(config, f"its rows have no `text` column, only {columns}")
    return dataset


def lines(dataset: Any) -> Iterator[str]:
    """Text lines of a split without line ends, as in the original `.tokens` files.

    The hub stores a blank line as an empty row where the files have a line of one space; the space is put
    back, so that both give the same bytes and the same hash.
    """
    for batch in dataset.iter(batch_size=1000):
        for row in batch["text"]:
            yield row.removesuffix("\n") or " "


def record(dataset: Any) -> dict[str, Any]:
    """What the manifest keeps of where a split came from."""
    from huggingface_hub import constants

    info = dataset.info
    checksums = info.download_checksums or {}
    return {
        "endpoint": constants.ENDPOINT,
        "repository": REPOSITORY,
        "config": info.config_name,
        "rows": len(dataset),
        "downloaded": {url: (value or {}).get("num_bytes") for url, value in checksums.items()},
    }


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
    # A thread, since a socket's time-out does not cover the look-up of the name.
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


def _unavailable(config: str, reason: str) -> ValueError:
    return ValueError(
        f"The text {config} of {REPOSITORY} could not be had from the hub: {reason}. Without a network, give "
        "a folder with wiki.train.tokens, wiki.valid.tokens and wiki.test.tokens by data.path=<folder>, or use "
        "the text that is on every machine with Python: data=python_stdlib. HF_ENDPOINT=<url> sets a mirror."
    )
