"""The list of an experiment's runs, against run folders in every state."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from alibi_lm.runs import RunLock, mark_failed, mark_finished

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def sweep_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, in an empty current folder."""
    spec = importlib.util.spec_from_file_location("sweep_status", ROOT / "scripts" / "sweep_status.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(tmp_path)
    return module


def make_run(name: str, steps: list[int]) -> Path:
    folder = Path("outputs/smoke/runs") / name
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("seed: 1\n")
    (folder / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in steps))
    return folder


def test_every_state(sweep_status: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    mark_finished(make_run("alibi_L16_s1", [5, 10]), {"steps": 10})
    mark_failed(make_run("alibi_L16_s2", [5]), "NonFiniteLoss: step 7: loss = nan")
    make_run("sinusoidal_L16_s1", [5]).joinpath("metrics.jsonl").write_text('{"step": 5}\n{"st')
    with RunLock(make_run("alibi_L16_s1_0f3a9c21", [8])):  # not of the study
        assert sweep_status.main(["experiment=smoke", "seed=1,2"]) == 0
    lines = [line.split(maxsplit=3) for line in capsys.readouterr().out.splitlines()]
    runs = "outputs/smoke/runs/"
    assert lines == [
        ["finished", runs + "alibi_L16_s1", "10/10"],
        ["running", runs + "alibi_L16_s1_0f3a9c21", "8/?"],
        ["failed", runs + "alibi_L16_s2", "5/10", "NonFiniteLoss: step 7: loss = nan"],
        ["partial", runs + "sinusoidal_L16_s1", "5/10"],
        ["missing", runs + "sinusoidal_L16_s2"],
        ["1", "finished,", "1", "running, 1 failed, 1 partial, 1 missing"],
    ]


def test_settings_that_rename_a_run(sweep_status: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep_status.main(["experiment=smoke", "steps=7", "position=none"]) == 0
    line, total = capsys.readouterr().out.splitlines()
    assert line.startswith("missing   outputs/smoke/runs/none_L16_s1_")
    assert total == "0 finished, 1 missing"
    assert not Path("outputs").exists()


@pytest.mark.parametrize("argument", ["experiment=nope", "steps=0", "stesp=1", "steps=x"])
def test_mistakes(sweep_status: ModuleType, capsys: pytest.CaptureFixture[str], argument: str) -> None:
    assert sweep_status.main(["experiment=smoke", argument]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ")
    assert argument.split("=")[0] in captured.err
