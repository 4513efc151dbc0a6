"""Settings: dataclass fields that say what depends on them, how they are read from text, and what is refused."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import itertools
import json
import textwrap
import traceback
import types
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError

Counts = Literal["run", "rounding", "label", "no"]
"""What a setting changes: the trained model or its result (`run`), only its last bits (`rounding`), only the run's
name (`label`), or nothing (`no`)."""

LARGEST = {"seed": 2**63 - 1, "threads": 1024, "vocab_size": 2**24, "num_layers": 10_000}
"""The largest values of whole numbers, by the last part of the setting's name; all others end at 2^31 - 1.

No machine has cores for so many threads, and torch crashes when it is asked for very many."""

C = TypeVar("C")


def setting(
    default: Any = dataclasses.MISSING,
    *,
    counts: Counts,
    default_factory: Any = dataclasses.MISSING,
    later: bool = False,
    before: Any = dataclasses.MISSING,
) -> Any:
    """A dataclass field that says whether results depend on it.

    The fields of a nested config count like the field that holds it, unless they say otherwise. `later` marks a
    setting that was added after runs had been trained without it. They did what it does at its default or, if the
    default is something new, at `before`: that value is read for them, and leaves a run's identity unchanged.
    """
    assert counts in get_args(Counts)
    metadata = {"counts": counts, "later": later or before is not dataclasses.MISSING, "before": before}
    return dataclasses.field(default=default, default_factory=default_factory, metadata=metadata)


def before(field: dataclasses.Field[Any]) -> Any:
    """The value of a later setting that runs had without it."""
    if field.metadata["before"] is not dataclasses.MISSING:
        return field.metadata["before"]
    factory: Any = field.default_factory
    return field.default if factory is dataclasses.MISSING else factory()


COMBINED = ("query_scale.", "training_positions.", "positions_until")
"""How settings begin that combine with every scheme; a model's scores depend on them unless at their defaults."""


def counting(config: Any, *kinds: Counts) -> dict[str, Any]:
    """The settings of a config that count as one of `kinds`, by dotted name (`optimizer.lr`)."""
    return {name: value for name, value, kind in _walk(config, "", None) if kind in kinds}


def identifying(config: Any) -> dict[str, Any]:
    """The settings that identify a run or a part of its config: all that count, unless `later` and as before."""
    found = _walk(config, "", "run", later_defaults=False)
    return {name: value for name, value, kind in found if kind in ("run", "rounding")}


def _walk(
    config: Any, prefix: str, inherited: Counts | None, later_defaults: bool = True
) -> Iterator[tuple[str, Any, Counts]]:
    for field in dataclasses.fields(config):
        kind = field.metadata.get("counts", inherited)
        assert kind is not None, f"{type(config).__name__}.{field.name} does not say what it counts as"
        value = getattr(config, field.name)
        if field.metadata.get("later") and not later_defaults and value == before(field):
            continue
        if dataclasses.is_dataclass(value):
            yield from _walk(value, f"{prefix}{field.name}.", kind, later_defaults)
        else:
            yield f"{prefix}{field.name}", value, kind


def require(condition: bool, message: str) -> None:
    """Raise ValueError(message) unless the condition holds.

    Messages have one form: `setting = value`, what is wrong with it or what is allowed, what to do.
    """
    if not condition:
        raise ValueError(message)


def require_one_of(name: str, value: Any, allowed: Collection[str]) -> None:
    """Refuse a setting whose value is none of those allowed."""
    require(value in allowed, f"{name} = {value!r}. Allowed: {', '.join(allowed)}.")


def require_at_least(name: str, value: float | None, least: int) -> None:
    """Refuse a whole number that is too small; None is for a setting that may be left out."""
    require(value is None or value >= least, f"{name} = {value}. Use a whole number >= {least}.")


def listing(names: Sequence[str]) -> str:
    """The first four names and the number of others, for messages."""
    shown = ", ".join(names[:4]) or "nothing"
    return shown + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def check_values(config: Any, prefix: str = "") -> None:
    """Refuse values that no setting may have: an empty text, or a whole number that overflows or fills the memory.

    Raises:
        ValueError: such a value; the message has the setting's dotted name.
    """
    for field in dataclasses.fields(config):
        name, value = f"{prefix}{field.name}", getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            check_values(value, f"{name}.")
            continue
        require(
            not (isinstance(value, str) and not value.strip()),
            f"{name} is empty. Give a value, or leave it out.",
        )
        largest = LARGEST.get(field.name, 2**31 - 1)
        for number in value if isinstance(value, list | tuple) else [value]:
            require(
                not isinstance(number, int) or number <= largest,
                f"{name} = {value}. Use whole numbers up to {largest}.",
            )


# --- settings as text ----------------------------------------------------------------------------


_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    list: "a list such as '[64,128]', in quotes",
    dict: "settings such as name.key=value",
}


