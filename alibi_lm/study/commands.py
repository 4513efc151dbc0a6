"""The study's commands and their settings. All of them only read result files."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

from alibi_lm.files import write_text
from alibi_lm.results.curves import View
from alibi_lm.settings import require
from alibi_lm.study.analysis import analysis_files
from alibi_lm.study.atlas import write_atlas
from alibi_lm.study.claims import claims_page, judge_claims
from alibi_lm.study.compare import common_lengths, is_better, select, title
from alibi_lm.study.evidence import read_evidence
from alibi_lm.study.fairness import differences, refuse
from alibi_lm.study.figures import draw
from alibi_lm.study.pages import markdown
from alibi_lm.study.paper import comparison_page
from alibi_lm.study.publish import publish
from alibi_lm.study.report import write_report
from alibi_lm.study.view_figures import draw_analysis


@dataclass
class StudyConfig:
    """Which results to use; shared by all study commands."""

    experiment: str = "quick"
    """The experiment; its results are in outputs/<experiment>/extrapolation."""
    folder: str | None = None
    """The folder that holds results.jsonl, instead of an experiment's."""

    @property
    def results(self) -> Path:
        """The folder that holds `results.jsonl`; ValueError if there is none."""
        folder = Path(self.folder or Path("outputs") / self.experiment / "extrapolation")
        how = "" if self.folder else f"; make eval-extrapolation EXPERIMENT={self.experiment} writes it"
        file = folder / "results.jsonl"
        require(file.is_file(), f"{file} does not exist{how}. Or give folder=<folder of results>.")
        return folder


@dataclass
class FiguresConfig(StudyConfig):
    """Settings of `scripts/figures.py`."""

    paper: bool = False
    """Draw the paper's curves as dotted lines, where it has the same scheme and training length."""
    strict: bool = False
    """Refuse to draw runs that differ in more than the scheme."""


def figures(config: FiguresConfig) -> None:
    """Redraw figures and tables of results and of their analyses, and print their paths."""
    for path in draw(config.results, config.paper, config.strict):
        print(path)
    for analysis in analysis_files(config.results):
        for path in draw_analysis(analysis):
            print(path)


def claims(config: StudyConfig) -> None:
    """Print a line per claim and write claims.md; the exit status does not depend on the verdicts."""
    folder = config.results
    evidence = read_evidence(folder)
    judged = judge_claims(evidence)
    for results in judged.values():
        for item in results:
            print(item.line)
    for difference in evidence.unfair:
        if difference.matters:
            print(f"NOT A FAIR COMPARISON: {difference.sentence}")
    write_text(folder / "claims.md", markdown(claims_page(judged, evidence)))
    print(folder / "claims.md")


@dataclass
class ComparePaperConfig(StudyConfig):
    """Settings of `scripts/compare_paper.py`."""

    near: float = 0.0
    """Relative difference allowed between an inference length of the paper and ours, 0 to 0.1."""


def compare_paper(config: ComparePaperConfig) -> None:
    """Print our results beside the paper's and write them as paper.md."""
    require(0 <= config.near <= 0.1, f"near = {config.near}. Use a share from 0 to 0.1, such as 0.02.")
    folder = config.results
    text = markdown(comparison_page(read_evidence(folder), config.near))
    write_text(folder / "paper.md", text)
    print(text)


@dataclass
class CompareRunsConfig(StudyConfig):
    """Settings of `scripts/compare_runs.py`."""

    a: str = MISSING
    """Side A: a run's name, or a glob of its seeds, such as 'alibi_L64_s*'."""
    b: str = MISSING
    """Side B, likewise."""
    lengths: list[int] = field(default_factory=list)
    """Inference lengths; empty: all that both sides have."""
    split: str = "validation"
    mode: str | None = None
    """nonoverlapping, sliding or items; null: sliding if a stride is given."""
    stride: int | None = None
    task: str = "text"
    metric: str = "perplexity"
    strict: bool = False
    """Refuse runs that differ in more than the scheme."""


def compare_runs(config: CompareRunsConfig) -> None:
    """Print whether A is better than B, one line per inference length."""
    require(
        all(n > 0 for n in config.lengths), f"lengths = {config.lengths}. Use whole numbers such as '[64,128]'."
    )
    folder = config.results
    evidence = read_evidence(folder)
    mode = config.mode or ("nonoverlapping" if config.stride is None else "sliding")
    view = View(config.split, mode, config.stride, config.task, config.metric)
    a, b = (select(evidence.rows, getattr(config, name), view, name, evidence.words) for name in ("a", "b"))
    unfair = [item for item in differences([*a, *b], evidence.records) if item.matters]
    if config.strict:
        refuse(unfair)
    print(
        f"A: {title(a)}\nB: {title(b)}\nIs A better than B? {view.title}; A minus B, all lengths at 95% together"
    )
    for line in is_better(a, b, evidence.documents, config.lengths or common_lengths(a, b)):
        print(line)
    for item in unfair:
        print(f"NOT A FAIR COMPARISON: {item.sentence}")


def report(config: StudyConfig) -> None:
    """Write report.html in the folder of the results and print its path."""
    print(write_report(config.results))


@dataclass
class AtlasConfig(StudyConfig):
    """Settings of `scripts/atlas.py`."""

    experiment: str = "atlas"
    target: str = "docs/atlas"
    """The folder to write into."""


def atlas(config: AtlasConfig) -> None:
    """Write the atlas as HTML and Markdown, and print both paths."""
    for path in write_atlas(config.results, Path(config.target))[:2]:
        print(path)


@dataclass
class PublishConfig(StudyConfig):
    """Settings of `scripts/publish.py`."""

    target: str | None = None
    """The folder to write; null: docs/results/<experiment>."""
    bench: str | None = None
    """Rows of a benchmark to publish with the results."""


def publish_results(config: PublishConfig) -> None:
    """Copy results without weights to a folder that can be committed, and print its size."""
    target = Path(config.target or Path("docs") / "results" / config.experiment)
    written = publish(config.results, target, Path(config.bench) if config.bench else None)
    size = sum(path.stat().st_size for path in written)
    print(f"{target}: {len(written)} files, {size / 2**20:.1f} MiB")
