"""A whole study: reproduce, further measurements, claims, report and the published folder (make study)."""

import sys

from alibi_lm.cli import run_experiment
from alibi_lm.experiment import study

if __name__ == "__main__":
    sys.exit(run_experiment(study))
