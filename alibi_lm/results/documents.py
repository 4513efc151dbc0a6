"""Sums of nats per document, from which intervals and paired differences are computed.

`documents.jsonl` beside `results.jsonl` has a line for each result row with a value: the fields of the row's key,
and for each document of the text the sum of its nats and the number of its targets, in stream order. Every
interval can be computed from it, without the weights or the text.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alibi_lm.files import write_text
from alibi_lm.results.rows import RowKey, locked

DOCUMENTS_FILE = "documents.jsonl"


@dataclass(frozen=True)
class DocumentSums:
    """The documents of one result row.

    Attributes:
        key: the row's key.
        nats: (documents,) float64, sums in stream order.
        tokens: (documents,) int64, number of targets in each.
    """

    key: RowKey
    nats: np.ndarray
    tokens: np.ndarray


def read_documents(folder: str | os.PathLike[str]) -> dict[RowKey, DocumentSums]:
    """The document sums beside a `results.jsonl`, by row key; none if the folder has no such file.

    Raises:
        ValueError: the file is damaged; the message names it and the line.
    """
    path = Path(folder) / DOCUMENTS_FILE
    found: dict[RowKey, DocumentSums] = {}
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        return found
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}. Delete it and evaluate again.") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            changes = json.dumps(values["changes"], sort_keys=True)
            key = RowKey(**{name: values[name] for name in RowKey._fields} | {"changes": changes})
            found[key] = _checked(key, values["nats"], values["tokens"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise ValueError(
                f"{path}, line {number} is damaged ({error}). Delete the line, or the file, and evaluate again."
            ) from None
    return found


def upsert_documents(path: str | os.PathLike[str], sums: Iterable[DocumentSums]) -> None:
    """Add sums to a `documents.jsonl`; those of the same key are replaced. Safe between processes.

    The file is created if missing. Sums are rounded to a millionth of a nat.

    Raises:
        ValueError: the existing file is damaged (it is then left unchanged).
    """
    file = Path(path)
    with locked(file):
        merged = read_documents(file.parent)
        merged.update({one.key: one for one in sums})
        lines = []
        for key in sorted(merged, key=lambda key: tuple(map(str, key))):
            values = key._asdict() | {"changes": json.loads(key.changes)}
            values |= {
                "nats": [round(float(v), 6) for v in merged[key].nats],
                "tokens": merged[key].tokens.tolist(),
            }
            lines.append(json.dumps(values, allow_nan=False, ensure_ascii=False) + "\n")
        write_text(file, "".join(lines))


def _checked(key: RowKey, nats: Any, tokens: Any) -> DocumentSums:
    sums = DocumentSums(key, np.asarray(nats, dtype=np.float64), np.asarray(tokens, dtype=np.int64))
    if sums.nats.ndim != 1 or sums.nats.shape != sums.tokens.shape or not np.isfinite(sums.nats).all():
        raise ValueError("nats and tokens are not two lists of finite numbers of the same length")
    return sums
