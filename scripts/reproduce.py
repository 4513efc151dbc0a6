"""The main job: train and evaluate every run of an experiment, then draw (make reproduce)."""

import sys

from alibi_lm.cli import run_experiment
from alibi_lm.experiment import reproduce

if __name__ == "__main__":
    sys.exit(run_experiment(reproduce))
