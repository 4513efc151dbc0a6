"""Runs scripts in processes forked from one that has imported everything: seconds less for each command.

Reads a JSON object a line from standard input (script, arguments, folder, environment, output) and answers each
with the exit status. What a command prints goes to the files `<output>.out` and `<output>.err`.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import sys
import traceback


def run(request: dict) -> None:
    """In the forked process: become the command, and end as it ends."""
    status = 1
    try:
        for number, suffix in ((1, "out"), (2, "err")):
            target = os.open(f"{request['output']}.{suffix}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(target, number)
        os.chdir(request["folder"])
        os.environ.update(request["environment"])
        sys.argv = [request["script"], *request["arguments"]]
        sys.path[0] = os.path.dirname(request["script"])
        runpy.run_path(request["script"], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    import alibi_lm.study.figures
    import alibi_lm.train  # noqa: F401

    # What an optimizer of torch, a checkpoint, a text and a figure load at their first use.
    for name in (
        "torch._dynamo",
        "safetensors.torch",
        "filelock",
        "tokenizers",
        "matplotlib.pyplot",
        "hydra.main",
        "scipy.stats",
    ):
        importlib.import_module(name)
    gc.freeze()  # no collection in a forked process looks at what is shared, which would copy it

    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            run(json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
