"""The paper's claims against an experiment's results: python scripts/claims.py experiment=quick."""

from alibi_lm.cli import command
from alibi_lm.study.commands import StudyConfig, claims


@command(StudyConfig)
def main(config: StudyConfig) -> None:
    claims(config)


if __name__ == "__main__":
    main()
