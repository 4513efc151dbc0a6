"""Draw the atlas of position schemes from result files alone: python scripts/atlas.py experiment=atlas."""

from alibi_lm.cli import command
from alibi_lm.study.commands import AtlasConfig, atlas


@command(AtlasConfig)
def main(config: AtlasConfig) -> None:
    atlas(config)


if __name__ == "__main__":
    main()
