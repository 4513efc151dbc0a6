"""Make a run folder from a fairseq checkpoint of the ALiBi authors."""

from alibi_lm.cli import command
from alibi_lm.interop.fairseq import ImportConfig, import_fairseq


@command(ImportConfig)
def main(config: ImportConfig) -> None:
    """Import, and say how to go on."""
    evaluate = f"python scripts/evaluate.py runs={import_fairseq(config)} 'lengths=[512,1024]'"
    print(f"Imported. Evaluate it on a text of your own:\n  {evaluate} data.path=<folder of wiki.valid.tokens>")


if __name__ == "__main__":
    main()
