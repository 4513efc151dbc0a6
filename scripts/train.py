"""Train one run, or several with -m: python scripts/train.py experiment=quick position=alibi train_length=64."""

import sys

import hydra
from omegaconf import DictConfig

from alibi_lm.cli import exit_status, report_errors
from alibi_lm.config import register, to_config

register()


@hydra.main(version_base="1.3", config_path="../configs", config_name="train")
@report_errors
def main(cfg: DictConfig) -> None:
    """Train the run that the config describes."""
    from alibi_lm.experiment import run_folder
    from alibi_lm.train import train

    config = to_config(cfg)
    train(config, run_folder(config))


if __name__ == "__main__":
    main()
    sys.exit(exit_status())
