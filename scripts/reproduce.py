"""The main job: train every run of an experiment, then evaluate and draw (make reproduce)."""

import subprocess
import sys

from alibi_lm.experiment import ROOT, reproduce


def main(arguments: list[str]) -> int:
    """Run `experiment=NAME` and further overrides of training; returns the exit status."""
    names = [a.split("=", 1)[1] for a in arguments if a.startswith("experiment=")]
    experiment = names[-1] if names else "quick"
    try:
        status = reproduce(experiment, [a for a in arguments if not a.startswith("experiment=")])
    except Exception as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    # What finished is evaluated even where a run failed; the failure stays in the exit status.
    shared = [a for a in arguments if a.startswith(("tracking", "device=", "threads="))]
    evaluate = [sys.executable, str(ROOT / "scripts" / "evaluate.py"), f"experiment={experiment}", *shared]
    return subprocess.run(evaluate, check=False).returncode or status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
