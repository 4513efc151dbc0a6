"""`cli.command`: settings from `name=value` arguments, and how a command ends."""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass, field
from typing import Any

import pytest
from omegaconf import MISSING

from alibi_lm.cli import command, experiment_command, hydra_command
from alibi_lm.config import TrainConfig
from alibi_lm.settings import parse, require, usage


@dataclass
class Where:
    """A nested config."""

    path: str | None = None
    """A folder."""


@dataclass
class Config:
    """Settings of a command."""

    source: str = MISSING
    """What to read."""
    lengths: list[int] = field(default_factory=list)
    """Lengths; empty: all."""
    near: float = 0.5
    seed: int = 1
    draw: bool = False
    name: str | None = None
    where: Where = field(default_factory=Where)
    changes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(self.near >= 0, f"near = {self.near}. Use a number >= 0.")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["source=a"], {"source": "a", "lengths": [], "near": 0.5, "draw": False}),
        (["source=alibi_L64_s*", "lengths=[64,128]", "near=0", "draw=true"], {"lengths": [64, 128], "near": 0.0}),
        # Texts stand as they are, whatever they hold.
        (["source=/a=b: [c] ${d} ~ \u00fc", "seed=1", "seed=2"], {"source": "/a=b: [c] ${d} ~ \u00fc", "seed": 2}),
        (["source=1e3", "near=1e-3", "name=null"], {"source": "1e3", "near": 0.001, "name": None}),
        (["source=a", "where.path=/x y"], {"where": Where("/x y")}),
        (["source=a", "changes.scaling=yarn"], {"changes": {"scaling": "yarn"}}),
    ],
)
def test_settings_are_read(arguments: list[str], expected: dict[str, Any]) -> None:
    config = parse(Config, arguments)
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "missing: source=..."),
        (["source"], "Allowed: source=, lengths="),
        (["source=a", "colour=red"], "Allowed: source=, lengths="),
        (["source=a", "where.colour=red"], "'where.colour=red' is not a setting"),
        (["source=a", "--draw"], "'--draw' is not a setting"),
        (["source="], "source is empty"),
        (["source=  "], "source is empty"),
        (["source=a", "lengths="], "lengths is empty"),
        (["source=a", "lengths=[]"], "lengths = []"),
        (["source=a", "lengths=64"], "lengths = 64. Use a list"),
        (["source=a", "lengths=[64,x]"], "lengths = [64,x]. Use a list"),
        (["source=a", "lengths=[64"], "lengths = [64. Use a list"),
        (["source=a", "lengths=[10000000000]"], "lengths = [10000000000]"),
        (["source=a", "seed=1.5"], "seed = 1.5. Use a whole number"),
        (["source=a", "seed=true"], "seed = true. Use a whole number"),
        (["source=a", "seed=99999999999999999999"], "seed = 99999999999999999999"),
        (["source=a", "draw=maybe"], "draw = maybe. Use true or false"),
        (["source=a", "near=close"], "near = close. Use a number"),
        (["source=a", "near=-1"], "near = -1.0. Use a number >= 0"),
    ],
)
def test_a_wrong_argument_is_refused(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    ran = []
    with pytest.raises(SystemExit) as end:
        command(Config)(ran.append)(arguments)
    printed = capsys.readouterr()
    assert end.value.code == 1 and not ran and printed.out == ""
    assert printed.err.startswith("error: ") and words in printed.err and "Traceback" not in printed.err


class Asked(Exception):
    """As a run ends that was asked to stop."""

    status = 143


@pytest.mark.parametrize(
    ("outcome", "status", "words"),
    [
        (None, 0, ""),
        (3, 3, ""),
        (ValueError("x = 1. Use 2."), 1, "error: x = 1. Use 2."),
        (FileNotFoundError(2, "No such file", "a.txt"), 1, "a.txt"),
        (MemoryError(), 1, "error: this machine"),
        (Asked("stopped at step 5"), 143, "stopped at step 5"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (KeyError("ours"), 1, "Traceback"),
    ],
    ids=repr,
)
def test_how_a_command_ends(outcome: Any, status: int, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    @command(Config)
    def main(config: Config) -> int | None:
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    with pytest.raises(SystemExit) as end:
        main(["source=a"])
    printed = capsys.readouterr().err
    assert end.value.code == status and words in printed
    assert ("Traceback" in printed) == (words == "Traceback")


@pytest.mark.parametrize("output", ["full", "closed", "ascii"])
def test_output_that_cannot_be_written_ends_no_command(
    output: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written = io.BytesIO()
    stream = None if output == "closed" else io.TextIOWrapper(written, encoding="ascii", write_through=True)
    if output == "full":
        stream = open("/dev/full", "w")
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(SystemExit) as end:
        command(Config)(lambda config: print("L\u00e4ufe", flush=True) or 3)(["source=a"])
    assert end.value.code == 3 and sys.stdout is stream
    assert ("No space left" in capsys.readouterr().err) == (output == "full")
    assert output != "ascii" or written.getvalue() == b"L\\xe4ufe\n"
    if stream is not None:
        stream.close()


def test_help_names_every_setting_with_its_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        command(Config)(lambda config: None)(["--help"])
    printed = capsys.readouterr().out
    assert end.value.code == 0 and "how a command ends" in printed  # this module's docstring
    assert "source=...\n      What to read." in printed and "name=null" in printed
    assert "lengths=[]\n      Lengths; empty: all." in printed and "where.path=null\n      A folder." in printed
    assert "draw=false" in usage(Config, "About.") and usage(Config, "About.").startswith("About.\n")


def test_help_of_a_command_on_an_experiment_leaves_out_what_only_its_caller_needs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def job(experiment: str, overrides: list[str]) -> int:
        """Do it all.

        Twice, if asked.

        Returns:
            Exit status.
        """
        return 0

    with pytest.raises(SystemExit) as end:
        experiment_command(job)(["--help"])
    printed = capsys.readouterr().out
    assert end.value.code == 0 and "Exit status" not in printed
    assert printed.startswith("Do it all.\n\nTwice, if asked.\n\nSettings, as name=value:\n  experiment=quick\n")


def test_help_of_a_hydra_command_describes_the_chosen_scheme_with_the_experiments_values(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "experiment=needle", "position=fox", "-h"])
    with pytest.raises(SystemExit) as end:
        hydra_command(TrainConfig, "train")(lambda config: pytest.fail("help only"))()
    printed = capsys.readouterr().out
    assert end.value.code == 0 and printed.startswith("`cli.command`")  # this module's docstring
    assert "  position=fox\n      alibi, bam," in printed and "  task=needle\n" in printed
    assert "  position.gates=input\n      input, bias or fixed.\n" in printed and "position.name" not in printed
    assert "  steps=2000\n      Optimizer steps.\n" in printed
