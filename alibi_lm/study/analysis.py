"""The files that `scripts/analyse.py` writes, read back for figures, tables and claims."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from statistics import median
from typing import Any

from alibi_lm.files import read_json
from alibi_lm.results.curves import variant_of
from alibi_lm.results.rows import ResultRow, split_label
from alibi_lm.study.records import find_records, recipes
from alibi_lm.study.style import label

TITLES = {
    "perplexity": "Perplexity by inference length, with intervals",
    "position": "Loss by position in the window",
    "last": "Perplexity of the last tokens of each window",
    "documents": "Loss of each document",
    "fixed": "Perplexity of the same tokens by tokens of context",
    "decomposition": "Why the loss changes beyond the trained length",
    "offset": "Change of the loss when all positions are shifted",
    "windows": "Keys that each head must keep",
    "safe_length": "How far each model may be read",
    "effective_context": "How much context the model uses",
    "repeat": "What reading the same segment a second time gains",
    "attention": "Where heads look",
    "self_longppl": "Self-LongPPL: tokens that need a long context",
}
AT = {"fixed": "context", "offset": "offset", "effective_context": "context", "repeat": "distance"}
"""What the points of a view stand at, where it is not the inference length."""
PARTIAL = ("fixed", "offset", "effective_context", "repeat", "self_longppl")
"""Views that score a part of the targets, the same at every point."""
TERM_NAMES = {
    "early_tokens": "early tokens",
    "positions_beyond": "positions beyond L",
    "keys_beyond": "keys further than L",
    "total": "total",
}
"""Parts of the decomposition, as people read them."""


def perplexity(nats: float) -> float:
    """Its exp, or that of 700 where it is too large for a number."""
    return math.exp(min(nats, 700))


def times(nats: float) -> str:
    """The factor of perplexity that a change of the loss is, for people, in three digits: `x1.00`, `x12.3`."""
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
    """What tells it from others of its scheme and length, in words; empty for the experiment's own settings."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Settings changed for the test."""
    note: str = ""
    """What the reader must know of it, such as why it has no intervals."""
    verdict: str = ""
    """safe_length: what it says in words."""

    @property
    def name(self) -> str:
        """Name of the scheme, and of the variant where there is one."""
        return label(self.position, self.variant)

    @property
    def reason(self) -> str:
        """The first reason why there is no value somewhere; empty where there is one everywhere."""
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
        if self.same_text:
            tokens, documents = f"{self.series[0].tokens:,} tokens", f"{self.series[0].documents:,} documents"
            scored = {p["targets"] for one in self.series for p in one.points if p.get("targets")}
            if self.view in PARTIAL and len(scored) == 1:
                tokens = f"{scored.pop():,} of {tokens} scored"
            parts.append(f"{tokens} in {documents}" if self.series[0].documents > 1 else f"{tokens} in 1 document")
        if self.view == "attention":
            windows = {p["windows"] for s in self.series for p in s.points if "windows" in p}
            ends = sorted({min(windows, default=0), max(windows, default=0)})
            parts.append(f"{' to '.join(map(str, ends))} windows at each length")
        elif self.view == "windows":
            measured = {p["measured_on"] for one in self.series for p in one.points if "measured_on" in p}
            parts += [f"needed on the first {n:,}" for n in sorted(measured)]
        elif max(s.documents for s in self.series) < 2:
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
        """Whether all curves are of the same text and tokenizer; only then can their levels be compared."""
        return len({s.corpus for s in self.series}) == 1


def context_words(point: Mapping[str, Any]) -> str:
    """What `effective_context` found, in words; earlier versions have no receptive field."""
    fields = [f for f in (point.get("numbers") or {}).get("receptive_field", {}).values() if f is not None]
    return f"effective {point['effective']}" + (f", field {median(fields):g}" if fields else "")


def read_analysis(path: str | Path) -> Analysis:
    """Read `<view>.json`; run folders near it tell how curves of one scheme and training length differ.

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
        raise ValueError(f"{path} is no analysis ({error!r}). Run scripts/analyse.py again.") from None
    if found.view not in TITLES or not found.series:
        raise ValueError(f"{path}: view = {found.view!r} with {len(found.series)} curves cannot be shown.")
    return found


def _tell_apart(series: Sequence[Series], folder: Path, corpora: Mapping[str, str]) -> list[Series]:
    """Variants in words, where a scheme and training length occur twice or were changed for the test."""
    rows = {s.runs[0]: _row(s) for s in series}
    words = recipes(list(rows.values()), find_records(rows.values(), folder))
    counts = Counter((s.position, s.train_length) for s in series)
    found: list[Series] = []
    for one in series:
        row = rows[one.runs[0]]
        variant = variant_of(row, {row.run: words[row.run]} if row.run in words else {row.run or "": ""})
        if counts[one.position, one.train_length] > 1:
            texts = len({s.corpus for s in series}) > 1
            variant = "; ".join(p for p in (variant, corpora.get(one.corpus, "") if texts else "") if p)
            same = [s for s in found if (s.position, s.train_length) == (one.position, one.train_length)]
            if any(s.variant == variant for s in same):
                variant = f"{variant or 'other settings'} #{len(same) + 1}"
        found.append(replace(one, variant=variant))
    return found


def _row(series: Series) -> ResultRow:
    """What a series says of its first run, as a row without a value."""
    run, changes = split_label(series.runs[0])
    seed = re.search(r"_s(\d+)", run or "")
    return ResultRow(
        position=series.position,
        mode="nonoverlapping",
        split="validation",
        tokens=series.tokens,
        inference_length=series.train_length,
        run=run,
        train_length=series.train_length,
        seed=int(seed[1]) if seed else None,
        corpus=series.corpus,
        reason="not a measurement",
        changes=series.changes or changes,
    )
