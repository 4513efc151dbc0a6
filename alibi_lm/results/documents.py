"""What is published of the per-token results: sums per document and means per position, in one small file.

`summary.npz` beside `results.jsonl` has an entry for every row with a value, under the same key. It is enough
for every figure and interval, for anyone who has neither the weights nor the text. The same entries always give
the same bytes; nothing in the file can run code.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from alibi_lm.data.windows import scoring_windows
from alibi_lm.files import whole_file
from alibi_lm.results.rows import ResultRow, RowKey
from alibi_lm.results.statistics import mean_nats_interval, per_document_sums

SINGLE_POSITIONS = 2048
"""Windows up to this length have a mean for each position, longer ones for each 64 positions beyond it."""
WIDE_BIN = 64
BINS_PER_OCTAVE = 4
"""Of the smoothed curve: each bin is 19% wide in position."""


@dataclass(frozen=True)
class Summary:
    """One evaluation of one run in sums and means.

    Attributes:
        run: as in the result row, as are the next six.
        position: name of the scheme.
        train_length: tokens of a training sequence.
        inference_length: tokens of a window.
        mode: nonoverlapping or sliding.
        stride: None for nonoverlapping.
        split: validation or test.
        corpus: hash of the text and tokenizer.
        document_nats: (documents,) float64, sums in stream order.
        document_tokens: (documents,) int64, targets of each.
        position_first: (bins,) int64, first position of each bin, counted from 1; a target at position p is
            predicted from the p tokens before it.
        position_tokens: (bins,) int64, targets at these positions; 0 where none is scored there.
        position_nats: (bins,) float32, mean nats; NaN where there is no target.
        curve_first: (points,) int64, first position of each bin of the smoothed curve.
        curve_last: (points,) int64, last position of each.
        curve_nats: (points,) float64, mean nats.
        curve_low: (points,) float64, lower end of its band, see `position_curve`; NaN where there is none.
        curve_high: (points,) float64, upper end.
    """

    run: str
    position: str
    train_length: int
    inference_length: int
    mode: str
    stride: int | None
    split: str
    corpus: str | None
    document_nats: np.ndarray
    document_tokens: np.ndarray
    position_first: np.ndarray
    position_tokens: np.ndarray
    position_nats: np.ndarray
    curve_first: np.ndarray
    curve_last: np.ndarray
    curve_nats: np.ndarray
    curve_low: np.ndarray
    curve_high: np.ndarray

    @property
    def key(self) -> RowKey:
        """The key of the result row."""
        return (self.run, self.inference_length, self.mode, self.stride, self.split)

    @property
    def nats(self) -> float:
        """Sum over all targets."""
        return float(self.document_nats.sum())


_ARRAYS = [f.name for f in fields(Summary) if f.name.startswith(("document_", "position_", "curve_"))]
_PLAIN = [f.name for f in fields(Summary) if f.name not in _ARRAYS]


def summarise(nats: np.ndarray, documents: np.ndarray, row: ResultRow) -> Summary:
    """Summary of one evaluation.

    Args:
        nats: (N,) floats, of every target.
        documents: (D,) integers, where documents start.
        row: the evaluation's result row.
    """
    assert row.run is not None and row.train_length is not None and row.inference_length is not None
    positions = positions_in_window(len(nats), row.inference_length, row.stride)
    first = position_edges(row.inference_length)[:-1]
    bins = np.searchsorted(first, positions, side="right") - 1
    tokens = np.bincount(bins, minlength=len(first))
    sums = np.bincount(bins, weights=nats, minlength=len(first))
    with np.errstate(invalid="ignore"):
        means = (sums / tokens).astype(np.float32)
    document_nats, document_tokens = per_document_sums(nats, documents)
    return Summary(
        row.run,
        row.position,
        row.train_length,
        row.inference_length,
        row.mode,
        row.stride,
        row.split,
        row.corpus,
        document_nats,
        document_tokens,
        first,
        tokens,
        means,
        **position_curve(nats, documents, positions, row.inference_length, row.train_length),
    )


def positions_in_window(num_tokens: int, length: int, stride: int | None = None) -> np.ndarray:
    """Position of every target in its window, counted from 1: the number of tokens that it is predicted from.

    Args:
        num_tokens: N.
        length: tokens of a window.
        stride: targets scored in a window; None for nonoverlapping.

    Returns:
        (N,) int64, from 1 to length.
    """
    starts, scored, ends = scoring_windows(num_tokens, length, stride)
    return np.arange(num_tokens) - np.repeat(starts, ends - scored) + 1


def position_edges(length: int) -> np.ndarray:
    """First positions of the bins of a window, and length + 1 at the end: (bins + 1,) int64."""
    single = np.arange(1, min(length, SINGLE_POSITIONS) + 1)
    return np.concatenate([single, np.arange(SINGLE_POSITIONS + 1, length + 1, WIDE_BIN), [length + 1]])


def curve_edges(length: int, train_length: int) -> np.ndarray:
    """The same for the smoothed curve: bins grow with the position, and one ends exactly at the trained length.

    What a scheme does past its trained length is then never mixed with what it does before.
    """
    octaves = int(np.ceil(np.log2(max(train_length, length / train_length, 2)))) + 1
    steps = np.arange(-octaves * BINS_PER_OCTAVE, octaves * BINS_PER_OCTAVE + 1)
    last = np.unique(np.round(train_length * 2.0 ** (steps / BINS_PER_OCTAVE)).astype(np.int64))
    last = last[(last >= 1) & (last < length)]
    return np.concatenate([[1], last + 1, [length + 1]])


def position_curve(
    nats: np.ndarray, documents: np.ndarray, positions: np.ndarray, length: int, train_length: int
) -> dict[str, np.ndarray]:
    """Mean nats against position in the window, smoothed, with a band.

    The band is the 95% interval, over documents (and seeds), of the *difference* from the mean up to the trained
    length (all positions of a shorter window), drawn around the curve. How hard the text is moves the whole curve
    and is left out: it says how well the shape is known.

    Args:
        nats: (N,) floats, or (seeds, N) of several runs on the same text.
        documents: (D,) integers, where documents start.
        positions: (N,) int64, from 1 to length.
        length: tokens of a window.
        train_length: where a bin must end.

    Returns:
        curve_first, curve_last (int64), curve_nats, curve_low, curve_high (float64), each (points,); bins
        without a target are left out.
    """
    seeds = np.atleast_2d(nats)
    edges = curve_edges(length, train_length)
    cells = (np.searchsorted(documents, np.arange(len(positions)), side="right") - 1) * (len(edges) - 1)
    cells += np.searchsorted(edges, positions, side="right") - 1
    shape = (len(documents), len(edges) - 1)
    tokens = np.bincount(cells, minlength=shape[0] * shape[1]).reshape(shape)
    sums = np.stack([np.bincount(cells, s, shape[0] * shape[1]).reshape(shape) for s in seeds])
    points = np.flatnonzero(tokens.sum(axis=0))
    means = (sums.sum(axis=1)[:, points] / tokens.sum(axis=0)[points]).mean(axis=0)
    early = edges[:-1] <= train_length
    base = sums[:, :, early].sum(axis=2), tokens[:, early].sum(axis=1)
    ends = np.full((2, len(points)), np.nan)
    for index, k in enumerate(points):
        if np.count_nonzero(tokens[:, k]) < 2:
            continue  # one document does not show how documents differ
        changes = change_sums(sums[:, :, k], tokens[:, k], *base)
        difference = changes.sum(axis=1).mean() / base[1].sum()
        ends[:, index] = np.array(interval_ends(changes, base[1])) - difference
    return {
        "curve_first": edges[points],
        "curve_last": edges[points + 1] - 1,
        "curve_nats": means,
        "curve_low": means + ends[0],
        "curve_high": means + ends[1],
    }


def change_sums(
    sums: np.ndarray, tokens: np.ndarray, base_sums: np.ndarray, base_tokens: np.ndarray
) -> np.ndarray:
    """Sums whose mean and interval are those of a difference between two means of the same documents.

    The means may be over different targets, so that a document has other numbers of them; with the same targets
    it is `sums - base_sums`. The difference of two ratios is linearised around both.

    Args:
        sums: (seeds, documents), nats.
        tokens: (documents,), targets in them.
        base_sums: (seeds, documents), of the mean that is subtracted.
        base_tokens: (documents,).

    Returns:
        (seeds, documents) float64, to be taken with `base_tokens`. A document with no target in the base has
        none here.
    """
    total, base_total = tokens.sum(), base_tokens.sum()
    mean, base_mean = sums.sum(axis=1, keepdims=True) / total, base_sums.sum(axis=1, keepdims=True) / base_total
    errors = (sums - mean * tokens) / total - (base_sums - base_mean * base_tokens) / base_total
    return np.where(base_tokens > 0, base_total * errors + (mean - base_mean) * base_tokens, 0.0)


def interval_ends(sums: np.ndarray, tokens: np.ndarray) -> tuple[float, float]:
    """95% interval of the mean nats per token over documents (and seeds); NaN where one cannot be had.

    Args:
        sums: (seeds, documents) or (documents,), nats.
        tokens: (documents,).
    """
    sums = np.unique(np.atleast_2d(sums), axis=0)  # seeds that agree exactly are one observation
    if np.count_nonzero(tokens) < 2 or not np.isfinite(sums).all():
        return float("nan"), float("nan")
    interval = mean_nats_interval(sums, tokens)
    return interval.low, interval.high


def read_summaries(path: str | Path) -> dict[RowKey, Summary]:
    """Read a `summary.npz`.

    Raises:
        ValueError: the file does not exist or is damaged.
    """
    try:
        # numpy leaves the file open when it is no archive, so it is opened here.
        with Path(path).open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            entries = json.loads(bytes(file["index"]).decode())
            pools = {name: file[name] for name in file.files if name != "index"}
            found = {}
            for entry in entries:
                parts: dict[str, Any] = {name: _span(pools, *entry["arrays"][name]) for name in _ARRAYS}
                summary = Summary(**{name: entry[name] for name in _PLAIN}, **parts)
                found[summary.key] = summary
            return found
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; evaluate first, or give another folder.") from None
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged ({error}). Delete it and evaluate again.") from None


def _span(pools: dict[str, np.ndarray], dtype: str, first: int, last: int) -> np.ndarray:
    if not 0 <= first <= last <= len(pools[dtype]):
        raise ValueError(f"numbers {first} to {last} of {len(pools[dtype])}")
    return pools[dtype][first:last]


def write_summaries(path: str | Path, summaries: Iterable[Summary]) -> None:
    """Replace a `summary.npz` atomically; arrays that several entries share are written once."""
    index: list[dict[str, Any]] = []
    # One long array for each dtype: thousands of short ones take seconds to read and write.
    pools: dict[str, list[np.ndarray]] = {}
    sizes: dict[str, int] = {}
    spans: dict[bytes, tuple[str, int, int]] = {}
    for summary in sorted(summaries, key=lambda s: tuple(str(part) for part in s.key)):
        places = {}
        for name in _ARRAYS:
            array = np.ascontiguousarray(getattr(summary, name))
            dtype = str(array.dtype)
            digest = hashlib.sha256(dtype.encode() + array.tobytes()).digest()
            if digest not in spans:
                first = sizes.get(dtype, 0)
                spans[digest] = (dtype, first, first + len(array))
                sizes[dtype] = first + len(array)
                pools.setdefault(dtype, []).append(array)
            places[name] = spans[digest]
        index.append({name: getattr(summary, name) for name in _PLAIN} | {"arrays": places})
    arrays = {"index": np.frombuffer(json.dumps(index).encode(), dtype=np.uint8)}
    arrays |= {dtype: np.concatenate(pools[dtype]) for dtype in sorted(pools)}
    with whole_file(Path(path)) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            # numpy's own writer notes the time of day, so that equal summaries would differ.
            member = zipfile.ZipInfo(f"{name}.npy")
            member.compress_type = zipfile.ZIP_DEFLATED
            with archive.open(member, "w", force_zip64=True) as out:
                np.lib.format.write_array(out, array, allow_pickle=False)


def upsert_summaries(path: str | Path, summaries: Iterable[Summary]) -> None:
    """Add entries to a `summary.npz`; one of the same key is replaced. Safe between processes."""
    from filelock import FileLock

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        merged = read_summaries(path) if path.exists() else {}
        merged.update({summary.key: summary for summary in summaries})
        write_summaries(path, merged.values())
