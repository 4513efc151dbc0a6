"""Evaluate runs at a list of inference lengths and draw the curve: python scripts/evaluate.py experiment=quick."""

import sys

import hydra
from omegaconf import DictConfig

from alibi_lm.cli import exit_status, report_errors
from alibi_lm.config import register, to_config

register()


@hydra.main(version_base="1.3", config_path="../configs", config_name="evaluate")
@report_errors
def main(cfg: DictConfig) -> None:
    """Evaluate, write results.jsonl, and draw figure and table."""
    from alibi_lm.extrapolation import measure_and_draw

    measure_and_draw(to_config(cfg))


if __name__ == "__main__":
    main()
    sys.exit(exit_status())
