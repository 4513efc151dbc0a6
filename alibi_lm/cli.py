"""What all scripts share: errors as short messages, and multiruns in which one failure hides no other."""

from __future__ import annotations

import functools
import sys
import traceback
from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig

_failures: list[str] = []


def report_errors(task: Callable[[DictConfig], Any]) -> Callable[[DictConfig], Any]:
    """Decorate a Hydra task: a user's mistake ends in a message and exit status 1, without a traceback.

    In a multirun the other jobs go on, and all failures are listed again at the end (see `exit_status`).
    """

    @functools.wraps(task)
    def run(cfg: DictConfig) -> Any:
        from hydra.core.hydra_config import HydraConfig
        from hydra.types import RunMode

        try:
            return task(cfg)
        except KeyboardInterrupt:
            print("interrupted; give the command again to go on", file=sys.stderr)
            sys.exit(130)
        except Exception as error:
            status = getattr(error, "status", None)
            if status is not None:  # asked to stop: not an error
                print(error, file=sys.stderr)
                sys.exit(status)
            message = _describe(error)
            if HydraConfig.get().mode == RunMode.RUN:
                print(message, file=sys.stderr)
                sys.exit(1)
            job = HydraConfig.get().job
            failure = f"job {job.num} ({job.override_dirname}): {message}"
            _remember(failure)
            print(f"FAILED {failure}", file=sys.stderr, flush=True)
            return _Failure(failure)

    return run


def run_experiment(job: Callable[[str, list[str]], int]) -> int:
    """Call job(experiment, overrides) as the command line says; returns the exit status.

    Mistakes end in a short message and status 1.
    """
    names = [a.removeprefix("experiment=") for a in sys.argv[1:] if a.startswith("experiment=")]
    overrides = [a for a in sys.argv[1:] if not a.startswith("experiment=")]
    try:
        return job(names[-1] if names else "quick", overrides)
    except KeyboardInterrupt:
        print("interrupted; give the command again to go on", file=sys.stderr)
        return 130
    except Exception as error:
        print(_describe(error), file=sys.stderr)
        return 1


class _Failure:
    """A failed job's result. A launcher that runs jobs elsewhere sends it back, and that is how it is noticed."""

    def __init__(self, failure: str) -> None:
        self.failure = failure

    def __reduce__(self) -> tuple[Callable[[str], _Failure], tuple[str]]:
        return _remember, (self.failure,)


def _remember(failure: str) -> _Failure:
    if failure not in _failures:
        _failures.append(failure)
    return _Failure(failure)


def exit_status() -> int:
    """0, or 1 after listing every failed job of a multirun."""
    if _failures:
        print(f"\n{len(_failures)} of the jobs failed:", *_failures, sep="\n  ", file=sys.stderr)
    return 1 if _failures else 0


def _describe(error: Exception) -> str:
    """A message for a mistake of the user, a traceback for a mistake of ours."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    mistakes = (ValueError, OSError, RuntimeError, NotImplementedError, HydraException, OmegaConfBaseException)
    if isinstance(error, mistakes):
        return f"error: {error}"
    return "".join(traceback.format_exception(error))
