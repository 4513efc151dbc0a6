"""Change trained models for longer inputs: python scripts/test_time.py runs=outputs/quick/runs/rotary_L64_s1.

Tries cropping to the training length, scalings of the scheme, log n, SSMax and temperature, each tuned on the
validation split and scored on the test split. Prints a table and writes it, with its rows.
"""

from alibi_lm.cli import command
from alibi_lm.evaluate.changes import ChangesConfig
from alibi_lm.experiment import change_and_draw


@command(ChangesConfig)
def main(config: ChangesConfig) -> None:
    change_and_draw(config)


if __name__ == "__main__":
    main()
