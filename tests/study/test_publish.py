"""A publication is whole, small, without weights and without anybody's paths; what is not ours stays."""

import json

import pytest
from study_rows import run_script, study, write_run

from alibi_lm.results.rows import read_rows
from alibi_lm.study.figures import draw
from alibi_lm.study.publish import LARGEST, publish


@pytest.fixture
def experiment(tmp_path):
    """An experiment's outputs with things that must stay behind."""
    folder = tmp_path / "outputs" / "mine" / "extrapolation"
    for name in sorted({row.run for row in study(folder) if row.run}):
        write_run(folder.parent / "runs", name, "seed: 1\n", {"tokens_seen": 5}, {"commit": "abc", "dirty": False})
        (folder.parent / "runs" / name / "metrics.jsonl").write_text('{"step": 1}\n')
        (folder.parent / "runs" / name / "checkpoints").mkdir()
        (folder.parent / "runs" / name / "checkpoints" / "model.safetensors").write_text("weights")
    (folder / "tokens").mkdir()
    (folder / "tokens" / "x.nats").write_text("nats")
    return folder


def test_a_publication_draws_the_same_figure_and_leaves_weights_and_paths_behind(experiment, tmp_path):
    run = experiment.parent / "runs" / "alibi_L64_s1"
    (run / "config.yaml").write_text("data:\n  path: /home/ada/wiki text\n  cache_dir: data\n")
    (run / "corpus.json").write_text(json.dumps({"source": {"kind": "folder", "path": "/home/ada/wiki text"}}))
    target, bench = tmp_path / "docs" / "results" / "mine", tmp_path / "bench.jsonl"
    bench.write_text("{}\n")
    written = {str(path.relative_to(target)) for path in publish(experiment, target, bench)}
    assert written == {str(p.relative_to(target)) for p in target.rglob("*") if p.is_file()}
    assert {"results.jsonl", "table.md", "extrapolation.png", "extrapolation.svg", "bench.jsonl"} <= written
    files = ("config.yaml", "environment.json", "metrics.jsonl")
    assert {f"runs/alibi_L64_s1/{name}" for name in files} <= written
    assert not [name for name in written if "safetensors" in name or "nats" in name]
    assert read_rows(target / "results.jsonl") == read_rows(experiment / "results.jsonl")
    before = (target / "extrapolation.svg").read_bytes()
    assert target / "extrapolation.svg" in draw(target)
    assert (target / "extrapolation.svg").read_bytes() == before
    published = target / "runs" / "alibi_L64_s1"
    assert (published / "config.yaml").read_text() == "data:\n  path: wiki text\n  cache_dir: data\n"
    assert json.loads((published / "corpus.json").read_text())["source"]["path"] == "wiki text"
    assert "/home/ada" in (run / "config.yaml").read_text()

    # A second one replaces the first, and keeps what no publication wrote.
    (target / "README.md").write_text("mine")
    (target / "runs" / "gone_L64_s1").mkdir()
    gone = [target / f"{name}.{kind}" for name in ("extrapolation_test", "stages") for kind in ("png", "svg")]
    for picture in gone:
        picture.write_text("of rows that are no longer there")
    results = experiment / "results.jsonl"
    results.write_text(results.read_text().replace("abc1234", "def5678"))
    (run / "environment.json").write_text(json.dumps({"commit": "abc", "dirty": True}))
    done = run_script("publish.py", "experiment=mine", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("docs/results/mine: "), done.stderr
    assert done.stderr == "note: alibi_L64_s1 was trained by uncommitted code\n"
    assert (target / "README.md").read_text() == "mine" and not (target / "runs" / "gone_L64_s1").exists()
    assert not any(picture.exists() for picture in gone)
    assert {row.commit for row in read_rows(target / "results.jsonl")} == {"def5678"}
    assert [p.name for p in target.parent.iterdir() if p.name.startswith(".")] == []


def test_what_cannot_be_published_leaves_the_target_alone(experiment, tmp_path):
    target = tmp_path / "docs"
    target.mkdir()
    (target / "novel.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something other than published results"):
        publish(experiment, target)
    assert [p.name for p in target.iterdir()] == ["novel.txt"]

    metrics = experiment.parent / "runs" / "alibi_L64_s1" / "metrics.jsonl"
    with metrics.open("ab") as file:
        file.truncate(LARGEST + 1)
    with pytest.raises(ValueError, match=r"metrics\.jsonl has 16,777,217 bytes"):
        publish(experiment, tmp_path / "other")
    (metrics.parent / "config.yaml").unlink()
    metrics.parent.rename(metrics.parent.with_name("lost"))
    with pytest.raises(ValueError, match=r"run alibi_L64_s1 .* folder was not found"):
        publish(experiment, tmp_path / "other")
    assert not (tmp_path / "other").exists()
