"""The files that `scripts/analyse.py` writes, read back for figures, tables and claims."""

from __future__ import annotations

import importlib.resources
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from alibi_lm.files import read_json
from alibi_lm.results.curves import variant_of
from alibi_lm.results.rows import ResultRow
from alibi_lm.study.records import find_records, recipes
from alibi_lm.study.style import label


@dataclass(frozen=True)
class ViewWords:
    """The words of a view on its page: its title, notes, and the quantity that its points belong to."""

    title: str
    note: str
    """Sentence above the table."""
    remark: str = ""
    """Sentence above the figure."""
    at: str = "length"
    x_label: str = "inference length in tokens, log axis"
    partial: bool = False
    """Whether it scores only some of the targets, the same at every point."""


def _views() -> dict[str, ViewWords]:
    text = (importlib.resources.files("alibi_lm.study") / "views.yaml").read_text("utf-8")
    return {name: ViewWords(**words) for name, words in yaml.safe_load(text).items()}


VIEWS = _views()
TERM_NAMES = {
    "early_tokens": "early tokens",
    "positions_beyond": "positions beyond L",
    "keys_beyond": "keys further than L",
    "total": "total",
}
"""Names of the decomposition's parts on pages."""


def perplexity(nats: float) -> float:
    """exp(nats), or exp(700) if that is too large for a float."""
    return math.exp(min(nats, 700))


def times(nats: float) -> str:
    """A change of the loss as a factor of perplexity, in three digits: `x1.00`, `x12.3`."""
    return f"x{perplexity(nats):#.3g}".rstrip(".")


@dataclass(frozen=True)
class Series:
    """One curve: a scheme at a training length, its seeds together."""

    position: str
    train_length: int
    runs: list[str]
    points: list[dict[str, Any]]
    corpus: str
    """Hash of text and tokenizer."""
    tokens: int
    documents: int
    variant: str = ""
    """How it differs from others of its scheme and length, in words; empty for the experiment's own settings."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Settings changed for the test."""
    note: str = ""
    """What the reader must know of it, such as why it has no intervals."""
    verdict: str = ""
    """safe_length: the result in words."""

    @property
    def name(self) -> str:
        """Name of the scheme and, if there is one, of the variant."""
        return label(self.position, self.variant)

    @property
    def reason(self) -> str:
        """The first reason for a missing value; empty if no value is missing."""
        return next((str(point["reason"]) for point in self.points if point.get("reason")), "")


@dataclass(frozen=True)
class Analysis:
    """One view of an experiment."""

    view: str
    experiment: str
    split: str
    corpora: dict[str, str]
    commit: str | None
    series: list[Series]

    @property
    def provenance(self) -> str:
        """One line: text, counts, what the intervals are over or why there are none, commit."""
        parts = [f"{self.split} split of {', '.join(sorted(set(self.corpora.values())))}"]
        points = [point for series in self.series for point in series.points]
        documents = max(s.documents for s in self.series)
        if self.same_text:
            tokens = f"{self.series[0].tokens:,} tokens"
            scored = {p["targets"] for p in points if p.get("targets")}
            if VIEWS[self.view].partial and len(scored) == 1:
                tokens = f"{scored.pop():,} of {tokens} scored"
            parts.append(f"{tokens} in {documents:,} document{'s' if documents > 1 else ''}")
        if self.view == "attention":
            windows = {p["windows"] for p in points if "windows" in p}
            ends = sorted({min(windows, default=0), max(windows, default=0)})
            parts.append(f"{' to '.join(map(str, ends))} windows at each length")
        elif self.view == "windows":
            parts += [
                f"needed on the first {n:,}"
                for n in sorted({p["measured_on"] for p in points if "measured_on" in p})
            ]
        elif documents < 2:
            parts.append("no intervals: they are over documents, and this text is a single one")
        else:
            one_seed = max(len(s.runs) for s in self.series) == 1
            what = "95% intervals"
            if self.view not in ("decomposition", "documents", "offset", "repeat"):
                what += " of the difference from the training length, paired by document,"
            parts.append(f"{what} over documents" + (", given the one seed" if one_seed else " and seeds"))
        parts += sorted({s.note for s in self.series if s.note})
        parts.append(f"commit {self.commit[:10]}" if self.commit else "no commit")
        return "; ".join(parts)

    @property
    def same_text(self) -> bool:
        """Whether all curves have the same text and tokenizer; only then can their levels be compared."""
        return len({s.corpus for s in self.series}) == 1


def context_words(point: Mapping[str, Any]) -> str:
    """The result of `effective_context`, in words."""
    found = [f for f in (point.get("numbers") or {}).get("receptive_field", {}).values() if f is not None]
    return f"effective {point['effective']}" + (f", field {median(found):g}" if found else "")


def analysis_files(folder: Path) -> list[Path]:
    """The analyses that belong to a folder of results: in `analysis` beside it, or within it once published."""
    return [path for place in (folder.parent, folder) for path in sorted((place / "analysis").glob("*.json"))]


def read_analysis(path: str | Path) -> Analysis:
    """Read `<view>.json`; run folders near it say how curves of one scheme and training length differ.

    Raises:
        ValueError: no such file, or not one of ours.
    """
    path = Path(path)
    try:
        content = read_json(path)
        series = [Series(**{f.name: s[f.name] for f in fields(Series) if f.name in s}) for s in content["series"]]
        told = {f.name: content[f.name] for f in fields(Analysis)}
        found = Analysis(**told | {"series": _tell_apart(series, path.parent, content["corpora"])})
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist. Run scripts/analyse.py first.") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not an analysis file ({error!r}). Run scripts/analyse.py again.") from None
    if found.view not in VIEWS or not found.series:
        raise ValueError(f"{path}: view = {found.view!r} with {len(found.series)} curves cannot be shown.")
    return found


def _tell_apart(series: Sequence[Series], folder: Path, corpora: Mapping[str, str]) -> list[Series]:
    """Name the variants of a scheme and training length that occur twice or were changed for the test."""
    rows = [_row(one) for one in series]
    words = recipes(rows, find_records(rows, folder))
    counts = Counter((s.position, s.train_length) for s in series)
    texts = len({s.corpus for s in series}) > 1
    found: list[Series] = []
    for one, row in zip(series, rows, strict=True):
        variant = variant_of(row, {str(row.run): words.get(str(row.run), "")})
        if counts[one.position, one.train_length] > 1:
            variant = "; ".join(p for p in (variant, corpora.get(one.corpus, "") if texts else "") if p)
            same = [s for s in found if (s.position, s.train_length) == (one.position, one.train_length)]
            if any(s.variant == variant for s in same):
                variant = f"{variant or 'other settings'} #{len(same) + 1}"
        found.append(replace(one, variant=variant))
    return found


def _row(series: Series) -> ResultRow:
    """A row without a value that describes the first run of a series."""
    seed = re.search(r"_s(\d+)", series.runs[0])
    return ResultRow(
        **{name: getattr(series, name) for name in ("position", "train_length", "tokens", "corpus", "changes")},
        run=series.runs[0],
        seed=int(seed[1]) if seed else None,
        inference_length=series.train_length,
        mode="nonoverlapping",
        split="validation",
        reason="not a measurement",
    )
