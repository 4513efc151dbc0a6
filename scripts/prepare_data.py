"""Prepare an experiment's corpus and print what was found and verified: python scripts/prepare_data.py."""

import sys

import hydra
from omegaconf import DictConfig

from alibi_lm.cli import exit_status, report_errors
from alibi_lm.config import register, to_config

register()


@hydra.main(version_base="1.3", config_path="../configs", config_name="train")
@report_errors
def main(cfg: DictConfig) -> None:
    """Prepare, verify every hash, report."""
    from alibi_lm.data.corpus import prepare, report, verify

    config = to_config(cfg)
    corpus = prepare(config.data, config.tokenizer)
    verify(corpus)
    print(report(corpus))


if __name__ == "__main__":
    main()
    sys.exit(exit_status())
