"""Claim files: what the paper says, as statements that result rows can confirm or refute.

    title: ...
    claims:
      - id: sinusoidal_worse_at_2L
        statement: Sinusoidal positions are worse at twice the training length than at it.
        source: Tables 2-4
        left: {position: sinusoidal, at: 2L}
        right: {position: sinusoidal, at: L}
        is: above          # perplexity left over right: below, above or within `factor` (default 1.0)

`L` runs over all training lengths in the results, or those of `train_lengths`. Each side is
`{position, train: L, at: L, mode: nonoverlapping, stride, split: validation, where: {setting: value}}`; lengths
are written `L`, `2L`, `L/2`, `1024`, and `at` also `every>L` or `longest>=4L`. `min_seeds` is 1 where both sides
are the same runs and 2 where they are not, unless given. A claim about all L may ask for `min_lengths` of them.

Two kinds of claims need other measurements: `measure: train_ratio` or `eval_ratio` compares speeds of benchmark
rows at equal length; `part: early_tokens`, `positions_beyond` or `keys_beyond` is about that part of the change of
the loss from L to the length of `left` (scripts/analyse.py view=decomposition), as a factor of perplexity. A claim
that none of these can decide has `not_measured: why`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

_LENGTH = re.compile(r"(?P<number>\d+)|(?P<times>\d+(?:\.\d+)?)?L(?:/(?P<over>\d+))?")
_MANY = re.compile(r"(?P<which>every|longest)(?P<sign>>=|>)(?P<length>.+)")
NEAR = 0.025
"""Share by which a length may miss the one asked for: the paper measured 1,012 and 2,024, not 1,024 and 2,048."""


@dataclass(frozen=True)
class Side:
    """Which runs, and at which inference length.

    Raises:
        ValueError: a length that cannot be read, or settings that contradict each other.
    """

    position: str
    train: str = "L"
    at: str = "L"
    mode: str = "nonoverlapping"
    stride: int | None = None
    split: str = "validation"
    where: dict[str, Any] = field(default_factory=dict)
    """Settings of the run's config.yaml that must have these values."""

    def __post_init__(self) -> None:
        length_of(self.train, 64)
        match = _MANY.fullmatch(self.at)
        length_of(match["length"] if match else self.at, 64)
        if (self.mode == "sliding") != (self.stride is not None):
            raise ValueError(f"mode = {self.mode} with stride = {self.stride}; sliding windows have a stride")

    def lengths(self, train_length: int, known: Iterable[int]) -> list[int]:
        """The inference lengths meant, among those measured; empty where none fits.

        Args:
            train_length: the value of L.
            known: measured inference lengths.
        """
        measured = sorted(set(known))
        match = _MANY.fullmatch(self.at)
        if match is None:
            wanted = length_of(self.at, train_length)
            best = min(measured, key=lambda n: (abs(math.log(n / wanted)), n), default=None)
            return [best] if best is not None and abs(best / wanted - 1) <= NEAR else []
        bound = length_of(match["length"], train_length)
        # `>=` lets a length miss the bound as above; `>` must clear it.
        found = [n for n in measured if (n > bound if match["sign"] == ">" else n >= bound * (1 - NEAR))]
        return found if match["which"] == "every" else found[-1:]


