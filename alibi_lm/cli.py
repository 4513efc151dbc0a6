"""What all commands share: how settings are read, and how a command ends when something goes wrong."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, open_dict

from alibi_lm.config import register, spelled, to_config
from alibi_lm.settings import describe_error, parse, usage

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
C = TypeVar("C")


def command(config: type[C]) -> Callable[[Callable[[C], int | None]], Callable[..., None]]:
    """Decorate a script's main function: it takes `name=value` arguments as a `config`, checked and typed.

    The decorated function ends the process (SystemExit). Its arguments are those of the command line unless a
    sequence of strings is given. `-h` prints the script's docstring and all settings.
    """

    def decorate(task: Callable[[C], int | None]) -> Callable[..., None]:
        def text() -> str:
            return usage(config, sys.modules[task.__module__].__doc__ or "")

        return _main(text, lambda given: task(parse(config, given)))

    return decorate


def experiment_command(job: Callable[[str, list[str]], int | None]) -> Callable[..., None]:
    """A command that takes an experiment and Hydra overrides of its runs: job(experiment, overrides).

    `-h` prints the job's docstring without its sections for readers of the code.
    """
    about = re.split(r"\n\n(?:Args|Returns|Raises):", inspect.getdoc(job) or "")[0]
    settings = "experiment=quick\n      The experiment.\n  Any setting of scripts/train.py, for all its runs."

    def work(given: list[str]) -> int | None:
        names = [a.removeprefix("experiment=") for a in given if a.startswith("experiment=")]
        return job(names[-1] if names else "quick", [a for a in given if not a.startswith("experiment=")])

    return _main(lambda: f"{about}\n\nSettings, as name=value:\n  {settings}", work)


def _main(text: Callable[[], str], work: Callable[[list[str]], int | None]) -> Callable[..., None]:
    """The main function of a script with a help text, by default on the arguments of the command line."""

    def main(arguments: Sequence[str] | None = None) -> None:
        given = list(sys.argv[1:] if arguments is None else arguments)
        sys.exit(_run(lambda: print(text()) if _asks_for_help(given) else work(given)))

    return main


def _asks_for_help(arguments: Sequence[str]) -> bool:
    return any(a in ("-h", "--help") for a in arguments)


def hydra_command(config: type[C], name: str) -> Callable[[Callable[[C], Any]], Callable[..., None]]:
    """Decorate a script's main function: Hydra composes a `config` from configs/`name`.yaml, also in multiruns.

    In a multirun a failing job does not stop the others; failed jobs are listed at the end, and the status is 1.
    `-h` prints the script's docstring, the config groups and all settings, as the other arguments choose them.
    """
    root, name = CONFIGS / Path(name).parent, Path(name).name
    register(name, config)

    def decorate(task: Callable[[C], Any]) -> Callable[..., None]:
        def main() -> None:
            import hydra

            given = sys.argv[1:] = spelled(sys.argv[1:], config)
            if _asks_for_help(given):
                about = sys.modules[task.__module__].__doc__ or ""
                sys.exit(_run(lambda: print(_composed_usage(root, name, given, about))))
            run = hydra.main(version_base="1.3", config_path=str(root), config_name=name)
            os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach `_run`, which makes messages of them
            status = _run(run(_job(task)))
            sys.exit(_tell_failures(sys.argv[1:]) or status)

        return main

    return decorate


def _composed_usage(root: Path, name: str, arguments: Sequence[str], about: str) -> str:
    """The help text of a Hydra command; settings have the values that the overrides among the arguments give."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    with initialize_config_dir(str(root), version_base="1.3"):
        composed = compose(name, [a for a in arguments if not a.startswith("-")], return_hydra_config=True)
        with open_dict(composed):
            chosen = {g: c for g, c in composed.pop("hydra").runtime.choices.items() if "/" not in g}
        loader = GlobalHydra.instance().config_loader()
        choices = {group: loader.get_group_options(group) for group in chosen}
    lines = [about.strip(), "", "Config groups, as group=choice; a choice has its own settings:"]
    for group, choice in reversed(chosen.items()):
        lines.append(f"  {group}={choice or 'null'}")
        lines += textwrap.wrap(", ".join(choices[group]), 100, initial_indent="      ", subsequent_indent="      ")
    lines += [
        "",
        "Flags of Hydra: -m for several runs, --cfg job for the config as YAML, --hydra-help for all of them.",
    ]
    return usage(to_config(composed), "\n".join(lines))


