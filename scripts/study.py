"""Do a whole study: reproduce, further measurements, claims, report and the published folder (make study)."""

from alibi_lm.cli import experiment_command
from alibi_lm.experiment import study

if __name__ == "__main__":
    experiment_command(study)()