@dataclass(frozen=True)
class Claim:
    """One statement and how to check it.

    Raises:
        ValueError: an unknown relation, a factor out of range, or a side missing.
    """

    id: str
    statement: str
    source: str
    left: Side | None = None
    right: Side | None = None
    relation: str = "below"
    factor: float = 1.0
    train_lengths: list[int] | None = None
    min_seeds: int | None = None
    min_lengths: int = 1
    """Training lengths without which a claim about all of them is not confirmed."""
    measure: str | None = None
    part: str | None = None
    not_measured: str | None = None

    def __post_init__(self) -> None:
        if not (self.id and self.statement and self.source):
            raise ValueError("id, statement and source must not be empty")
        if self.relation not in ("below", "above", "within"):
            raise ValueError(f"is = {self.relation!r}; allowed: below, above, within")
        if self.factor <= 0 or (self.relation == "within" and self.factor <= 1):
            raise ValueError(f"factor = {self.factor}; it must be positive, and above 1 for within")
        if self.measure not in (None, "train_ratio", "eval_ratio"):
            raise ValueError(f"measure = {self.measure!r}; allowed: train_ratio, eval_ratio")
        if self.part not in (None, "early_tokens", "positions_beyond", "keys_beyond"):
            raise ValueError(f"part = {self.part!r}; allowed: early_tokens, positions_beyond, keys_beyond")
        if self.part is not None and (self.left is None or self.right is not None or self.left.train != "L"):
            raise ValueError(f"part = {self.part}; it has a left side, trained at L, and no right one")
        if self.part is None and self.not_measured is None and (self.left is None or self.right is None):
            raise ValueError("left or right is missing; a claim that rows cannot decide has not_measured")

    @property
    def seeds_needed(self) -> int:
        """Fewest seeds that settle it; one is enough only for runs compared with themselves."""
        if self.min_seeds is not None:
            return self.min_seeds
        if self.part is not None:
            return 1
        assert self.left is not None and self.right is not None
        same = (self.left.position, self.left.train, self.left.where) == (
            self.right.position,
            self.right.train,
            self.right.where,
        )
        return 1 if same else 2


@dataclass(frozen=True)
class ClaimFile:
    """The claims of one file."""

    title: str
    claims: list[Claim]


def length_of(text: str, train_length: int) -> float:
    """Value of a length such as `2L`, `L/2` or `1024`.

    Raises:
        ValueError: it cannot be read.
    """
    match = _LENGTH.fullmatch(str(text).strip())
    if match is None:
        raise ValueError(f"length = {text!r}; write L, 2L, 1.5L, L/2 or a number, and for `at` also every>L")
    if match["number"]:
        return float(match["number"])
    return train_length * float(match["times"] or 1) / float(match["over"] or 1)


def read_claims(path: Path) -> list[ClaimFile]:
    """Read a claim file, or all of a folder.

    Raises:
        ValueError: no such file, or a claim that cannot be read, naming file and claim.
    """
    files = sorted(path.glob("*.yaml")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise ValueError(f"claims = {path}; there is no claim file. Give a .yaml file or a folder of them.")
    found = [_read_file(file) for file in files]
    ids: dict[str, Path] = {}
    for file, content in zip(files, found, strict=True):
        for claim in content.claims:
            if claim.id in ids:
                raise ValueError(f"{file}: id {claim.id!r} comes twice (also in {ids[claim.id]})")
            ids[claim.id] = file
    return found


def _read_file(file: Path) -> ClaimFile:
    import yaml

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    if not isinstance(content, dict) or set(content) != {"title", "claims"}:
        raise ValueError(f"{file} must hold `title` and `claims`, and nothing else")
    claims = []
    for index, entry in enumerate(content["claims"] or [], start=1):
        name = entry.get("id", f"number {index}") if isinstance(entry, dict) else f"number {index}"
        try:
            claims.append(_claim(entry))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file}, claim {name}: {error}") from None
    return ClaimFile(str(content["title"]), claims)


def _claim(entry: Any) -> Claim:
    if not isinstance(entry, Mapping):
        raise ValueError("a claim is a mapping of settings")
    values = {("relation" if key == "is" else key): value for key, value in entry.items()}
    _refuse_unknown(values, Claim)
    for side in ("left", "right"):
        if side in values:
            if not isinstance(values[side], Mapping):
                raise ValueError(f"{side} is a mapping such as {{position: alibi, at: 2L}}")
            parts: dict[str, Any] = {
                key: str(v) if key in ("train", "at") else v for key, v in values[side].items()
            }
            _refuse_unknown(parts, Side)
            values[side] = Side(**parts)
    return Claim(**values)


def _refuse_unknown(values: Mapping[str, Any], kind: type) -> None:
    known = [f.name for f in fields(kind)]
    unknown = sorted(str(key) for key in set(values) - set(known))
    if unknown:
        shown = ", ".join("is" if name == "relation" else name for name in known)
        raise ValueError(f"unknown setting {', '.join(unknown)}; allowed: {shown}")
