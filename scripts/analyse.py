"""Look inside an extrapolation curve: python scripts/analyse.py experiment=quick view=position."""

from alibi_lm.cli import hydra_command
from alibi_lm.evaluate.config import EvaluateConfig
from alibi_lm.experiment import analyse_and_draw


@hydra_command(EvaluateConfig, "evaluation/analyse")
def main(config: EvaluateConfig) -> None:
    analyse_and_draw(config)


if __name__ == "__main__":
    main()
