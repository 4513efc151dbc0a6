"""The paper's claims against an experiment's results: python scripts/claims.py experiment=quick."""

import sys
from pathlib import Path

from alibi_lm.files import write_text
from alibi_lm.results.rows import read_rows
from alibi_lm.study.analysis_data import read_analysis
from alibi_lm.study.claim_files import read_claims
from alibi_lm.study.claims import Evidence, claims_markdown, judge_all, read_bench, read_summaries_if_any
from alibi_lm.study.command import FOLDER, bench_file, main, parse, study_folder
from alibi_lm.study.fairness import differences
from alibi_lm.study.records import find_records

CLAIMS = Path(__file__).resolve().parents[1] / "configs" / "claims"


def task(arguments: list[str]) -> None:
    """Print a line a claim and write claims.md; the exit status does not depend on the verdicts."""
    own = {"claims": str(CLAIMS), "bench": None, "min_seeds": 0}
    settings = parse(arguments, FOLDER | own, {"min_seeds": "a whole number, 0 for what each claim asks"})
    folder = study_folder(settings)
    rows = read_rows(folder / "results.jsonl")
    # Published results hold their analyses; those of an experiment lie beside its results.
    analyses = [parent / "analysis" / "decomposition.json" for parent in (folder, folder.parent)]
    decomposition = next((read_analysis(path) for path in analyses if path.is_file()), None)
    evidence = Evidence(
        rows,
        find_records(rows, folder),
        read_summaries_if_any(folder),
        read_bench(bench_file(settings, folder)),
        decomposition,
    )
    unfair = differences(rows, folder)
    files = read_claims(Path(settings["claims"]))
    judged = judge_all(files, evidence, settings["min_seeds"] or None)
    for results in judged:
        for item in results:
            print(item.line)
    for difference in unfair:
        if difference.matters:
            print(f"NOT A FAIR COMPARISON: {difference.sentence}")
    write_text(folder / "claims.md", claims_markdown(files, judged, unfair))
    print(folder / "claims.md")


if __name__ == "__main__":
    sys.exit(main(task))
