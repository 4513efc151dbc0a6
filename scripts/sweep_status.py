"""State of every run of an experiment: python scripts/sweep_status.py experiment=quick [overrides of training].

A line a run: finished, running (a living process holds its folder), failed (with its error), partial (was
stopped or killed: the training command resumes it) or missing (named by the experiment's `study`, never begun).
"""

import sys
from pathlib import Path

from alibi_lm.experiment import planned_runs
from alibi_lm.runs import Status, failed, status
from alibi_lm.tracking import METRICS_FILE, read_metrics

STATES: tuple[Status, ...] = ("finished", "running", "failed", "partial", "missing")


def progress(folder: Path, steps: int | None) -> str:
    """`<last step with metrics>/<steps>`; empty before the first row."""
    try:
        rows = read_metrics(folder / METRICS_FILE)
    except (OSError, ValueError):
        rows = []
    return f"{rows[-1]['step']}/{steps or '?'}" if rows else ""


def main(arguments: list[str]) -> int:
    """Print the table and its sum; returns the exit status."""
    names = [argument.split("=", 1)[1] for argument in arguments if argument.startswith("experiment=")]
    experiment = names[-1] if names else "quick"
    try:
        runs: dict[Path, int | None] = {
            folder: config.steps
            for folder, (_, config) in planned_runs(
                experiment, [a for a in arguments if not a.startswith("experiment=")]
            ).items()
        }
    except Exception as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for config in sorted(Path("outputs", experiment, "runs").glob("*/config.yaml")):
        runs.setdefault(config.parent, None)  # there, but not of the study
    states = {folder: status(folder) for folder in runs}
    for folder in sorted(runs, key=lambda f: (STATES.index(states[f]), f)):
        failure = failed(folder) if states[folder] == "failed" else None
        message = failure.get("message", "") if failure else ""
        print(f"{states[folder]:8}  {folder!s:50}  {progress(folder, runs[folder]):>12}  {message}".rstrip())
    counts = {state: list(states.values()).count(state) for state in STATES}
    print(", ".join(f"{count} {state}" for state, count in counts.items() if count or state == "finished"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
