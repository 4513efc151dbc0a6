"""An experiment's results as one HTML file: figures, tables, claims, the paper's numbers, configs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from alibi_lm.files import write_text
from alibi_lm.results.curves import views
from alibi_lm.study.claims import claims_page, judge_claims
from alibi_lm.study.evidence import read_evidence
from alibi_lm.study.figures import draw
from alibi_lm.study.pages import Block, Links, Table, html_page
from alibi_lm.study.paper import comparison_page
from alibi_lm.study.records import RunRecord, show
from alibi_lm.study.tables import provenance, results_page


def write_report(folder: Path) -> Path:
    """Redraw the figures of a folder that holds `results.jsonl`, and write `report.html` beside them.

    Returns:
        The report's path.

    Raises:
        ValueError: no or damaged results, or a damaged file of a run.
    """
    drawn = draw(folder)
    evidence = read_evidence(folder)
    own = folder.name == "extrapolation"  # an experiment's folder; published results are all in one folder
    name = folder.parent.name if own else folder.name
    analyses = ((folder.parent if own else folder) / "analysis").glob("*.png")
    page: list[Block] = [f"# {name}", provenance(evidence.rows, views(evidence.rows)[0])]
    if serious := [item.sentence for item in evidence.unfair if item.matters]:
        page += ["**The runs differ in more than the scheme.**", serious]
    pictures = [*(path for path in drawn if path.suffix == ".svg"), *sorted(analyses)]
    named = {path.stem.replace("_", " "): path for path in pictures}
    page.append(Links([*named]))
    for title, path in named.items():
        page += [f"### {title}", path]
    page += [*results_page(evidence), *claims_page(judge_claims(evidence), evidence)]
    page += [*comparison_page(evidence), *_runs(evidence.records)]
    path = folder / "report.html"
    write_text(path, html_page(f"{name}: results by inference length", page))
    return path


def _runs(records: Mapping[str, RunRecord]) -> list[Block]:
    """Config and environment of all runs: first what they share, then what differs."""
    facts: dict[str, dict[str, str]] = {}
    for name, record in records.items():
        account = {"config": record.config, "environment": record.environment}
        account |= {"corpus": record.corpus, "result": record.finished}
        facts[name] = {f"{kind}: {k}": show(v) for kind, values in account.items() for k, v in values.items()}
    known = {name: values for name, values in facts.items() if values}
    page: list[Block] = ["# Runs"]
    if missing := [name for name, values in facts.items() if not values]:
        page.append(f"No run folder at hand for: {', '.join(missing)}.")
    keys = sorted({key for values in known.values() for key in values})
    shared = [key for key in keys if len(known) > 1 and len({v.get(key) for v in known.values()}) == 1]
    if shared:
        page += ["### The same in all runs", _settings(next(iter(known.values())), shared)]
    for name, values in known.items():
        page += [f"### {name}", _settings(values, [key for key in keys if key in values and key not in shared])]
    return page


def _settings(values: Mapping[str, str], keys: list[str]) -> Table:
    return Table(["setting", "value"], [[key, values[key]] for key in keys], words=2)
