"""Check a position scheme: python scripts/check_scheme.py position=alibi, or scheme_file=mine.py for your own.

Prints a page of checks, each with a number: causality, shift, cache, backends, gradients, precision, longer
inputs, the tail of the bias, and what the scheme costs. Exit status 1 if one fails.
"""

from alibi_lm.cli import command
from alibi_lm.evaluate.conformance import CheckSchemeConfig, check_scheme


@command(CheckSchemeConfig)
def main(config: CheckSchemeConfig) -> int:
    return check_scheme(config)


if __name__ == "__main__":
    main()
