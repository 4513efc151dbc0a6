"""Train and evaluate every run of an experiment, then draw (make reproduce)."""

from alibi_lm.cli import experiment_command
from alibi_lm.experiment import reproduce

if __name__ == "__main__":
    experiment_command(reproduce)()
