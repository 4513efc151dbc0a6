"""Prepare an experiment's corpus and print what was found and verified: python scripts/prepare_data.py."""

from alibi_lm.cli import hydra_command
from alibi_lm.config import TrainConfig
from alibi_lm.experiment import prepare_corpus


@hydra_command(TrainConfig, "train")
def main(config: TrainConfig) -> None:
    prepare_corpus(config)


if __name__ == "__main__":
    main()
