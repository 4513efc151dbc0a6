"""Look inside an extrapolation curve (see docs/evaluation.md): python scripts/analyse.py view=position."""

from alibi_lm.cli import hydra_command
from alibi_lm.evaluate.config import EvaluateConfig
from alibi_lm.experiment import analyse_and_draw


@hydra_command(EvaluateConfig, "evaluation/analyse")
def main(config: EvaluateConfig) -> None:
    analyse_and_draw(config)


if __name__ == "__main__":
    main()
