"""A whole study from one command: runs, curves, further measurements, claims, report, published folder."""

import json
import os
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from alibi_lm import experiment
from alibi_lm.experiment import compose, measurement, study
from alibi_lm.study import commands

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENTS = sorted(p.stem for p in (ROOT / "configs" / "experiment").glob("*.yaml"))
TEXT = ["experiment=smoke", "data=wikitext2", "data.path=text", "tokenizer=word", "threads=1", "device=cpu"]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_measurement_is_a_command_with_settings_that_it_knows(name):
    for line in compose([f"experiment={name}"]).measurements:
        assert callable(measurement(name, line, ["device=cpu"]))


@pytest.mark.parametrize(
    ("measurements", "words"),
    [
        ("['frobnicate split=test']", "Allowed: evaluate, analyse, bench"),
        ("['analyse view=position','']", "''"),
        ("['evaluate split=test','evaluate lengths=[0]']", "lengths"),
        ("['bench lenghts=[16]']", "lenghts"),
    ],
)
def test_a_wrong_measurement_is_refused_before_any_work(tmp_path, monkeypatch, measurements, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as error:
        study("smoke", [f"measurements={measurements}"])
    assert words in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_one_bad_run_takes_no_other_with_it(tmp_path, write_text, command, monkeypatch, capsys):
    """Training of the second run fails; the first is evaluated and drawn, and is not trained a second time."""
    write_text(tmp_path / "text")
    monkeypatch.chdir(tmp_path)
    one_at_a_time = threading.Lock()

    def run(line, check, env):
        """A process of its own, but one that has all modules loaded."""
        assert line[0] == sys.executable and Path(line[1]).parent == ROOT / "scripts"
        own = {name: value for name, value in env.items() if os.environ.get(name) != value}
        with one_at_a_time:
            done = command(tmp_path, Path(line[1]).name, *line[2:], **own)
        print(done.stdout)
        print(done.stderr, file=sys.stderr)
        return done

    monkeypatch.setattr(experiment, "subprocess", SimpleNamespace(run=run))
    sweeps = ["position=none", "position=sinusoidal model.model_dim=5 model.num_heads=1"]
    arguments = [*TEXT[1:], "steps=2", "runs_at_once=2", f"study={json.dumps(sweeps)}"]
    for again in (False, True):
        status = experiment.reproduce("smoke", arguments)
        out, err = capsys.readouterr()
        assert status == 1, out + err
        assert "2 runs, 2 at a time" in out and "Traceback" not in err
        assert "of 2 runs, these failed: sinusoidal_L16_s1_" in err
        assert "model.model_dim = 5" in err
        assert ("already finished" in out) == again
        output = tmp_path / "outputs" / "smoke" / "extrapolation"
        rows = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
        assert [(row["position"], row["inference_length"]) for row in rows if row["run"]] == [
            ("none", 16),
            ("none", 32),
        ]
        assert (output / "extrapolation.png").read_bytes().startswith(b"\x89PNG")


def test_analyses_that_follow_each_other_run_side_by_side(monkeypatch, capsys):
    """Each waits for the other, then one fails; what follows runs alone and afterwards."""
    both, began = threading.Barrier(2, timeout=30), []

    def run(line, check, env):
        began.append(line[2:])
        if "view=last" in line or "view=position" in line:
            both.wait()
        return SimpleNamespace(returncode=int("view=last" in line))

    monkeypatch.setattr(experiment, "subprocess", SimpleNamespace(run=run))
    monkeypatch.setattr(experiment, "reproduce", lambda name, overrides: 0)
    for step in ("claims", "compare_paper", "report", "publish_results"):
        monkeypatch.setattr(commands, step, lambda config: None)
    lines = ["analyse view=last", "analyse view=position", "bench lengths=[16]", "analyse view=documents"]
    assert study("smoke", ["device=cpu", "runs_at_once=2", f"measurements={json.dumps(lines)}"]) == 1
    assert [next(a for a in line if a[:4] in ("view", "leng")) for line in began[2:]] == [
        "lengths=[16]",
        "view=documents",
    ]
    assert all(
        {"experiment=smoke", "device=cpu", "threads=1"} <= set(line) for line in began if "view" in str(line)
    )
    assert "1 of 9 steps failed: analyse view=last" in capsys.readouterr().err


@pytest.mark.slow
def test_the_gpu_study_from_one_command_at_toy_size(tmp_path, write_text, command):
    """`wt103_gpu` with a model that a CPU trains in seconds: some of its runs, all of its measurements."""
    text = write_text(tmp_path / "text")
    for path in text.glob("*.tokens"):
        path.write_text(path.read_text() * (20 if "train" in path.name else 40))
    toy = [
        "data.path=text", "device=cpu", "threads=1", "tracking=jsonl", "steps=2", "tokens_per_step=3072",
        "compile=false",
        "model.num_layers=1", "model.model_dim=16", "model.num_heads=2", "model.ffn_dim=32", "model.dropout=0",
        "model.adaptive_cutoffs=[8,14]", "evaluation.tokens_per_forward=15512",
        "evaluation.lengths=[512,1012,3072,15512]",
    ]  # fmt: skip
    lines = compose(["experiment=wt103_gpu"]).measurements
    # Beside all of its measurements one of each other kind, at the size of a test.
    lines += ["evaluate mode=sliding stride=512 runs=outputs/wt103_gpu/runs/*_L512_s*"]
    lines += ["analyse view=decomposition lengths=[1012] stride=64 runs=outputs/wt103_gpu/runs/alibi_L512_s*"]
    lines += ["bench seconds=1 lengths=[16] eval_lengths=[] positions=[alibi] peers=false"]
    sweeps = ["position=alibi,learned train_length=512", "position=alibi train_length=512 seed=2"]
    sweeps += ["position=sinusoidal train_length=3072"]
    chosen = [f"study={json.dumps(sweeps)}", f"measurements={json.dumps(lines)}"]
    done = command(tmp_path, "study.py", "experiment=wt103_gpu", *toy, *chosen)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    published = tmp_path / "docs" / "results" / "wt103_gpu"
    rows = [json.loads(line) for line in (published / "results.jsonl").read_text().splitlines()]
    runs = {row["run"] for row in rows} - {None}
    assert len(runs) == 4 and all((published / "runs" / name / "finished.json").is_file() for name in runs)
    for split in ("validation", "test"):
        alibi = [
            r["inference_length"]
            for r in rows
            if r["run"]
            and r["run"].startswith("alibi_L512_s2")
            and r["split"] == split
            and r["mode"] == "nonoverlapping"
        ]
        assert sorted(alibi) == ([512, 1012, 3072, 15512] if split == "validation" else [512, 3072, 15512])
    learned = [r for r in rows if r["position"] == "learned" and r["inference_length"] > 512]
    assert learned and all(r["nats"] is None and "512 positions" in r["reason"] for r in learned)
    assert {r["stride"] for r in rows if r["mode"] == "sliding"} == {512}
    views = {line.split("view=")[1].split()[0] for line in lines if line.startswith("analyse")}
    for view in views:
        assert (published / "analysis" / f"{view}.json").is_file()
        assert (published / "analysis" / f"{view}.png").read_bytes().startswith(b"\x89PNG")
    assert (published / "bench.jsonl").is_file() and (published / "extrapolation.png").is_file()
    assert (tmp_path / "outputs/wt103_gpu/extrapolation/report.html").is_file()
    assert sum(path.stat().st_size for path in published.rglob("*")) < 2**24
