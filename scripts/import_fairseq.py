"""Make a run folder from a fairseq checkpoint: import_fairseq.py checkpoint= dictionary= position= output_dir=."""

from alibi_lm.cli import command
from alibi_lm.interop.fairseq import ImportConfig, import_fairseq


@command(ImportConfig)
def main(config: ImportConfig) -> None:
    print(f"{import_fairseq(config)}: imported. Evaluate it on a text, a folder with wiki.valid.tokens:")
    print(f"  python scripts/evaluate.py runs={config.output_dir} 'lengths=[512,1024]' data.path=<folder>")


if __name__ == "__main__":
    main()
