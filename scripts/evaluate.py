"""Evaluate runs at a list of inference lengths and draw the curve: python scripts/evaluate.py experiment=quick."""

import sys

import hydra
from omegaconf import DictConfig

from alibi_lm.cli import exit_status, report_errors
from alibi_lm.config import register, to_config

register(plain="tracking")


@hydra.main(version_base="1.3", config_path="../configs/evaluation", config_name="evaluate")
@report_errors
def main(cfg: DictConfig) -> None:
    """Evaluate, write results.jsonl row by row, then draw figure and table."""
    from alibi_lm import distributed
    from alibi_lm.evaluate.sweep import describe, evaluate, log_curve, output_folder
    from alibi_lm.study.figures import draw

    config = to_config(cfg)
    world = distributed.start(config.device)
    try:
        for row in evaluate(config, world):
            if world.is_main:
                print(describe(row), flush=True)
        if world.is_main and config.draw:
            log_curve(config)
            paths = draw(output_folder(config))
            print(next(p for p in paths if p.suffix == ".md").read_text(), *paths, sep="\n")
    finally:
        distributed.stop()


if __name__ == "__main__":
    main()
    sys.exit(exit_status())
