"""The list of an experiment's runs, against run folders in every state."""

from pathlib import Path

import pytest
import yaml

from alibi_lm.config import to_dict
from alibi_lm.experiment import compose, print_status
from alibi_lm.runs import mark_failed, mark_finished, run_lock


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def make_run(name: str, steps: list[int], *overrides: str) -> Path:
    folder = Path("outputs/smoke/runs") / name
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(compose(["experiment=smoke", *overrides]))))
    (folder / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in steps))
    return folder


def test_every_state(capsys: pytest.CaptureFixture[str]) -> None:
    mark_finished(make_run("alibi_L16_s1", [5, 10]), {"steps": 10})
    mark_failed(make_run("alibi_L16_s2", [5]), "NonFiniteLoss: step 7:\n  loss = nan\n\n")
    make_run("sinusoidal_L16_s1", [5]).joinpath("metrics.jsonl").write_text('{"step": 5}\n{"st')
    (make_run("alibi_L16_s8", [3]) / "config.yaml").write_text("seed: 1\n")  # not of the study, not readable
    # Not of the study: its own folder says how many steps it has.
    with run_lock(make_run("alibi_L16_s1_0f3a9c21", [800], "steps=900")):
        assert print_status("smoke", ["seed=1,2"]) == 0
    lines = [line.split(maxsplit=3) for line in capsys.readouterr().out.splitlines()]
    runs = "outputs/smoke/runs/"
    assert lines == [
        ["finished", runs + "alibi_L16_s1", "10/10"],
        ["running", runs + "alibi_L16_s1_0f3a9c21", "800/900"],
        ["failed", runs + "alibi_L16_s2", "5/10", "NonFiniteLoss: step 7: loss = nan"],
        ["partial", runs + "alibi_L16_s8", "3/?"],
        ["partial", runs + "sinusoidal_L16_s1", "5/10"],
        ["missing", runs + "sinusoidal_L16_s2"],
        ["1", "finished,", "1", "running, 1 failed, 2 partial, 1 missing"],
    ]


def test_settings_that_rename_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert print_status("smoke", ["steps=7", "position=none"]) == 0
    line, total = capsys.readouterr().out.splitlines()
    assert line.startswith("missing   outputs/smoke/runs/none_L16_s1_")
    assert total == "0 finished, 1 missing"
    assert not Path("outputs").exists()
