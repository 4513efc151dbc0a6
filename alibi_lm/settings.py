"""What a setting is: a field that says what depends on it, and a check that speaks before any work starts."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

Counts = Literal["run", "rounding", "label", "no"]
"""What a setting changes: the trained model or its result (`run`), the last bits of it (`rounding`), only how the
run is called (`label`), or nothing (`no`)."""


def setting(
    default: Any = dataclasses.MISSING, *, counts: Counts, default_factory: Any = dataclasses.MISSING
) -> Any:
    """A dataclass field that says whether results depend on it.

    The fields of a nested config count as the field that holds it does, unless they say otherwise.
    """
    assert counts in get_args(Counts)
    return dataclasses.field(default=default, default_factory=default_factory, metadata={"counts": counts})


def counts(config: Any) -> dict[str, Counts]:
    """What each setting of a config counts as, by its dotted name (`optimizer.lr`)."""
    return {name: kind for name, _, kind in _walk(config, "", None)}


def counting(config: Any, *kinds: Counts) -> dict[str, Any]:
    """The settings of a config that count as one of `kinds`, by dotted name."""
    return {name: value for name, value, kind in _walk(config, "", None) if kind in kinds}


def _walk(config: Any, prefix: str, inherited: Counts | None) -> list[tuple[str, Any, Counts]]:
    found: list[tuple[str, Any, Counts]] = []
    for field in dataclasses.fields(config):
        kind = field.metadata.get("counts", inherited)
        assert kind is not None, f"{type(config).__name__}.{field.name} does not say what it counts as"
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found += _walk(value, f"{prefix}{field.name}.", kind)
        else:
            found.append((f"{prefix}{field.name}", value, kind))
    return found


def require(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless the condition holds.

    Messages have one form: `setting = value`, what is wrong with it or what is allowed, what to do.
    """
    if not condition:
        raise ValueError(message)
