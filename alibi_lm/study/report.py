"""A study as one HTML file: figures, tables, claims, fairness, configs and environments.

The file needs nothing else: no scripts, no fonts, no network. It opens from disk and prints.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from alibi_lm.files import write_text
from alibi_lm.results.curves import View, views
from alibi_lm.results.rows import read_rows
from alibi_lm.study.claim_files import ClaimFile
from alibi_lm.study.claims import Evidence, Judged, judge_all, read_bench, read_summaries_if_any
from alibi_lm.study.fairness import Difference, differences
from alibi_lm.study.figures import draw
from alibi_lm.study.inline_svg import inline_svg
from alibi_lm.study.paper import caveats, compare, comparison_table
from alibi_lm.study.records import RunRecord, find_records
from alibi_lm.study.tables import Table, provenance, view_table

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; color: #1b1b1b; background: #fff;
       max-width: 72rem; margin: 2rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.7rem; margin: 0 0 .2rem; } h2 { font-size: 1.25rem; margin: 2.4rem 0 .6rem;
       border-bottom: 1px solid #ccc; } h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
.soft { color: #555; } .small { font-size: .85rem; }
.mark { border-left: 4px solid #b00020; background: #fdf1f2; padding: .5rem .9rem; }
figure { margin: 1rem 0; } figure svg { display: block; max-width: 100%; height: auto; }
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


def write_report(folder: Path, claim_files: Sequence[ClaimFile], bench: Path) -> Path:
    """Draw the figures of a study afresh and write `report.html` beside them.

    Args:
        folder: holds `results.jsonl`.
        claim_files: what to judge.
        bench: benchmark rows; may be missing.

    Returns:
        The report's path.

    Raises:
        ValueError: no or damaged results, or a damaged file of a run.
    """
    drawn = draw(folder)
    rows = read_rows(folder / "results.jsonl")
    records = find_records(rows, folder)
    unfair = differences(rows, folder)
    evidence = Evidence(rows, records, read_summaries_if_any(folder), read_bench(bench))
    judged = judge_all(claim_files, evidence)
    main = [path for path in drawn if path.suffix == ".svg"]
    own = folder.name == "extrapolation"  # of an experiment; a published study has all in one folder
    name = folder.parent.name if own else folder.name
    # Figures of the analyses, and whatever else was drawn here; not what an earlier set of results left behind.
    others = sorted(path for path in folder.glob("*.svg") if not path.name.startswith("extrapolation"))
    others += sorted(((folder.parent if own else folder) / "analysis").glob("*.svg"))
    found = views(rows)
    body = [
        f"<h1>{_text(name)}</h1>",
        f'<p class="soft">{_text(provenance(rows, found[0]))}</p>',
        _fairness_mark(unfair),
        _figures(found, main, others),
        _tables(found, [view_table(rows, view) for view in found]),
        _claims(claim_files, judged),
        _paper(rows, records),
        _fairness(unfair),
        _runs(records),
    ]
    page = _page(f"{name}: perplexity by inference length", "\n".join(body))
    path = folder / "report.html"
    write_text(path, page)
    return path


def _page(title: str, body: str) -> str:
    # The policy makes browsers refuse whatever a mistake here would let in.
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _figures(found: Sequence[View], main: Sequence[Path], others: Sequence[Path]) -> str:
    labels = [f"Perplexity by inference length, {view.title}" for view in found]
    labels += [path.stem.replace("_", " ") for path in others]
    parts = ["<h2>Figures</h2>"]
    for index, (path, label) in enumerate(zip([*main, *others], labels, strict=True), start=1):
        picture = inline_svg(path, f"f{index}-", label)
        parts.append(f'<figure id="figure-{index}">{picture}\n</figure>')
    return "\n".join(parts)


def _tables(found: Sequence[View], tables: Sequence[Table]) -> str:
    parts = ["<h2>Tables</h2>"]
    for view, table in zip(found, tables, strict=True):
        parts += [f"<h3>Perplexity by inference length: {_text(view.title)}</h3>", _table(table)]
    return "\n".join(parts)


def _table(table: Table) -> str:
    head = "".join(_cell("th", cell, i < table.words) for i, cell in enumerate(table.header))
    rows = [
        "<tr>" + "".join(_cell("td", cell, i < table.words) for i, cell in enumerate(row)) + "</tr>"
        for row in table.rows
    ]
    notes = "".join(f'<p class="soft small">{_text(note)}</p>' for note in table.notes)
    lines = "\n".join(rows)
    grid = f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{lines}\n</tbody></table>"
    return f'<div class="wide">{grid}</div>{notes}'


def _cell(tag: str, cell: str, words: bool) -> str:
    kind = ' class="word"' if words else ""
    if len(cell) > 4 and cell.startswith("**") and cell.endswith("**"):
        return f"<{tag}{kind}><strong>{_text(cell[2:-2])}</strong></{tag}>"
    return f"<{tag}{kind}>{_text(cell)}</{tag}>"


def _claims(files: Sequence[ClaimFile], judged: Sequence[Sequence[Judged]]) -> str:
    parts = ["<h2>The paper's claims</h2>"]
    for file, results in zip(files, judged, strict=True):
        lines = []
        for item in results:
            kind = item.verdict.lower().replace(" ", "-")
            numbers = [f"{i.what}: {i.numbers}, {i.verdict}" for i in item.instances]
            cell = "<br>".join(_text(text) for text in [*numbers, item.note] if text)
            lines.append(
                f'<tr><td class="word verdict {kind}">{item.verdict}</td><td class="word">'
                f'{_text(item.claim.statement)}</td><td class="word">{cell}</td>'
                f'<td class="word soft">{_text(item.claim.source)}</td></tr>'
            )
        head = "".join(f'<th class="word">{name}</th>' for name in ("verdict", "claim", "numbers", "source"))
        rows = "\n".join(lines)
        parts.append(
            f'<h3>{_text(file.title)}</h3>\n<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n'
            f"<tbody>\n{rows}\n</tbody></table></div>"
        )
    parts.append(
        '<p class="soft small">Numbers: perplexity of the first side over that of the second, with its 95% '
        "interval. One seed says nothing about another training run: a comparison of two schemes is then not "
        "settled, and a scheme compared with itself is judged for that seed alone.</p>"
    )
    return "\n".join(parts)


def _paper(rows: Sequence[Any], records: Mapping[str, RunRecord]) -> str:
    found = compare(rows)
    if not found:
        return ""
    parts = ["<h2>Beside the paper's numbers</h2>", _list(caveats(rows, records))]
    for view in dict.fromkeys(item.view for item in found):
        table = comparison_table([item for item in found if item.view == view])
        parts += [f"<h3>{_text(view.title)}</h3>", _table(table)]
    return "\n".join(parts)


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
    parts = ["<h2>Runs</h2>"]
    facts = {
        name: {f"config: {key}": value for key, value in record.config.items()}
        | {f"environment: {key}": value for key, value in record.environment.items()}
        | {f"corpus: {key}": value for key, value in record.corpus.items()}
        | {f"result: {key}": value for key, value in record.finished.items()}
        for name, record in records.items()
    }
    known = {name: values for name, values in facts.items() if values}
    missing = [name for name, values in facts.items() if not values]
    if missing:
        parts.append(f"<p>No run folder at hand for: {_text(', '.join(missing))}.</p>")
    keys = sorted({key for values in known.values() for key in values})
    shared = [
        key for key in keys if len(known) > 1 and len({_show(v.get(key, _ABSENT)) for v in known.values()}) == 1
    ]
    if shared:
        first = next(iter(known.values()))
        parts += ["<h3>The same in all runs</h3>", _settings(first, shared)]
    for name, values in known.items():
        parts += [f"<h3>{_text(name)}</h3>", _settings(values, [key for key in keys if key not in shared])]
    return "\n".join(parts)


_ABSENT = object()


def _settings(values: Mapping[str, Any], keys: Iterable[str]) -> str:
    rows = [[key, _show(values[key])] for key in keys if key in values]
    return _table(Table(["setting", "value"], rows, words=2))


def _list(sentences: Iterable[str]) -> str:
    items = "".join(f"<li>{_text(sentence)}</li>" for sentence in sentences)
    return f"<ul>{items}</ul>" if items else ""


def _show(value: Any) -> str:
    return "null" if value is None else str(value)


def _text(text: str) -> str:
    return html.escape(text, quote=True)
