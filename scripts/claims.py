"""The paper's claims against an experiment's results: python scripts/claims.py experiment=quick."""

from alibi_lm.cli import command
from alibi_lm.study.commands import ClaimsConfig, claims


@command(ClaimsConfig)
def main(config: ClaimsConfig) -> None:
    claims(config)


if __name__ == "__main__":
    main()
