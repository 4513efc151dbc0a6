"""The kit for machines without a network: what travels, and a crew that ends in time."""

import json
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from alibi_lm.experiment import planned_runs, prepare_corpus
from benchmarks.offline import Crew, OfflineConfig, collect, pack

ROOT = Path(__file__).resolve().parent.parent


def code(text):
    return [sys.executable, "-c", text]


def verdicts(place):
    lines = (place / "verdicts.txt").read_text().splitlines()
    return [tuple(line.rsplit(",", 1)[0].split(": ", 1)) for line in lines]


def test_an_evaluator_follows_two_trainers(tmp_path):
    crew = Crew(tmp_path, {"WORD": "here"}, time.monotonic() + 80)
    note = (
        "import sys, time\n"
        "open('order', 'a').write(sys.argv[1] + '\\n')\n"
        "time.sleep(4 if sys.argv[1] == 'train c' else 0.1)\n"
        "open('order', 'a').write(sys.argv[1] + ' ended\\n')\n"
    )
    bad = code("import sys; print('no'); sys.exit(3)")
    runs = [(name, [*code(note), f"train {name}"], [*code(note), f"evaluate {name}"]) for name in "abc"]
    crew.study([runs[0], ("bad", bad, code(note)), *runs[1:]], trainers=2)
    found = verdicts(tmp_path)
    assert set(found) == {("train bad", "failed (3)")} | {
        (f"{k} {n}", "done") for k in ("train", "evaluate") for n in "abc"
    }
    order = (tmp_path / "order").read_text().splitlines()
    # Each run is evaluated after its own training, one at a time; which of two trainers ends first is open.
    evaluations = [line for line in order if line.startswith("evaluate")]
    assert [f"{line} ended" for line in evaluations[::2]] == evaluations[1::2]
    for name in "abc":
        assert order.index(f"train {name} ended") < order.index(f"evaluate {name}")
    assert order.index("evaluate a ended") < order.index("train c ended"), (
        "evaluations do not wait for all of training"
    )
    assert crew.failed == ["train bad"] and (tmp_path / "logs" / "train bad.log").read_text() == "no\n"
    assert crew.run("environment", code("import os; assert os.environ['WORD'] == 'here'"))


def test_the_end_of_the_time_interrupts_what_runs_and_begins_nothing_more(tmp_path):
    saves = (
        "import signal, sys, time\n"
        "def stop(*_):\n    print('saved'); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, stop)\ntime.sleep(60)\n"
    )
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    began = time.monotonic()
    crew = Crew(tmp_path, {}, began + 8, grace=3.0)
    runs = [(name, code(text), code("")) for name, text in (("a", saves), ("deaf", deaf), ("late", ""))]
    crew.study(runs, trainers=2)
    assert time.monotonic() - began < 9
    assert set(verdicts(tmp_path)) == {
        ("train a", "interrupted"), ("train deaf", "interrupted"), ("train late", "not begun"),
    }  # fmt: skip
    assert (tmp_path / "logs" / "train a.log").read_text() == "saved\n" and not crew.failed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do": "unpack"}, "do = 'unpack'. Allowed: pack, work, collect"),
        ({"do": "work", "seconds": 0}, "seconds = 0"),
        ({"do": "work", "trainers": 0}, "trainers = 0"),
    ],
)
def test_mistakes_are_told(settings, message):
    with pytest.raises(ValueError, match=message):
        OfflineConfig(**settings)


def test_other_peoples_folders_are_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="holds other things"):
        pack(OfflineConfig("pack", str(tmp_path), "smoke"), planned_runs, prepare_corpus)
    with pytest.raises(ValueError, match="do=work first"):
        collect(OfflineConfig("collect", str(tmp_path)))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_study_travels_and_its_results_come_back(tmp_path, monkeypatch):
    """At toy size on the CPU, with the kit's own code, outside of this checkout."""
    monkeypatch.chdir(tmp_path)  # in a checkout the runs may be finished already
    kit = tmp_path / "kit"
    pack(OfflineConfig("pack", str(kit), "smoke", ["device=cpu", "threads=1"]), planned_runs, prepare_corpus)
    assert not (kit / "wheels").exists() and len(json.loads((kit / "kit.json").read_text())["runs"]) == 2
    moved = kit.rename(tmp_path / "there")
    bench = "lengths=[16] eval_lengths=[] positions=[alibi] model=tiny peers=false seconds=1 threads=1 device=cpu"
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    done = subprocess.run(
        ["sh", str(moved / "start.sh"), "seconds=700", f"bench={bench}"],
        cwd=tmp_path, env={"PATH": path, "HOME": str(tmp_path)}, capture_output=True, text=True, timeout=800,
    )  # fmt: skip
    logs = "\n".join(p.read_text()[-2000:] for p in (moved / "work" / "logs").glob("*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    with tarfile.open(moved / "collected.tgz") as archive:
        names = archive.getnames()
        archive.extractall(tmp_path / "home", filter="data")
    home = tmp_path / "home"
    rows = [
        json.loads(line) for line in (home / "outputs/smoke/extrapolation/results.jsonl").read_text().splitlines()
    ]
    assert {(r["position"], r["inference_length"]) for r in rows} >= {
        (p, n) for p in ("alibi", "sinusoidal") for n in (16, 32)
    }
    commit = json.loads((moved / "kit.json").read_text())["commit"]
    assert {row["commit"] for row in rows if row["run"]} == {commit}
    assert "outputs/bench/results.jsonl" in names and not [n for n in names if "checkpoints" in n]
