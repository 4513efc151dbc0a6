"""One self-contained HTML file of an experiment's results: python scripts/report.py experiment=quick."""

import sys
from pathlib import Path

from alibi_lm.study.claim_files import read_claims
from alibi_lm.study.command import FOLDER, bench_file, main, parse, study_folder
from alibi_lm.study.report import write_report

CLAIMS = Path(__file__).resolve().parents[1] / "configs" / "claims"


def task(arguments: list[str]) -> None:
    """Write report.html in the folder of the results and print its path."""
    own = {"claims": str(CLAIMS), "bench": None}
    settings = parse(arguments, FOLDER | own, {})
    folder = study_folder(settings)
    print(write_report(folder, read_claims(Path(settings["claims"])), bench_file(settings, folder)))


if __name__ == "__main__":
    sys.exit(main(task))
