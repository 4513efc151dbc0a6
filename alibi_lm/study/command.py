"""Command lines of the study scripts: `key=value` arguments, the folder they mean, and short errors."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Settings = dict[str, Any]

FOLDER: Settings = {"experiment": "quick", "folder": None}
"""Settings that every study script takes: the experiment, or the folder that holds results.jsonl."""


def parse(arguments: Sequence[str], defaults: Mapping[str, Any], needs: Mapping[str, str]) -> Settings:
    """Settings from `key=value` arguments.

    Args:
        arguments: as given on the command line.
        defaults: every setting there is; a default's type is the setting's type, None takes text or a list.
        needs: words for the error message, by setting (`{"near": "a share such as 0.02"}`); may be empty.

    Raises:
        ValueError: an argument without `=`, an unknown setting, or a value of the wrong type.
    """
    settings: Settings = dict(defaults)
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if not equals or name not in defaults:
            raise ValueError(f"{argument!r} is no setting here. Allowed: {', '.join(f'{k}=' for k in defaults)}")
        settings[name] = _typed(name, text, defaults[name], needs.get(name, ""))
    return settings


def study_folder(settings: Settings) -> Path:
    """The folder that holds `results.jsonl`: `folder=`, or outputs/<experiment>/extrapolation.

    Raises:
        ValueError: there is no such folder or it has no results.
    """
    experiment = settings["experiment"]
    named = settings["folder"]
    folder = Path(named) if named is not None else Path("outputs") / experiment / "extrapolation"
    if not (folder / "results.jsonl").is_file():
        how = "" if named is not None else f"; make eval-extrapolation EXPERIMENT={experiment} writes it"
        raise ValueError(f"{folder / 'results.jsonl'} does not exist{how}. Or give folder=<folder of results>.")
    return folder


def bench_file(settings: Settings, folder: Path) -> Path:
    """Rows of the benchmark: `bench=`, or those published with the results, or the last ones measured here."""
    published = folder / "bench.jsonl"
    if settings["bench"] is not None:
        return Path(settings["bench"])
    return published if published.is_file() else Path("outputs") / "bench" / "results.jsonl"


def main(task: Callable[[list[str]], None]) -> int:
    """Run a script's task on the command line's arguments; a user's mistake ends in one message and status 1."""
    try:
        task(sys.argv[1:])
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _typed(name: str, text: str, default: Any, need: str) -> Any:
    if default is None or isinstance(default, str):
        return text  # as given: folders may hold any sign
    import yaml

    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = None
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not type(default):
        raise ValueError(f"{name} = {text}; it must be {need or _KINDS[type(default)]}")
    return value


_KINDS = {bool: "true or false", int: "a whole number", float: "a number", list: "a list such as '[64,128]'"}
