"""Print the state of every run of an experiment: python scripts/sweep_status.py experiment=quick."""

from alibi_lm.cli import experiment_command
from alibi_lm.experiment import print_status

if __name__ == "__main__":
    experiment_command(print_status)()
