"""Runs a list of jobs on two processes as torchrun has them, and notes what every process but the first writes.

    python tests/two_process_driver.py JOBS.json

JOBS.json: {"place": folder, "jobs": [{"train": [overrides], "folder": run folder} or {"evaluate": settings}]}.
With "stopped": true the last process, and only that, is asked to stop in the first validation.
Process 1 leaves `written.json`: the files below `place` that it opened for writing, made, renamed or removed.
"""

import json
import os
import signal
import socket
import sys
from pathlib import Path

written: list[str] = []


def watch(place: str) -> None:
    """Note every change that this process makes to a file below `place`."""
    changes = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.truncate"}

    def hook(event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            change = isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        else:
            path, change = (arguments[0] if arguments else None), event in changes
        if change and isinstance(path, str | os.PathLike) and os.path.abspath(path).startswith(place):
            written.append(f"{event} {path}")

    sys.addaudithook(hook)


def train_until_stopped(config, folder: Path, asked: bool) -> None:
    """Train until the first validation, in which this process is asked to stop, or another one is."""
    import alibi_lm.train

    score = alibi_lm.train.score

    def interrupted(*args, **kwargs):
        if asked:
            os.kill(os.getpid(), signal.SIGTERM)
        return score(*args, **kwargs)

    alibi_lm.train.score = interrupted
    try:
        alibi_lm.train.train(config, folder)
    except alibi_lm.train.Interrupted:
        return
    finally:
        alibi_lm.train.score = score
    raise AssertionError("the run went on")


def become_two() -> None:
    """Return in two new processes with torchrun's environment; this one waits for them and ends as they do."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    children = []
    for rank in range(2):
        children.append(os.fork())
        if children[-1] == 0:
            os.environ.update(place, RANK=str(rank), LOCAL_RANK=str(rank))
            return
    while children:
        child, status = os.wait()
        children.remove(child)
        if status:
            for other in children:
                os.kill(other, signal.SIGKILL)
            sys.exit(1)
    sys.exit(0)


def main() -> None:
    from alibi_lm import distributed
    from alibi_lm.evaluate.config import EvaluateConfig
    from alibi_lm.evaluate.sweep import evaluate
    from alibi_lm.experiment import compose
    from alibi_lm.tracking import JsonlConfig
    from alibi_lm.train import train

    become_two()
    work = json.loads(Path(sys.argv[1]).read_text())
    rank = int(os.environ["RANK"])
    if rank:
        watch(work["place"])
    for job in work["jobs"]:
        if job.get("stopped"):
            train_until_stopped(compose(job["train"]), Path(job["folder"]), asked=rank > 0)
        elif "train" in job:
            train(compose(job["train"]), Path(job["folder"]))
        else:
            world = distributed.start("cpu")
            for _ in evaluate(EvaluateConfig(**job["evaluate"], tracking=JsonlConfig()), world):
                pass
            distributed.stop()
    if rank:
        changes = list(written)
        Path(work["place"], "written.json").write_text(json.dumps(changes))


if __name__ == "__main__":
    main()
