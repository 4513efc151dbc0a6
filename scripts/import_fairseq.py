"""Make a run folder from a fairseq checkpoint of the ALiBi authors.

python scripts/import_fairseq.py checkpoint=checkpoint_best.pt dictionary=dict.txt position=alibi output_dir=FOLDER

position is alibi or sinusoidal: what the model was trained with. overwrite=true replaces an imported run.
"""

import dataclasses
import sys

from alibi_lm.interop.fairseq import ImportConfig, import_fairseq


def parse(arguments: list[str]) -> ImportConfig:
    """Settings from `name=value` arguments, taken as they stand (paths may hold any character)."""
    names = [field.name for field in dataclasses.fields(ImportConfig)]
    values: dict[str, str] = {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals or name not in names:
            raise ValueError(f"{argument!r} is not understood. Give name=value with a name of {', '.join(names)}.")
        values[name] = value
    missing = [n for n in names if n != "overwrite" and not values.get(n)]
    if missing:
        raise ValueError(f"missing: {', '.join(f'{n}=...' for n in missing)}.\n\n{__doc__}")
    overwrite = values.pop("overwrite", "false").lower()
    if overwrite not in ("true", "false"):
        raise ValueError(f"overwrite = {overwrite!r}. Allowed: true, false.")
    return ImportConfig(**values, overwrite=overwrite == "true")


def main(arguments: list[str]) -> int:
    """Import, and say how to go on; returns the exit status."""
    if arguments in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    try:
        folder = import_fairseq(parse(arguments))
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(
        f"{folder}: imported. Evaluate it on a text of your own:\n"
        f"  python scripts/evaluate.py runs={folder} 'lengths=[512,1024]' data.path=<folder of wiki.valid.tokens>"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
