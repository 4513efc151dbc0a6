"""The report is one whole file that needs nothing else, and text from result files stays text."""

import base64
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from study_rows import TOKENS, analysis, curve, run_script, study, unigram, write_run

from alibi_lm.files import write_json
from alibi_lm.results.rows import write_rows
from alibi_lm.study.analysis import Series
from alibi_lm.study.claims import judge_claims
from alibi_lm.study.evidence import read_evidence

VOID = {"meta", "br", "link", "img", "hr", "input"}
CONFIG = "position: {name: alibi}\noptimizer: {lr: 0.002}\nseed: SEED\nnote: '</td><script>alert(1)</script>'\n"


class Page(HTMLParser):
    """Collects elements and checks that they close in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.words = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A report of six runs with folders, in two modes, one run with another learning rate."""
    root = tmp_path_factory.mktemp("report")
    folder = root / "outputs" / "mine" / "extrapolation"
    rows = study(folder, seeds=(1, 2))
    rows += curve("alibi", {64: 18.0, 128: 17.9}, mode="sliding", stride=1)
    rows += curve("alibi", {9000: 17.5}, mode="stream")
    write_rows(folder / "results.jsonl", rows)
    for name in sorted({row.run for row in rows if row.run}):
        config = CONFIG.replace("SEED", name[-1])
        if name == "learned_L64_s2":
            config = config.replace("0.002", "0.005")
        environment = {"commit": "abc1234", "device": "a <b>processor</b>"}
        write_run(root / "outputs" / "mine" / "runs", name, config, {"tokens_seen": 1000}, environment)
    (root / "outputs" / "mine" / "analysis").mkdir()
    (root / "outputs" / "mine" / "analysis" / "per_position.png").write_bytes(b"picture")
    part = {"nats": 0.0, "low": -0.001, "high": 0.001}
    points = [{"length": 128} | dict.fromkeys(("early_tokens", "positions_beyond", "keys_beyond", "total"), part)]
    parts = vars(Series("alibi", 64, ["alibi_L64_s1"], points, "c0ffee", TOKENS, 2))
    content = vars(analysis("decomposition", parts))
    write_json(root / "outputs" / "mine" / "analysis" / "decomposition.json", content)
    (folder / "extrapolation_validation_sliding99.svg").write_text("<svg/>")  # left behind by earlier results
    done = run_script("report.py", "experiment=mine", cwd=root)
    assert done.returncode == 0, done.stderr
    path = root / done.stdout.strip()
    return path, Page(path.read_text())


def test_nothing_is_loaded_or_run(report):
    path, page = report
    assert not {tag for tag, _ in page.elements} & {"script", "link", "iframe", "object", "embed", "base", "svg"}
    for tag, attrs in page.elements:
        for name, value in attrs.items():
            assert not name.startswith("on") and name not in ("srcset", "action", "data"), (tag, name)
            assert name != "href" or value.startswith("#"), value
            assert name != "src" or re.match(r"data:image/(png|svg\+xml);base64,", value)
            assert "://" not in (value or ""), (tag, name, value)
    style = re.search(r"<style>(.*?)</style>", path.read_text(), re.S)[1]
    assert "url(" not in style and "@import" not in style and "@font-face" not in style
    assert path.read_text().count("<style") == 1
    (policy,) = [
        attrs["content"] for attrs in page.all("meta") if "content" in attrs and "src" in attrs["content"]
    ]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_each_view_has_its_figure_and_those_of_analyses_are_there(report):
    path, page = report
    pictures = {picture["alt"]: picture["src"] for picture in page.all("img")}
    assert list(pictures) == ["extrapolation", "extrapolation validation sliding1", "per position"]
    headings = {attrs["id"] for tag, attrs in page.elements if tag == "h3" and "id" in attrs}
    assert len(headings) == 3 and {f"#{name}" for name in headings} == {a["href"] for a in page.all("a")}
    drawn = base64.b64decode(pictures["extrapolation"].partition(",")[2])
    assert drawn == (path.parent / "extrapolation.svg").read_bytes()


def test_it_has_tables_claims_fairness_configs_and_environments(report):
    text = report[1].text
    for part in (
        "corpus (c0ffee); 10,000 tokens scored; 2 seeds",
        "The runs differ in more than the scheme. optimizer.lr: 0.002 in 7 runs; 0.005 in learned_L64_s2",
        "sinusoidal 64 seeds 1, 2 22.84 (1.10) 20.81 40.60 (1.95) 162.40 (7.80)",
        "[1] positions end at 64",
        "Validation, the whole split as one window",
        "HOLDS Sinusoidal positions are worse at 2L than at L.",
        "The same in all runs",
        "environment: commit abc1234",
        "result: tokens_seen 1000",
        "learned_L64_s2 setting value config: optimizer.lr 0.005 config: seed 2",
    ):
        assert part in text, part


def test_it_judges_claims_as_the_evidence_says(report):
    """It once left out the decomposition: what holds in claims.md was not run here."""
    path, page = report
    judged = [one for group in judge_claims(read_evidence(path.parent)).values() for one in group]
    assert {one.claim.id: one.verdict for one in judged}["alibi_uses_no_keys_beyond"] == "HOLDS"
    assert all(f"{one.verdict} {one.claim.statement}" in page.text for one in judged)


def test_text_from_files_stays_text(report):
    path, page = report
    assert "</td><script>alert(1)</script>" in page.text and "a <b>processor</b>" in page.text
    assert "<script" not in path.read_text() and "<b>" not in path.read_text()


def test_it_is_rewritten_and_the_same_for_the_same_results(report):
    path, _ = report
    before = path.read_bytes()
    path.write_text("old")
    done = run_script("report.py", f"folder={path.parent}", cwd=path.parents[3])
    assert done.returncode == 0 and path.read_bytes() == before


def test_hostile_names_of_runs_and_schemes_are_harmless(tmp_path):
    rows = curve('<img src="http://x" onerror="x">', {64: 20.0, 128: 21.0}, run='"><script>', corpus="<i>")
    write_rows(tmp_path / "results.jsonl", [*rows, unigram()])
    done = run_script("report.py", f"folder={tmp_path}")
    assert done.returncode == 0, done.stderr
    page = Page((tmp_path / "report.html").read_text())
    assert not page.all("script") and not page.all("i")
    assert all(attrs["src"].startswith("data:") for attrs in page.all("img"))
    assert '<img src="http://x" onerror="x">' in page.text


def chromium():
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    found = [os.environ.get("CHROMIUM", ""), *(shutil.which(name) or "" for name in names)]
    return next((path for path in found if path), None)


@pytest.mark.slow
def test_a_browser_shows_every_figure(report, tmp_path):
    """Headless Chromium opens the file from disk; each figure is found by the colour of its ALiBi lines."""
    program = chromium()
    if program is None:
        pytest.skip("NO BROWSER: install chromium, or set CHROMIUM=<path>, to have the report looked at")
    import numpy as np
    from matplotlib.image import imread

    picture = tmp_path / "report.png"
    command = [
        program, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1280,6000",
        f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={picture}", report[0].as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert picture.is_file(), done.stderr
    pixels = imread(picture)[:, :, :3]
    alibi = (np.abs(pixels - np.array([0xD5, 0x5E, 0x00]) / 255) < 0.02).all(2).sum(1) > 0
    rows = np.flatnonzero(alibi)
    bands = 1 + int((np.diff(rows) > 150).sum())
    assert bands == len(report[1].all("figure")) - 1  # the picture of the analysis is none
    assert (pixels < 0.5).all(2).sum() > 20_000  # text is there
