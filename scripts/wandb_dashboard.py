"""Publish the dashboard to Weights & Biases: python scripts/wandb_dashboard.py project=alibi_lm experiment=quick.

With dry_run=true the specification is printed as JSON and no network is used.
"""

import json
import sys

from alibi_lm.study.command import main, parse
from alibi_lm.study.dashboard import build, publish, specification


def task(arguments: list[str]) -> None:
    """Print the address of the published dashboard, or its specification."""
    own = {"project": "alibi_lm", "entity": None, "experiment": None, "dry_run": False}
    settings = parse(arguments, own, {})
    dashboard = build(settings["project"], settings["entity"], settings["experiment"])
    if settings["dry_run"]:
        print(json.dumps(specification(dashboard), indent=2))
    else:
        print(publish(dashboard))


if __name__ == "__main__":
    sys.exit(main(task))
