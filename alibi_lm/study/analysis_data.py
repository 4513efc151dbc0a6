"""The files that `scripts/analyse.py` writes, read back for figures and tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from alibi_lm.study.style import look

TITLES = {
    "perplexity": "Perplexity by inference length, with intervals",
    "position": "Loss by position in the window",
    "last": "Perplexity of the last tokens of each window",
    "documents": "Loss of each document",
    "fixed": "Perplexity of the same tokens by tokens of context",
    "decomposition": "Why the loss changes beyond the trained length",
    "offset": "Change of the loss when all positions are shifted",
}
TERM_NAMES = {
    "early_tokens": "early tokens",
    "positions_beyond": "positions beyond L",
    "keys_beyond": "keys further than L",
    "total": "total",
}
"""Parts of the decomposition, as people read them."""


_BANDS = "bands of the difference from the training length, paired by document,"


@dataclass(frozen=True)
class Series:
    """One curve: a scheme at a training length, its seeds together."""

    position: str
    train_length: int
    variant: str
    runs: list[str]
    points: list[dict[str, Any]]
    corpus: str
    """Hash of text and tokenizer."""
    tokens: int
    documents: int

    @property
    def name(self) -> str:
        """Name of the scheme, and of the variant where there is one."""
        return look(self.position).name + (f" ({self.variant})" if self.variant else "")


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
        """One line: text, counts, what the intervals are over, commit."""
        seeds = max(len(s.runs) for s in self.series)
        parts = [f"{self.split} split of {', '.join(sorted(set(self.corpora.values())))}"]
        if self.same_text:
            tokens, documents = f"{self.series[0].tokens:,} tokens", f"{self.series[0].documents:,} documents"
            # `fixed` and `offset` score a part of the targets, the same at every point.
            scored = {p["targets"] for one in self.series for p in one.points if p.get("targets")}
            if self.view in ("fixed", "offset") and len(scored) == 1:
                tokens = f"{scored.pop():,} of {tokens} scored"
            parts.append(f"{tokens} in {documents}")
        over = "documents, given the one seed" if seeds == 1 else "documents and seeds"
        what = "intervals" if self.view in ("decomposition", "documents", "offset") else _BANDS
        parts.append(f"95% {what} over {over}")
        parts.append(f"commit {self.commit[:10]}" if self.commit else "no commit")
        return "; ".join(parts)

    @property
    def same_text(self) -> bool:
        """Whether all curves are of the same text and tokenizer; only then can their levels be compared."""
        return len({s.corpus for s in self.series}) == 1


def read_analysis(path: str | Path) -> Analysis:
    """Read `<view>.json`.

    Raises:
        ValueError: no such file, or not one of ours.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        series = [Series(**{f.name: s[f.name] for f in fields(Series)}) for s in content["series"]]
        found = Analysis(
            content["view"],
            content["experiment"],
            content["split"],
            content["corpora"],
            content["commit"],
            _tell_apart(series),
        )
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist. Run scripts/analyse.py first.") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no analysis ({error!r}). Run scripts/analyse.py again.") from None
    if found.view not in TITLES or not found.series:
        raise ValueError(f"{path}: view = {found.view!r} with {len(found.series)} curves cannot be shown.")
    return found


def _tell_apart(series: Sequence[Series]) -> list[Series]:
    """Variants are named only where a scheme and training length occur twice."""
    keys = [(s.position, s.train_length) for s in series]
    return [s if keys.count(key) > 1 else replace(s, variant="") for s, key in zip(series, keys, strict=True)]
