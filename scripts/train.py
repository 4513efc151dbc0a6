"""Train one run, or several with -m: python scripts/train.py experiment=quick position=alibi train_length=64."""

from alibi_lm.cli import hydra_command
from alibi_lm.config import TrainConfig
from alibi_lm.experiment import run_folder
from alibi_lm.train import train


@hydra_command(TrainConfig, "train")
def main(config: TrainConfig) -> None:
    train(config, run_folder(config))


if __name__ == "__main__":
    main()
