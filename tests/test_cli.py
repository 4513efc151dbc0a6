"""The scripts as a user runs them: train, run again, evaluate, draw, sweep, and mistakes."""

import json
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def place(tmp_path_factory, write_text) -> Path:
    folder = tmp_path_factory.mktemp("user")
    write_text(folder / "text")
    return folder


@pytest.fixture(scope="module")
def script(place, command):
    """Run a script in `place`; it must go well, or, with ok=False, end in an error without a traceback."""

    def run(name: str, *arguments: str, ok: bool = True):
        done = command(place, name, *arguments)
        assert (done.returncode == 0) == ok, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done

    return run


TEXT = ["data=wikitext2", "data.path=text", "tokenizer=word", "threads=1"]
TRAIN = ["experiment=smoke", *TEXT]


@pytest.fixture(scope="module")
def trained(place, script) -> Path:
    """Four runs of one multirun."""
    script("train.py", "-m", *TRAIN, "position=alibi,learned", "seed=1,2")
    return place / "outputs" / "smoke" / "runs"


def test_a_multirun_gives_a_folder_for_each_run(trained):
    names = sorted(p.name.rsplit("_", 1)[0] for p in trained.iterdir())
    assert names == ["alibi_L16_s1", "alibi_L16_s2", "learned_L16_s1", "learned_L16_s2"]
    for folder in trained.iterdir():
        assert {"config.yaml", "environment.json", "metrics.jsonl", "checkpoints", "finished.json"} <= {
            p.name for p in folder.iterdir()
        }
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        training = [r for r in rows if "train/loss" in r]
        assert [r["step"] for r in training] == [5, 10]
        assert {"tokens_seen", "train/lr", "train/grad_norm", "train/tokens_per_second"} <= set(training[0])
        assert [r["step"] for r in rows if "validation/loss" in r] == [10]
        finished = json.loads((folder / "finished.json").read_text())
        assert finished["tokens_seen"] == 2560 and finished["self_check_difference"] < 1e-5


def test_the_same_command_again_says_that_it_is_finished(trained, place, script):
    before = {p: p.stat().st_mtime_ns for p in trained.rglob("*") if p.is_file() and p.name != ".lock"}
    done = script("train.py", *TRAIN, "position=alibi")
    assert "already finished at step 10" in done.stdout
    assert before == {p: p.stat().st_mtime_ns for p in trained.rglob("*") if p.is_file() and p.name != ".lock"}


def test_evaluate_writes_rows_table_and_figures(trained, place, script):
    done = script("evaluate.py", "experiment=smoke", "threads=1")
    output = place / "outputs" / "smoke" / "extrapolation"
    assert {"results.jsonl", "results.csv", "table.md", "extrapolation.png", "extrapolation.svg"} <= {
        p.name for p in output.iterdir()
    }
    rows = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
    runs = [r for r in rows if r["run"] is not None]
    assert len(runs) == 8 and len(rows) == 9
    assert len({(r["tokens"], r["words"], r["bytes"], r["corpus"]) for r in rows}) == 1
    for row in runs:
        refused = row["position"] == "learned" and row["inference_length"] == 32
        assert (row["nats"] is None) == refused
        assert not refused or "16 positions" in row["reason"]
    assert "outputs/smoke/extrapolation/extrapolation.png" in done.stdout
    # Word level: a target is a word or a line end.
    assert rows[0]["tokens"] == rows[0]["words"]

    # A second evaluation replaces its rows; another mode adds rows.
    script("evaluate.py", "experiment=smoke", "threads=1", "lengths=[16]")
    assert len((output / "results.jsonl").read_text().splitlines()) == 9
    script("evaluate.py", "experiment=smoke", "threads=1", "mode=sliding", "stride=4", "split=test")
    after = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
    assert len([r for r in after if r["mode"] == "sliding" and r["split"] == "test" and r["run"]]) == 8


def test_the_trainers_validation_is_the_evaluators_number(trained, place, script):
    script("evaluate.py", "runs=outputs/smoke/runs/alibi*", "lengths=[16]", "output_dir=check", "threads=1")
    rows = [json.loads(line) for line in (place / "check" / "results.jsonl").read_text().splitlines()]
    for row in rows:
        if row["run"]:
            finished = json.loads((trained / row["run"] / "finished.json").read_text())
            assert row["nats"] / row["tokens"] == pytest.approx(finished["validation_loss"], rel=1e-6)


def test_the_decomposition_of_a_curve(trained, place, script):
    done = script(
        "analyse.py", "experiment=smoke", "view=decomposition", "runs=outputs/smoke/runs/*_s1*",
        "lengths=[16,48]", "stride=2", "threads=1",
    )  # fmt: skip
    view = place / "outputs" / "smoke" / "analysis"
    for suffix in ("json", "md", "png", "svg"):
        assert f"outputs/smoke/analysis/decomposition.{suffix}" in done.stdout
        assert (view / f"decomposition.{suffix}").stat().st_size > 500
    assert (view / "decomposition.md").read_text().strip() in done.stdout
    assert "position=learned has 16 positions" in done.stdout


def test_a_failing_job_hides_no_other(place, script):
    done = script(
        "train.py", "-m", *TRAIN, "position=alibi", "output_dir=deep", "seed=8",
        "model.num_heads=5,2", ok=False,
    )  # fmt: skip
    told = done.stderr.split("1 of the jobs failed:")[1]
    assert told.strip().startswith("job 0 (model.num_heads=5): error: model.num_heads = 5 does not divide")
    # The reason once, and the job by what it differs in from the others.
    assert done.stderr.count("does not divide") == 1 and "seed=8" not in told
    assert (place / "deep" / "finished.json").exists()


def test_load_run_gives_log_probabilities(trained, place, script):
    import torch

    from alibi_lm import load_run

    folder = next(p for p in trained.iterdir() if p.name.startswith("alibi_L16_s1"))
    model = load_run(folder, inference_length=64)
    assert not model.training
    tokens = torch.randint(0, model.vocab_size, (2, 65))
    log_prob = model.log_prob(tokens[:, :-1], tokens[:, 1:])
    assert log_prob.shape == (2, 64) and log_prob.dtype == torch.float32 and (log_prob < 0).all()
    double = model.double().log_prob(tokens[:, :-1], tokens[:, 1:])
    assert double.dtype == torch.float64
    torch.testing.assert_close(log_prob.double(), double, rtol=0, atol=1e-4)


def test_curves_go_to_wandb_as_a_table_and_a_plot(trained, place, script):
    script(
        "evaluate.py", "runs=outputs/smoke/runs/alibi*", "lengths=[16,32]", "output_dir=tracked",
        "tracking=wandb", "threads=1",
    )  # fmt: skip
    tables = list((place / "tracked" / "wandb").glob("offline-run-*/files/media/table/*.table.json"))
    contents = [json.loads(t.read_text()) for t in tables]
    curve = next(c for c in contents if "inference_length" in c["columns"] and "run" in c["columns"])
    lengths = {row[curve["columns"].index("inference_length")] for row in curve["data"]}
    assert lengths == {16, 32} and len(curve["data"]) == 4
