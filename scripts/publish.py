"""Copy an experiment's results to a folder to commit, without weights: scripts/publish.py experiment=quick."""

from alibi_lm.cli import command
from alibi_lm.study.commands import PublishConfig, publish_results


@command(PublishConfig)
def main(config: PublishConfig) -> None:
    publish_results(config)


if __name__ == "__main__":
    main()
