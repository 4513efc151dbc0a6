"""Trains a run in a process of its own, which ends itself at a given moment.

    python tests/killed_driver.py JOB

JOB holds a pickle of keyword arguments of `main`. The moments are the calls at which the state of a run changes:
steps, validations, and every sync, rename and removal of a file. Those made are listed in `<folder>.calls`.
"""

import json
import os
import pickle
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def end_itself(kill_at: int | tuple[str, int] | None, number: int) -> list[str]:
    """Send this process a signal before a call: the one after `kill_at` calls, of all or of the one named."""
    import torch

    import alibi_lm.runs
    import alibi_lm.train

    calls: list[str] = []

    def watch(owner: Any, name: str) -> None:
        function: Callable[..., Any] = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if kill_at in (len(calls), (name, calls.count(name))):
                os.kill(os.getpid(), number)
            calls.append(name)
            return function(*args, **kwargs)

        setattr(owner, name, call)

    for name in ("fsync", "rename", "replace", "unlink", "rmdir"):
        watch(os, name)
    watch(torch.optim.AdamW, "step")
    watch(torch.Tensor, "backward")
    watch(alibi_lm.train, "validate")
    watch(alibi_lm.train, "_self_check")
    watch(alibi_lm.runs, "mark_finished")
    return calls


def main(
    config: Any = None,
    script: list[str] | None = None,
    folder: Path | None = None,
    kill_at: int | tuple[str, int] | None = None,
    after: float | None = None,
    number: int = signal.SIGKILL,
) -> None:
    """Train a config into a folder, or run scripts/train.py with the arguments `script`.

    The signal `number` comes before a call, see `end_itself`; SIGALRM, which nothing handles, after some seconds.
    """
    calls = end_itself(kill_at, number)
    if after is not None:
        signal.setitimer(signal.ITIMER_REAL, after)
    if script is not None:
        sys.argv = ["train.py", *script]
        runpy.run_path(str(ROOT / "scripts" / "train.py"), run_name="__main__")
        return
    from alibi_lm.train import train

    assert folder is not None
    train(config, folder)
    folder.with_suffix(".calls").write_text(json.dumps(calls))


if __name__ == "__main__":
    main(**pickle.loads(Path(sys.argv[1]).read_bytes()))
