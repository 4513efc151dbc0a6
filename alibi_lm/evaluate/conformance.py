"""The certificate of a position scheme: whether it follows the protocol of `positions/base.py`, on one page."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from alibi_lm.evaluate.conformance_checks import Check, Conformance
from alibi_lm.positions import POSITIONS
from alibi_lm.settings import require


@dataclass
class CheckSchemeConfig:
    """Which scheme to check."""

    position: str | None = None
    """A registered scheme. With scheme_file: the name of the config in it, if it holds several."""
    scheme_file: str | None = None
    """A Python file with a scheme of your own and its config, a dataclass with `name` and `build`."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of the scheme, such as settings.factor=2."""
    json: bool = False
    """Print one JSON object instead of the page."""


def find_config(config: CheckSchemeConfig) -> Any:
    """The config of the scheme that is to be checked.

    Raises:
        ValueError: no such scheme, a file that cannot be loaded or holds none, or settings that do not fit.
    """
    known: dict[str, type] = dict(POSITIONS)
    if config.scheme_file is not None:
        path = Path(config.scheme_file)
        require(path.is_file(), f"scheme_file = {path} is not a file.")
        spec = importlib.util.spec_from_file_location(f"scheme_file_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise ValueError(f"scheme_file = {path} cannot be loaded: {type(error).__name__}: {error}") from error
        own = [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == spec.name]
        known = {
            c.name: c for c in own if dataclasses.is_dataclass(c) and hasattr(c, "build") and hasattr(c, "name")
        }
        require(
            bool(known),
            f"scheme_file = {path} holds no config of a scheme: a dataclass with `name` and `build(shape)`.",
        )
    name = config.position or (next(iter(known)) if len(known) == 1 else None)
    require(
        name is not None, f"Which scheme? Give scheme_file=<Python file>, or position= one of {', '.join(known)}."
    )
    require(name in known, f"position = {name}. Allowed here: {', '.join(known)}.")
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(known[str(name)]), config.settings))
    except Exception as error:
        raise ValueError(f"settings = {config.settings} do not fit {name}: {str(error).splitlines()[0]}") from None


def page(config: Any, checks: list[Check]) -> str:
    """The certificate as text."""
    failed = list(dict.fromkeys(check.name for check in checks if check.passed is False))
    settings = ", ".join(f"{k}={v}" for k, v in dataclasses.asdict(config).items() if k != "name")
    marks = {True: "pass", False: "FAIL", None: "    "}
    lines = [f"Position scheme {config.name}" + (f" ({settings})" if settings else ""), ""]
    lines += [f"{marks[check.passed]}  {check.name:18}  {check.found}" for check in checks]
    verdict = (
        f"does not conform: {', '.join(failed)}" if failed else "conforms to the protocol of position schemes"
    )
    return "\n".join([*lines, "", f"{config.name} {verdict}."])


def check_scheme(config: CheckSchemeConfig) -> int:
    """Print the certificate of a scheme; returns the exit status, 1 if a check fails.

    Raises:
        ValueError: see `find_config`; or the scheme cannot be built at all.
    """
    own = find_config(config)
    checks = list(Conformance(own).checks())
    conforms = all(check.passed is not False for check in checks)
    if config.json:
        settings = {k: v for k, v in dataclasses.asdict(own).items() if k != "name"}
        found = [dataclasses.asdict(check) for check in checks]
        print(json.dumps({"position": own.name, "settings": settings, "conforms": conforms, "checks": found}))
    else:
        print(page(own, checks))
    return 0 if conforms else 1
