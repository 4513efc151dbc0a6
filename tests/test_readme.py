"""What the README shows works as it stands there."""

import re
import textwrap
from pathlib import Path

import pytest
import torch

from alibi_lm.experiment import compose
from alibi_lm.model.transformer import KeyValueCache, TransformerLM
from benchmarks.report import ratios_markdown, speedups_markdown
from benchmarks.report import read as report_rows

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def code_blocks(language: str) -> list[str]:
    return [textwrap.dedent(b) for b in re.findall(rf"```{language}\n(.*?)\n *```", README, flags=re.DOTALL)]


@pytest.mark.parametrize("attention", ["sdpa", "auto"])
def test_the_scheme_of_the_steps_works(tiny_config, tmp_path, monkeypatch, attention):
    source = next(b for b in code_blocks("python") if "class LogDecay" in b)
    (tmp_path / "log_decay.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    import log_decay

    torch.manual_seed(1)
    model = TransformerLM(tiny_config, log_decay.LogDecayConfig(), attention, 50, 64).eval()
    tokens = torch.randint(0, 50, (2, 200))
    whole = model(tokens)
    cache = KeyValueCache()
    pieces = torch.cat([model(piece, cache=cache) for piece in tokens.split([120, 1, 79], dim=1)], dim=1)
    torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=2e-6)
    whole.sum().backward()
    assert (model.schemes[0].rate.grad != 0).all()
    bias = model.schemes[0].bias(torch.tensor([5]), torch.tensor([0, 5]))
    torch.testing.assert_close(bias[:, 0], torch.tensor([-6.0, -1.0]).abs().log().mul(-1).repeat(3, 1))


@pytest.mark.parametrize("page", ["README.md", "docs/architecture.md"])
def test_every_file_it_names_exists(page):
    text = (ROOT / page).read_text()
    links = [target for target in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in target]
    named = re.findall(
        r"`((?:alibi_lm|configs|docs|scripts|tests|study|model|data|evaluate|positions|tasks|attention)"
        r"/[\w/]+\.(?:py|yaml|md))`",
        text,
    )
    assert links or named
    new = {"alibi_lm/positions/log_decay.py"}  # what a reader of the README writes
    for target in {*links, *named} - new:
        assert (ROOT / target).exists() or (ROOT / "alibi_lm" / target).exists(), target


def test_every_make_target_it_names_exists():
    targets = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    code = "\n".join(re.findall(r"```.*?```|`[^`]+`", README, flags=re.DOTALL))
    named = {word for words in re.findall(r"\bmake ((?:[a-z-]+ ?)+)", code) for word in words.split()}
    assert named <= targets, named - targets
    assert {"train", "eval-extrapolation", "reproduce", "test"} <= named


def test_the_numbers_of_its_figure_are_the_published_ones():
    table = (ROOT / "docs" / "results" / "quick" / "table.md").read_text()
    words = README.split("**What the figure shows.**")[1].split("\n\n")[0]
    numbers = re.findall(r"\b\d+\.\d+\b|\b\d+,\d{3}\b", words)
    assert len(numbers) >= 6
    tokens = {"819,200"}  # of training: steps times tokens_per_step of the experiment, below
    for number in set(numbers) - tokens:
        assert re.search(rf"(?<![\d.]){re.escape(number)}(?![\d.])", table), number
    config = compose(["experiment=quick"])
    assert f"{config.steps * config.tokens_per_step:,}" in tokens


def test_the_tables_of_speeds_are_the_published_ones():
    page = (ROOT / "docs" / "speed.md").read_text()
    published = {
        name: report_rows(ROOT / "docs" / "results" / "bench" / f"{name}.jsonl")
        for name in ("results", "compiled", "flushed")
    }
    for name in ("results", "compiled"):
        assert ratios_markdown(published[name]) in page, name
    for name in ("results", "flushed"):
        assert speedups_markdown(published[name]) in page, name
