"""Copy an experiment's results, without weights, to a folder to commit: scripts/publish.py experiment=quick."""

from alibi_lm.cli import command
from alibi_lm.study.commands import PublishConfig, publish_results


@command(PublishConfig)
def main(config: PublishConfig) -> None:
    publish_results(config)


if __name__ == "__main__":
    main()
