"""Files that are either whole or absent, JSON, and cheap ways to notice that a file has changed."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

log = logging.getLogger("alibi_lm")

SAMPLE_BYTES = 65_536
SAMPLES = 256
"""`fingerprint` reads files of up to SAMPLES * SAMPLE_BYTES = 16 MiB whole, others in this many pieces."""


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for writing under a temporary name; it takes its own name once all of it is on the disk.

    An interruption leaves the old file, or none; what was written so far is removed where possible.

    Raises:
        OSError: as raised by the system, also for a full disk; it names the file.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno:  # the system names no file where a write failed
            raise type(error)(error.errno, error.strerror, str(path)) from error
        raise
    sync_folder(path.parent)


def require_writable(folder: Path) -> None:
    """Find out before the work whether files can be written into an output folder; nothing stays behind.

    The folder need not exist: then the nearest folder above it counts.

    Raises:
        ValueError: they cannot; the message has the folder and the reason.
    """
    place = folder
    try:
        while not place.exists() and place != place.parent:
            place = place.parent
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise ValueError(
            f"output_dir = {folder} cannot be written ({error.strerror or error}). Give another folder."
        ) from error


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Replace a file by this text (UTF-8): readers see the old file or the new one, never a part.

    Raises:
        OSError: as raised by the system; the old file is untouched and nothing is left beside it.
    """
    with whole_file(Path(path)) as file:
        # A name that the locale could not decode is turned back into its original bytes.
        file.write(text.encode("utf-8", "surrogateescape"))


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """`write_text` of one JSON value, indented, keys in the given order."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a JSON file that must hold one object. Nothing in it is executed.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not UTF-8, not JSON, or not an object; the message names the file.
    """
    content = Path(path).read_bytes()
    try:
        value = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} should hold one JSON object, not a {type(value).__name__}")
    return value


def read_json_if_whole(path: Path) -> dict[str, Any] | None:
    """`read_json`, or None if there is no file or, after a warning, if it cannot be read."""
    try:
        return read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, OSError) as error:
        log.warning("%s; taken as absent", error)
        return None


def short_digest(*texts: str) -> str:
    """A hash, 12 hex digits, of these texts."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:12]


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a whole file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(path: Path) -> str:
    """Hex digest of a file's size and of evenly spread samples of it (all of it up to 16 MiB); 0.1 s at most.

    It detects truncation, another file, and a change anywhere in a small file; a change of a few bytes in a
    large one only by chance. `sha256_of` detects everything.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= SAMPLES * SAMPLE_BYTES:
            digest.update(file.read())
        else:
            last = size - SAMPLE_BYTES
            for k in range(SAMPLES):
                file.seek(last * k // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def file_record(path: Path) -> dict[str, Any]:
    """Name, size, modification time and digests of a file, for `file_unchanged`. Reads all of it."""
    status = path.stat()
    return {
        "file": path.name,
        "bytes": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "sha256": sha256_of(path),
        "fingerprint": fingerprint(path),
    }


def file_unchanged(path: Path, record: dict[str, Any], full: bool = False) -> bool:
    """Whether an existing file is still the one recorded.

    Fast unless its modification time differs or `full` is set: then all of it is read, so that a copied or touched
    file with the same content passes.
    """
    status = path.stat()
    if status.st_size != record["bytes"] or fingerprint(path) != record["fingerprint"]:
        return False
    if full or status.st_mtime_ns != record.get("mtime_ns", status.st_mtime_ns):
        return sha256_of(path) == record["sha256"]
    return True


def sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut, where the system lets folders be opened."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
