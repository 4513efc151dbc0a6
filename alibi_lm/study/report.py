"""An experiment's results as one HTML file: figures, tables, claims, fairness, configs and environments.

The file needs nothing else: no scripts, no fonts, no network. It opens from disk and prints.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from alibi_lm.files import write_text
from alibi_lm.results.curves import views
from alibi_lm.study.claims import NUMBERS_NOTE, claims_tables, judge_claims
from alibi_lm.study.compare import VERDICTS
from alibi_lm.study.evidence import Evidence, read_evidence
from alibi_lm.study.fairness import Difference
from alibi_lm.study.figures import draw, drawn_views
from alibi_lm.study.paper import caveats, compare, comparison_table
from alibi_lm.study.plots import DOTS
from alibi_lm.study.records import RunRecord, show
from alibi_lm.study.tables import Table, provenance, view_table
from alibi_lm.study.task_figures import summary_table

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; color: #1b1b1b; background: #fff;
       max-width: 72rem; margin: 2rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.7rem; margin: 0 0 .2rem; } h2 { font-size: 1.25rem; margin: 2.4rem 0 .6rem;
       border-bottom: 1px solid #ccc; } h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
.soft { color: #555; } .small { font-size: .85rem; }
.mark { border-left: 4px solid #b00020; background: #fdf1f2; padding: .5rem .9rem; }
figure { margin: 1rem 0; } figure img { display: block; max-width: 100%; height: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; margin: .4rem 0; }
th, td { padding: .22rem .6rem; text-align: right; border-bottom: 1px solid #e3e3e3; vertical-align: top; }
th { border-bottom: 1px solid #888; font-weight: 600; } .word { text-align: left; }
td.word { overflow-wrap: anywhere; }
.verdict { white-space: nowrap; font-weight: 700; } .holds { color: #00614c; } .fails { color: #b00020; }
.not-settled { color: #7a5200; } .not-run { color: #6a6a6a; font-weight: 400; }
@media print { body { margin: 0; max-width: none; font-size: 10pt; } figure, tr { break-inside: avoid; }
               h2, h3 { break-after: avoid; } .wide { overflow-x: visible; } }
"""


def write_report(folder: Path, bench: Path | None = None) -> Path:
    """Draw the figures of a folder of results afresh and write `report.html` beside them.

    Args:
        folder: holds `results.jsonl`.
        bench: benchmark rows; None: as in `alibi_lm.study.claims.read_evidence`.

    Returns:
        The report's path.

    Raises:
        ValueError: no or damaged results, or a damaged file of a run.
    """
    drawn = draw(folder)
    evidence = read_evidence(folder, bench)
    rows, words = evidence.rows, evidence.words
    own = folder.name == "extrapolation"  # of an experiment; a published one has all in one folder
    name = folder.parent.name if own else folder.name
    found = views(rows)
    pictures = [path for path in drawn if path.suffix == ".svg" and path.name.startswith("extrapolation")]
    titles = [f"Results by inference length, {view.title}" for view in drawn_views(found)]
    figures = dict(zip(titles, pictures, strict=True))
    # Figures of the analyses, and whatever else was drawn here; not what an earlier set of results left behind.
    others = [path for path in sorted(folder.glob("*.svg")) if not path.name.startswith("extrapolation")]
    others += sorted(((folder.parent if own else folder) / "analysis").glob("*.png"))
    figures |= {path.stem.replace("_", " "): path for path in others}
    claims = claims_tables(judge_claims(evidence))
    body = [
        f"<h1>{safe(name)}</h1>",
        f'<p class="soft">{safe(provenance(rows, found[0]))}</p>',
        _fairness_mark(evidence.unfair),
        "<h2>Figures</h2>",
        *(picture(label, path, f"figure-{index}") for index, (label, path) in enumerate(figures.items(), start=1)),
        "<h2>Tables</h2>",
        *(f"<h3>{safe(view.title)}</h3>{view_table(rows, view, words).html()}" for view in found),
        *(f"<h3>Accuracies</h3>{table.html()}" for table in summary_table(rows, words)),
        "<h2>The paper's claims</h2>",
        *(
            f"<h3>{safe(group)}</h3>{coloured(table.html(), {v: v for v in VERDICTS})}"
            for group, table in claims.items()
        ),
        f'<p class="soft small">{safe(NUMBERS_NOTE)}</p>',
        *_paper(evidence),
        _fairness(evidence.unfair),
        _runs(evidence.records),
    ]
    path = folder / "report.html"
    write_text(path, report_page(f"{name}: results by inference length", "\n".join(body)))
    return path


