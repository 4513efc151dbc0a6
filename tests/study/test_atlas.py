"""The atlas: who extrapolates, who is better and what it costs, from rows, sums per document and cards."""

import html
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from study_rows import TOKENS, analysis, curve, run_script

from alibi_lm.files import write_json
from alibi_lm.results.documents import DocumentSums, upsert_documents
from alibi_lm.results.rows import write_rows
from alibi_lm.study.analysis import Series
from alibi_lm.study.atlas import entries_of, read_cards, write_atlas
from alibi_lm.study.evidence import read_evidence

SHAPES = {
    "alibi": {32: 22.0, 64: 20.0, 128: 19.5, 512: 19.0},
    "rotary": {32: 21.0, 64: 19.0, 128: 19.6, 512: 30.0},
    "t5": {32: 22.0, 64: 20.0, 128: 19.9, 512: 20.2},
    "learned": {32: 23.0, 64: 21.0, 128: None, 512: None},
    "none": {32: 23.0, 64: 22.0, 128: 22.5, 512: 25.0},
    "<b>mine": {32: 23.0, 64: 24.0, 128: 24.0, 512: 24.0},
}


@pytest.fixture
def folder(tmp_path):
    """Three seeds of six schemes; each seed differs by as much for all, the T5 bias by more at 512."""
    rng, rows, sums = np.random.default_rng(0), [], []
    tokens = np.full(10, TOKENS // 10)
    for position, values in SHAPES.items():
        for seed in (1, 2, 3):
            own = {n: v and v * (1 + seed / 500) for n, v in values.items()}
            if position == "t5":
                own[512] *= 1 + (seed - 2) / 20
            rows += curve(position, own, seed=seed)
    for row in rows:
        if row.nats is not None:
            noise = rng.normal(0, 0.2, 10)
            nats = row.nats / 10 + noise - noise.mean()
            sums.append(DocumentSums(row.key, nats, tokens))
    write_rows(tmp_path / "results.jsonl", rows)
    upsert_documents(tmp_path / "documents.jsonl", sums)
    card = {"title": "A title.", "formula": "a < b & c", "source": "S 2024", "beyond": "", "acts_on": ["scores"]}
    cards = [
        card
        | {"run": f"{position}_L64_s1", "position": position, "parameters": 7, "receptive_field": [3, 5000]}
        | {"seconds_per_token": {"train": 2e-6 if position == "t5" else 1e-6, "evaluate": 1e-6}}
        for position in SHAPES
    ]
    write_json(tmp_path / "cards.json", {"cards": cards})
    return tmp_path


def test_standings_rivals_and_costs(folder):
    change = {"from": 64, "nats": math.log(1.25), "low": math.log(1.125), "high": math.log(1.5)}
    points = [{"context": 64, "nats": 3.0}, {"context": 128, "nats": 3.0, "difference": change | {"nats": 9.0}}]
    points += [{"context": 512, "nats": 3.2, "difference": change}]
    fixed = Series("rotary", 64, [f"rotary_L64_s{seed}" for seed in (1, 2, 3)], points, "c0ffee", TOKENS, 10)
    evidence = replace(read_evidence(folder), analyses={"fixed": analysis("fixed", fixed)})
    entries = {e.curve.position: e for e in entries_of(evidence, read_cards(folder / "cards.json"))}
    standings = {name: entry.standing for name, entry in entries.items()}
    assert standings == {
        "alibi": "extrapolates", "<b>mine": "extrapolates", "t5": "not settled", "none": "does not",
        "rotary": "does not", "learned": "ends at L",
    }  # fmt: skip
    assert list(entries) == list(standings), "who extrapolates stands first, the best of them before the others"
    rotary = {key: answer for key, (answer, _) in entries["rotary"].answers.items()}
    assert rotary == {("alibi", 1): "YES", ("alibi", 2): "NO", ("alibi", 8): "NO"}
    assert entries["learned"].answers["alibi", 8][0] == "NOT RUN"
    measured = entries["rotary"].answers["alibi", 8][1]
    assert measured.estimate == pytest.approx(math.log(30 / 19), abs=1e-3) and measured.seeds == 3
    assert entries["rotary"].exact == "1.250 [1.12, 1.50]" and entries["alibi"].exact == "-"
    assert measured.comparisons == 3, "corrected for the three lengths"
    assert entries["t5"].times["train"] == 2 and entries["alibi"].times["train"] == 1


def test_the_page_needs_nothing_else_and_says_all_in_both_forms(folder):
    write_atlas(folder, folder / "atlas")
    page, text = ((folder / "atlas" / name).read_text() for name in ("index.html", "README.md"))
    assert "<script" not in page and not re.search(r'(src|href)="(?!data:|#)', page)
    links = dict(re.findall(r'href="#([\w-]+)">(.*?)</a>', page))
    assert links and all(f'<h2 id="{anchor}">{name}</h2>' in page for anchor, name in links.items())
    assert len(links) == len(SHAPES)
    assert "<b>" not in page and html.escape("<b>mine") in page and "a &lt; b &amp; c" in page
    assert len(re.findall(r"!\[\w+\]\((\w+\.png)\)", text)) == 1 + len(SHAPES)
    assert all((folder / "atlas" / name).is_file() for name in re.findall(r"\((\w+\.png)\)", text))
    orders = re.split("^## .* first$", text, flags=re.MULTILINE)[1:]
    firsts = [
        [line.split("|")[1].strip() for line in part.split("\n") if line.startswith("| ")][2] for part in orders
    ]
    assert firsts[:2] == ["ALiBi", "rotary"] and len(orders) == 3
    assert "; extrapolates: 2; not settled: 1; does not: 2; ends at L: 1" in text
    assert '<td class="word verdict holds">extrapolates</td>' in page
    assert "3 to no limit by head" in page
    assert "training on an unknown number of tokens" in text and "exact context" in text


def test_what_it_cannot_be_made_of_is_told(folder):
    write_rows(folder / "results.jsonl", curve("alibi", {64: 20.0}, split="test"))
    arguments = (f"folder={folder}", f"target={folder / 'atlas'}")
    done = run_script("atlas.py", *arguments)
    assert done.returncode == 1 and "no value for validation, nonoverlapping windows" in done.stderr
    (folder / "cards.json").unlink()
    done = run_script("atlas.py", *arguments)
    assert done.returncode == 1 and "cards.json does not exist. `make atlas` writes it" in done.stderr
