"""The main job: train and evaluate every run of an experiment, then draw (make reproduce)."""

import sys

from alibi_lm.experiment import reproduce


def main(arguments: list[str]) -> int:
    """Run `experiment=NAME` and further overrides of training; returns the exit status."""
    names = [a.split("=", 1)[1] for a in arguments if a.startswith("experiment=")]
    try:
        return reproduce(
            names[-1] if names else "quick", [a for a in arguments if not a.startswith("experiment=")]
        )
    except KeyboardInterrupt:
        print("interrupted; give the command again to go on", file=sys.stderr)
        return 130
    except Exception as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