def report_page(title: str, body: str) -> str:
    """A whole HTML page, which loads nothing."""
    # The policy makes browsers refuse whatever a mistake here would let in.
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{safe(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def picture(label: str, path: Path, anchor: str = "") -> str:
    """A picture inside of the page; as an image it can neither run nor load anything."""
    kind, content = {".svg": "svg+xml", ".png": "png"}[path.suffix], path.read_bytes()
    data = base64.b64encode(content).decode()
    # A PNG is as wide as on paper: its header has the width in dots.
    width = f' width="{int.from_bytes(content[16:20]) * 96 // DOTS}"' if kind == "png" else ""
    named = f' id="{anchor}"' if anchor else ""
    return f'<figure{named}><img alt="{safe(label)}"{width} src="data:image/{kind};base64,{data}"></figure>'


def coloured(table: str, words: Mapping[str, str]) -> str:
    """An HTML table whose cells of these words have the colour of a verdict: verdict -> words of the cell."""
    for verdict, cell in words.items():
        kind = f"word verdict {verdict.lower().replace(' ', '-')}"
        table = table.replace(f'<td class="word">{cell}</td>', f'<td class="{kind}">{cell}</td>')
    return table


def _paper(evidence: Evidence) -> list[str]:
    found = compare(evidence.rows, words=evidence.words)
    if not found:
        return []
    parts = ["<h2>Beside the paper's numbers</h2>", _list(caveats(evidence.rows, evidence.records))]
    for view in dict.fromkeys(item.view for item in found):
        table = comparison_table([item for item in found if item.view == view])
        parts += [f"<h3>{safe(view.title)}</h3>", table.html()]
    return parts


def _fairness_mark(unfair: Sequence[Difference]) -> str:
    serious = [item.sentence for item in unfair if item.matters]
    if not serious:
        return ""
    return f'<div class="mark"><strong>The runs differ in more than the scheme.</strong>{_list(serious)}</div>'


def _fairness(unfair: Sequence[Difference]) -> str:
    if not unfair:
        return "<h2>Fairness</h2>\n<p>No difference between the runs was found, other than the scheme.</p>"
    sentences = [item.sentence + ("" if item.matters else " (of little or no effect)") for item in unfair]
    return f"<h2>Fairness</h2>\n<p>Differences between the runs other than the scheme:</p>\n{_list(sentences)}"


def _runs(records: Mapping[str, RunRecord]) -> str:
    """Config and environment of every run: what all share once, then what each has of its own."""
    facts: dict[str, dict[str, str]] = {}
    for name, record in records.items():
        account = {"config": record.config, "environment": record.environment}
        account |= {"corpus": record.corpus, "result": record.finished}
        facts[name] = {f"{kind}: {k}": show(v) for kind, values in account.items() for k, v in values.items()}
    known = {name: values for name, values in facts.items() if values}
    parts = ["<h2>Runs</h2>"]
    if missing := [name for name, values in facts.items() if not values]:
        parts.append(f"<p>No run folder at hand for: {safe(', '.join(missing))}.</p>")
    keys = sorted({key for values in known.values() for key in values})
    shared = [key for key in keys if len(known) > 1 and len({v.get(key) for v in known.values()}) == 1]
    if shared:
        parts += ["<h3>The same in all runs</h3>", _settings(next(iter(known.values())), shared)]
    for name, values in known.items():
        parts += [f"<h3>{safe(name)}</h3>", _settings(values, [key for key in keys if key not in shared])]
    return "\n".join(parts)


def _settings(values: Mapping[str, str], keys: Iterable[str]) -> str:
    return Table(["setting", "value"], [[key, values[key]] for key in keys if key in values], words=2).html()


def _list(sentences: Iterable[str]) -> str:
    items = "".join(f"<li>{safe(sentence)}</li>" for sentence in sentences)
    return f"<ul>{items}</ul>" if items else ""


def safe(text: str) -> str:
    """Text as it may stand in HTML."""
    return html.escape(text, quote=True)