def parse(config: type[C], arguments: Sequence[str]) -> C:
    """A config dataclass from `name=value` arguments.

    A text setting takes its value literally, with any characters; other values are read as YAML. A field without a
    default must be given.

    Raises:
        ValueError: an unknown name, a value of the wrong type or out of range, or a setting that is missing.
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    cfg = OmegaConf.structured(config)
    allowed = ", ".join(f"{field.name}=" for field in dataclasses.fields(config))  # type: ignore[arg-type]
    for argument in arguments:
        name, equals, text = argument.partition("=")
        kind, optional = _type_of(config, name)
        require(bool(equals) and kind is not None, f"{argument!r} is not a setting here. Allowed: {allowed}")
        require(bool(text.strip()), f"{name} is empty. Give a value, or leave {name}= out.")
        value: Any = text.replace("${", "\\${")  # no interpolation
        try:
            if optional and text == "null":
                value = None
            elif kind is not str:
                value = yaml.safe_load(text)
            empty = value == [] == OmegaConf.select(cfg, name)
            OmegaConf.update(cfg, name, value)
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            words = _WORDS.get(get_origin(kind) or kind, "another value")
            raise ValueError(f"{name} = {text}. Use {words}.") from error
        require(not empty, f"{name} = []. Name at least one, or leave {name}= out for the default.")
    missing = sorted(OmegaConf.missing_keys(cfg))
    require(not missing, f"missing: {', '.join(f'{name}=...' for name in missing)}")
    result: Any = OmegaConf.to_object(cfg)
    check_values(result)
    return result


def _type_of(config: Any, name: str) -> tuple[Any, bool]:
    """Type of the setting with this dotted name, without `| None`, and whether it allows None; None: no such."""
    head, _, rest = name.partition(".")
    kind, optional = get_type_hints(config).get(head), False
    if get_origin(kind) in (Union, types.UnionType):
        kind, optional = next(a for a in get_args(kind) if a is not type(None)), True
    if rest and dataclasses.is_dataclass(kind):
        return _type_of(kind, rest)
    if rest:
        kind = Any if get_origin(kind) is dict else None
    return kind, optional


def described(config: Any) -> Iterator[tuple[str, Any, str]]:
    """Name, value and description of each setting of a config, or of a config class with its defaults.

    The description is the string below the field.
    """
    kind = config if isinstance(config, type) else type(config)
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0].body  # type: ignore[attr-defined]
    texts: dict[str, str] = {}
    for node, after in itertools.pairwise(body):
        value = after.value if isinstance(after, ast.Expr) else None
        if isinstance(node, ast.AnnAssign) and isinstance(value, ast.Constant):
            texts[node.target.id] = " ".join(str(value.value).split())  # type: ignore[union-attr]
    for base in reversed(kind.__mro__[1:-1]):
        for name, _, text in described(base) if dataclasses.is_dataclass(base) else ():
            texts.setdefault(name, text)
    for field in dataclasses.fields(config):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        yield field.name, default if config is kind else getattr(config, field.name), texts.get(field.name, "")


def usage(config: Any, description: str) -> str:
    """A help text: the description, then each setting of a config or config class, its value and what it means."""
    return "\n".join([description.strip(), "", "Settings, as name=value:", *_usage(config, "")])


def _usage(config: Any, prefix: str) -> Iterator[str]:
    for name, value, text in described(config):
        if dataclasses.is_dataclass(value):
            yield from _usage(value, f"{prefix}{name}.")
        if dataclasses.is_dataclass(value) or (prefix and name == "name"):  # a group is chosen by group=name
            continue
        shown = value
        if value is dataclasses.MISSING or value == "???":  # the second is omegaconf.MISSING
            shown = "..."
        elif value is None or isinstance(value, bool):
            shown = json.dumps(value)
        yield f"  {prefix}{name}={shown}"
        yield from textwrap.wrap(text, 100, initial_indent="      ", subsequent_indent="      ")


# --- errors --------------------------------------------------------------------------------------


def describe_error(error: Exception) -> str:
    """What a command prints for an error: a short message for a user's mistake, a traceback for a bug of ours.

    A ValueError, an error of the operating system, of Hydra or of YAML, and an error that torch raises because the
    machine lacks something count as the user's.
    """
    from hydra.errors import HydraException, OverrideParseException
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
    from yaml import YAMLError

    mistakes = (ValueError, OSError, RuntimeError, NotImplementedError, HydraException, OmegaConfBaseException)
    if isinstance(error, OverrideParseException):
        message = _quoting(str(error.override), error.message)
    elif isinstance(error, YAMLError):
        message = f"{' '.join(str(error).split())}. Indent YAML files with spaces, not tabs."
    elif isinstance(error, MemoryError):
        message = "this machine does not have enough memory"
    elif isinstance(error.__cause__, ConfigAttributeError | ConfigKeyError):
        message = _unknown_setting(error.__cause__) or str(error)
    elif isinstance(error, mistakes):
        # Below the first line omegaconf names its own types, which do not help a user.
        cause = str(error.__cause__).partition("\n    full_key:")[0]
        cause = f"\n{cause}" if isinstance(error.__cause__, OmegaConfBaseException) else ""
        message = f"{str(error).split('Config search path:')[0].strip()}{cause}" or type(error).__name__
    else:
        return "".join(traceback.format_exception(error))
    return f"error: {message}"


def _unknown_setting(error: ConfigAttributeError | ConfigKeyError) -> str | None:
    """Hydra's own words advise `+name=value`, which only adds what nothing reads."""
    if not dataclasses.is_dataclass(error.object_type):
        return None
    known = sorted(field.name for field in dataclasses.fields(error.object_type))
    near = difflib.get_close_matches(str(error.key), known, 1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return (
        f"{error.full_key or error.key}: {error.object_type.__name__} has no such setting.{hint} "
        f"Allowed: {', '.join(known)}."
    )


def _quoting(override: str, message: str) -> str:
    """Say what Hydra could not parse, and how to write it correctly."""
    name, equals, value = override.partition("=")
    if not equals or not name.isascii():
        return f"{override!r} is not understood. Give settings as name=value, with a plain = between them."
    if message.startswith("Error parsing override"):  # it was parsed, but makes no sense: Hydra explains it well
        return message.split("\nSee https")[0]
    quoted = value.replace('"', '\\"')
    what = message.splitlines()[0].split(":")[0]
    return (
        f"{override!r} is not understood ({what}). In a value, commas, brackets, braces and quotes "
        "have a special meaning for Hydra. Put the value in quotes for Hydra, and all of it for the shell:\n"
        f"  '{name}=\"{quoted}\"'"
    )
