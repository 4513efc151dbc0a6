"""Evaluate runs at a list of inference lengths and draw the curve: python scripts/evaluate.py experiment=quick."""

from alibi_lm.cli import hydra_command
from alibi_lm.evaluate.config import EvaluateConfig
from alibi_lm.experiment import evaluate_and_draw


@hydra_command(EvaluateConfig, "evaluation/evaluate")
def main(config: EvaluateConfig) -> None:
    evaluate_and_draw(config)


if __name__ == "__main__":
    main()
