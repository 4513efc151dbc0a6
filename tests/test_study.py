"""A whole study from one command: runs, curves, further measurements, claims, report, published folder."""

import copy
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from alibi_lm.experiment import compose
from alibi_lm.settings import parse
from benchmarks.run import BenchConfig

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENTS = sorted(p.stem for p in (ROOT / "configs" / "experiment").glob("*.yaml"))


@pytest.fixture(params=EXPERIMENTS)
def experiment(request):
    """Name and measurements of each experiment."""
    return request.param, compose([f"experiment={request.param}"]).measurements


@pytest.fixture
def evaluation_configs(experiment):
    """Hydra as scripts/evaluate.py and scripts/analyse.py set it up, and afterwards as it was."""
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore

    from alibi_lm.config import register
    from alibi_lm.evaluate.analysis import AnalyseConfig

    store = ConfigStore.instance()
    before = copy.deepcopy(store.repo)
    register(plain="tracking")
    store.store(name="base_analyse", node=AnalyseConfig)
    with initialize_config_dir(str(ROOT / "configs" / "evaluation"), version_base="1.3"):
        yield
    store.repo = before


def test_every_measurement_is_a_command_that_its_script_accepts(experiment, evaluation_configs):
    from hydra import compose as hydra_compose

    from alibi_lm.config import to_config

    experiment_name, lines = experiment
    for line in lines:
        name, *arguments = shlex.split(line)
        if name == "bench":
            parse(BenchConfig, arguments)
        else:
            to_config(hydra_compose(name, [f"experiment={experiment_name}", *arguments]))


def run(place: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / script), *arguments],
        cwd=place, env=dict(os.environ, OMP_NUM_THREADS="1"), capture_output=True, text=True, timeout=900,
    )  # fmt: skip


@pytest.mark.parametrize(
    "measurements, words",
    [
        ("['frobnicate split=test']", "Allowed: evaluate, analyse, bench"),
        ("['analyse view=position', '']", "''"),
    ],
)
def test_a_measurement_that_is_no_script_is_refused_before_any_work(tmp_path, measurements, words):
    done = run(tmp_path, "study.py", "experiment=smoke", f"measurements={measurements}")
    assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_gpu_study_from_one_command_at_toy_size(tmp_path, write_text):
    """`wt103_small` with a model that a CPU trains in seconds: some of its runs, all of its measurements."""
    text = write_text(tmp_path / "text")
    for path in text.glob("*.tokens"):
        path.write_text(path.read_text() * (20 if "train" in path.name else 8))
    toy = [
        "data.path=text", "device=cpu", "threads=1", "tracking=jsonl", "steps=2", "tokens_per_step=3072",
        "model.num_layers=1", "model.model_dim=16", "model.num_heads=2", "model.ffn_dim=32", "model.dropout=0",
        "model.adaptive_cutoffs=[8,14]", "evaluation.tokens_per_forward=15512",
        "evaluation.lengths=[512,1012,3072,15512]",
    ]  # fmt: skip
    planned = compose(["experiment=wt103_small"]).measurements
    # All of its measurements, with the benchmark at the size of a test.
    small = "bench seconds=1 model=small lengths=[16] eval_lengths=[] positions=[alibi] peers=false"
    lines = [small if line.startswith("bench") else line for line in planned]
    assert small in lines
    sweeps = ["position=alibi,learned train_length=512", "position=alibi train_length=512 seed=2"]
    sweeps += ["position=sinusoidal train_length=3072"]
    chosen = [f"study={json.dumps(sweeps)}", f"measurements={json.dumps(lines)}"]
    command = ["experiment=wt103_small", *toy, *chosen]
    done = run(tmp_path, "study.py", *command)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    published = tmp_path / "docs" / "results" / "wt103_small"
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
        assert sorted(alibi) == [512, 1012, 3072, 15512]
    learned = [r for r in rows if r["position"] == "learned" and r["inference_length"] > 512]
    assert learned and all(r["nats"] is None and "512 positions" in r["reason"] for r in learned)
    assert {r["stride"] for r in rows if r["mode"] == "sliding"} == {512}
    views = {line.split("view=")[1].split()[0] for line in lines if line.startswith("analyse")}
    for view in views:
        assert (published / "analysis" / f"{view}.json").is_file()
        assert (published / "analysis" / f"{view}.png").read_bytes().startswith(b"\x89PNG")
    assert (published / "bench.jsonl").is_file() and (published / "extrapolation.png").is_file()
    assert (tmp_path / "outputs/wt103_small/extrapolation/report.html").is_file()
    assert sum(path.stat().st_size for path in published.rglob("*")) < 2**24
