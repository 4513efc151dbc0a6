"""Look inside an extrapolation curve: python scripts/analyse.py experiment=quick view=position.

Views: perplexity, position, last, documents, fixed, decomposition, offset, or all (see docs/evaluation.md).
"""

import sys

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from alibi_lm.cli import exit_status, report_errors
from alibi_lm.config import to_config
from alibi_lm.evaluate.analysis import AnalyseConfig

ConfigStore.instance().store(name="base_analyse", node=AnalyseConfig)


@hydra.main(version_base="1.3", config_path="../configs/evaluation", config_name="analyse")
@report_errors
def main(cfg: DictConfig) -> None:
    """Compute each view, write its data, then its figure."""
    from alibi_lm.evaluate.analysis import analyse
    from alibi_lm.study.analysis_figures import draw_analysis

    for path in analyse(to_config(cfg)):
        drawn = draw_analysis(path)
        print(drawn[-1].read_text(encoding="utf-8"), path, *drawn, sep="\n", flush=True)


if __name__ == "__main__":
    main()
    sys.exit(exit_status())
