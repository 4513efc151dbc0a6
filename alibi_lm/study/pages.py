"""Pages of text, tables and pictures, as Markdown or as one HTML file that needs nothing else.

A page is a list of blocks: a table, a picture (its path), a list of sentences (a tuple if they name settings
and no runs), or text. Text may begin as in Markdown: `# ` to `### ` for a heading, `**words**` in bold; text that
begins with ``` is kept unchanged. All other markup, from files or users, is escaped in both forms.
"""

from __future__ import annotations

import base64
import html
import importlib.resources
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from alibi_lm.study.plots import DOTS

_BOLD = re.compile(r"\*\*(.+)\*\*")
_TEXT = re.compile(r"(#{1,3} )?(?:\*\*(.+?)\*\*)?(.*)", re.DOTALL)
_VERDICTS = {"HOLDS": "holds", "FAILS": "fails", "NOT SETTLED": "open", "NOT RUN": "none"}
_VERDICTS |= {"extrapolates": "holds", "does not": "fails", "not settled": "open", "ends at L": "none"}
"""Cells that are coloured in HTML, and the class of their colour in page.css."""


@dataclass(frozen=True)
class Table:
    """Plain text cells; `**1.0**` is bold, and a line break stays one."""

    header: list[str]
    rows: list[list[str]]
    words: int = 1
    """Columns from the left that hold words; the others hold numbers."""
    notes: list[str] = field(default_factory=list)
    """Notes below the table, first `[1] ...` to which cells refer."""


@dataclass(frozen=True)
class Links:
    """Links to parts of the page, by the words of their headings; in HTML only."""

    headings: list[str]


Block = str | list[str] | tuple[str, ...] | Table | Path | Links


def markdown(blocks: Iterable[Block]) -> str:
    """The page as Markdown."""
    return "\n".join(_markdown(block) for block in blocks if not isinstance(block, Links))


def _markdown(block: str | list[str] | tuple[str, ...] | Table | Path) -> str:
    if isinstance(block, Table):
        rule = ["---" if i < block.words else "--:" for i in range(len(block.header))]
        lines = ["| " + " | ".join(map(_markdown_cell, row)) + " |" for row in (block.header, rule, *block.rows)]
        return "\n".join([*lines, *(f"\n{escape(note, keep='[]')}" for note in block.notes)]) + "\n"
    if isinstance(block, Path):
        return f"![{block.stem}]({block.name})\n"
    if isinstance(block, list | tuple):
        keep = "[]_" if isinstance(block, tuple) else ""
        return "".join(f"- {escape(item, keep)}\n" for item in block)
    if block.startswith("```"):
        return f"{block}\n"
    heading, bold, rest = _parts(block)
    space = " " if bold and rest.startswith(" ") else ""
    return heading + (f"**{escape(bold)}**{space}" if bold else "") + escape(rest, keep="[]_") + "\n"


def html_page(title: str, blocks: Sequence[Block]) -> str:
    """The page as a whole HTML file: no scripts, no fonts, no network."""
    names = [name for block in blocks if isinstance(block, Links) for name in block.headings]
    anchors = {name: f"part-{index}" for index, name in enumerate(names, start=1)}
    # With this policy browsers refuse foreign content that a mistake here might let in.
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    style = (importlib.resources.files("alibi_lm.study") / "page.css").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        + "\n".join(_html(block, anchors) for block in blocks)
        + "\n</body>\n</html>\n"
    )


def _html(block: Block, anchors: Mapping[str, str]) -> str:
    if isinstance(block, Table):
        head, *rows = (
            f"<tr>{''.join(_html_cell(tag, cell, i < block.words) for i, cell in enumerate(row))}</tr>"
            for tag, row in [("th", block.header), *(("td", row) for row in block.rows)]
        )
        notes = "".join(f'<p class="small">{html.escape(note)}</p>' for note in block.notes)
        body = "\n".join(rows)
        return f'<div class="wide"><table>\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody></table></div>{notes}'
    if isinstance(block, Path):
        return _picture(block)
    if isinstance(block, Links):
        links = (f'<a href="#{anchors[name]}">{html.escape(name)}</a>' for name in block.headings)
        return f"<p>{' | '.join(links)}</p>"
    if isinstance(block, list | tuple):
        return "<ul>" + "".join(f"<li>{html.escape(item)}</li>" for item in block) + "</ul>"
    if block.startswith("```"):
        return f"<pre>{html.escape(block.strip('`').strip())}</pre>"
    heading, bold, rest = _parts(block)
    tag = f"h{len(heading) - 1}" if heading else "p"
    anchor = anchors.get(block[len(heading) :]) if heading else None
    named = f' id="{anchor}"' if anchor else ""
    return f"<{tag}{named}>{f'<strong>{html.escape(bold)}</strong>' if bold else ''}{html.escape(rest)}</{tag}>"


def _picture(path: Path) -> str:
    """A picture embedded in the page; as an image it can neither run nor load anything."""
    kind, content = {".svg": "svg+xml", ".png": "png"}[path.suffix], path.read_bytes()
    data = base64.b64encode(content).decode()
    # A PNG is shown as wide as on paper: its header has the width in dots.
    width = f' width="{int.from_bytes(content[16:20]) * 96 // DOTS}"' if kind == "png" else ""
    name = html.escape(path.stem.replace("_", " "))
    return f'<figure><img alt="{name}"{width} src="data:image/{kind};base64,{data}"></figure>'


def _parts(text: str) -> tuple[str, str, str]:
    """Sign of a heading, words in bold, and the rest."""
    found = _TEXT.fullmatch(text)
    assert found is not None
    return found[1] or "", found[2] or "", found[3]


def escape(text: str, keep: str = "") -> str:
    """Escape text for a Markdown table; characters in `keep` are not escaped."""
    for sign in "\\`*_|<>[]":
        if sign not in keep:
            text = text.replace(sign, "\\" + sign)
    return " ".join(text.split())


def _markdown_cell(cell: str) -> str:
    if bold := _BOLD.fullmatch(cell):
        return f"**{escape(bold[1])}**"
    return "<br>".join(escape(line, keep="[]") for line in cell.split("\n"))


def _html_cell(tag: str, cell: str, words: bool) -> str:
    bold = _BOLD.fullmatch(cell)
    text = "<br>".join(html.escape(line) for line in (bold[1] if bold else cell).split("\n"))
    kind = f"word verdict {_VERDICTS[cell]}" if cell in _VERDICTS else "word" if words else ""
    return f'<{tag} class="{kind}">{f"<strong>{text}</strong>" if bold else text}</{tag}>'


def refer(reason: str, reasons: list[str]) -> str:
    """The mark `[1]` of a note, which is added to `reasons` if it is new."""
    if reason not in reasons:
        reasons.append(reason)
    return f"[{reasons.index(reason) + 1}]"


def numbered(reasons: Sequence[str]) -> list[str]:
    """Notes below a table, with the marks that `refer` gave."""
    return [f"[{number}] {reason}" for number, reason in enumerate(reasons, start=1)]


def number(value: float | None, digits: int = 2) -> str:
    """The value with `digits` digits after the point; `-` if there is no value."""
    return "-" if value is None else f"{value:.{digits}f}"