def _run(work: Callable[[], int | None]) -> int:
    """Do the work of a command and return its exit status; every error ends here, in the same way."""
    with _patient_output():
        try:
            return work() or 0
        except KeyboardInterrupt:
            print("interrupted; give the command again to go on", file=sys.stderr)
            return 130
        except Exception as error:
            return _say(error)


def _say(error: Exception) -> int:
    status = getattr(error, "status", None)  # asked to stop: no error
    print(error if status is not None else describe_error(error), file=sys.stderr, flush=True)
    return 1 if status is None else status


# --- output --------------------------------------------------------------------------------------


class _Patient:
    """A stream whose reader may go away, or whose disk may be full: what cannot be written is dropped."""

    def __init__(self, name: str) -> None:
        self._stream, self._name = getattr(sys, name), name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._patience():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._patience():
            self._stream.flush()

    @contextlib.contextmanager
    def _patience(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
            if self._name == "stdout" and not isinstance(error, BrokenPipeError):
                print(f"standard output cannot be written ({error.strerror}); going on without", file=sys.stderr)


@contextlib.contextmanager
def _patient_output() -> Iterator[None]:
    """Inside this context, printing fails neither for a character that the terminal lacks nor for a full disk."""
    before = {name: stream for name in ("stdout", "stderr") if (stream := getattr(sys, name)) is not None}
    for name, stream in before.items():
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, _Patient(name))
    try:
        yield
    finally:
        for name, stream in before.items():
            getattr(sys, name).flush()
            setattr(sys, name, stream)


# --- multiruns -----------------------------------------------------------------------------------

_failures: list[_Failure] = []


class _Failure:
    """A failed job of a multirun; making one records it.

    It is the job's result. A launcher that runs jobs in other processes sends results back, which makes it again.
    """

    def __init__(self, number: int, overrides: tuple[str, ...], message: str) -> None:
        self.number, self.overrides, self.message = number, overrides, message
        if all(known.number != number for known in _failures):
            _failures.append(self)

    def __reduce__(self) -> tuple[type[_Failure], tuple[Any, ...]]:
        return _Failure, (self.number, self.overrides, self.message)


def _job(task: Callable[[C], Any]) -> Callable[[DictConfig], Any]:
    """The Hydra job of a task: in a multirun, an error becomes a result."""

    @functools.wraps(task)
    def job(cfg: DictConfig) -> _Failure | None:
        from hydra.core.hydra_config import HydraConfig
        from hydra.types import RunMode

        hydra = HydraConfig.get()
        with _patient_output():
            try:
                task(to_config(cfg))
            except Exception as error:
                if hydra.mode == RunMode.RUN or hasattr(error, "status"):
                    sys.exit(_say(error))
                print(f"job {hydra.job.num} failed; the reason is told at the end", file=sys.stderr, flush=True)
                return _Failure(hydra.job.num, tuple(hydra.overrides.task), describe_error(error))
        return None

    return job


def _tell_failures(arguments: Sequence[str]) -> int:
    """Return 0, or list every failed job of a multirun by its own settings and return 1."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    if not _failures:
        return 0
    given = OverridesParser.create().parse_overrides([a for a in arguments if not a.startswith("-")])
    swept = {override.key_or_group for override in given if override.is_sweep_override()}
    print(f"\n{len(_failures)} of the jobs failed:", file=sys.stderr)
    for failure in _failures:
        name = ", ".join(o for o in failure.overrides if not swept or o.lstrip("+").split("=")[0] in swept)
        print(f"  job {failure.number} ({name}): {failure.message}", file=sys.stderr)
    return 1
