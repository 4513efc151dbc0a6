"""What is published suffices for every figure and table, and replaces nothing that it did not write."""

import json

import numpy as np
import pytest
from study_rows import run_script, study, write_run

from alibi_lm.results.documents import read_documents
from alibi_lm.results.rows import read_rows
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


def test_a_publication_draws_the_same_figure_and_leaves_weights_behind(experiment, tmp_path):
    target = tmp_path / "docs" / "mine"
    bench = tmp_path / "bench.jsonl"
    bench.write_text("{}\n")
    written = {str(path.relative_to(target)) for path in publish(experiment, target, bench)}
    assert written == {str(p.relative_to(target)) for p in target.rglob("*") if p.is_file()}
    assert {"results.jsonl", "table.md", "extrapolation.png", "extrapolation.svg", "bench.jsonl"} <= written
    assert {
        f"runs/alibi_L64_s1/{name}" for name in ("config.yaml", "environment.json", "metrics.jsonl")
    } <= written
    assert not [name for name in written if "safetensors" in name or "nats" in name]
    assert read_rows(target / "results.jsonl") == read_rows(experiment / "results.jsonl")
    before = (target / "extrapolation.svg").read_bytes()
    assert run_script("figures.py", f"folder={target}").returncode == 0
    assert (target / "extrapolation.svg").read_bytes() == before


def test_absolute_paths_are_cut_to_their_last_part(experiment, tmp_path):
    run = experiment.parent / "runs" / "alibi_L64_s1"
    (run / "config.yaml").write_text("data:\n  path: /home/ada/wiki text\n  cache_dir: data\n")
    (run / "corpus.json").write_text(json.dumps({"source": {"kind": "folder", "path": "/home/ada/wiki text"}}))
    publish(experiment, tmp_path / "docs")
    published = tmp_path / "docs" / "runs" / "alibi_L64_s1"
    assert (published / "config.yaml").read_text() == "data:\n  path: wiki text\n  cache_dir: data\n"
    assert json.loads((published / "corpus.json").read_text()) == {
        "source": {"kind": "folder", "path": "wiki text"}
    }
    assert "/home/ada" in (run / "config.yaml").read_text()


def test_results_of_an_earlier_version_are_published_in_the_form_of_this_one(experiment, tmp_path):
    """summary.npz held the sums per document; rows lacked task, metric, value and changes."""
    target = tmp_path / "docs" / "mine"
    names = ("task", "metric", "value", "n", "changes", "run_id", "folder")
    lines = [json.loads(line) for line in (experiment / "results.jsonl").read_text().splitlines()]
    old = [{key: value for key, value in line.items() if key not in names} for line in lines]
    (experiment / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in old))
    numbers = {"float64": np.array([1.25, 2.5]), "int64": np.array([10, 20])}
    spans = {"document_nats": ["float64", 0, 2], "document_tokens": ["int64", 0, 2]}
    row = next(line for line in old if line["run"])
    entry = {name: row[name] for name in ("run", "inference_length", "mode", "stride", "split", "corpus")}
    index = np.frombuffer(json.dumps([entry | {"arrays": spans}]).encode(), dtype=np.uint8)
    np.savez(experiment / "summary.npz", index=index, **numbers)
    before = read_documents(experiment)
    written = {path.name for path in publish(experiment, target)}
    assert "documents.jsonl" in written and not [n for n in written if n.endswith((".npz", ".lock"))]
    after = read_documents(target)
    assert set(after) == set(before) and [one.nats.tolist() for one in after.values()] == [[1.25, 2.5]]
    assert {row.metric for row in read_rows(target / "results.jsonl")} == {"perplexity"}
    assert set(names) <= set(json.loads((target / "results.jsonl").read_text().splitlines()[0]))


def test_a_second_publication_replaces_the_first_and_keeps_other_files(experiment, tmp_path):
    target = tmp_path / "docs"
    publish(experiment, target)
    (target / "README.md").write_text("mine")
    (target / "runs" / "gone_L64_s1").mkdir()
    (experiment / "results.jsonl").write_text(
        (experiment / "results.jsonl").read_text().replace("abc1234", "def5678")
    )
    publish(experiment, target)
    assert (target / "README.md").read_text() == "mine"
    assert not (target / "runs" / "gone_L64_s1").exists()
    assert {row.commit for row in read_rows(target / "results.jsonl")} == {"def5678"}
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


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


def test_the_command_line(experiment, tmp_path):
    run = experiment.parent / "runs" / "alibi_L64_s1" / "environment.json"
    run.write_text(json.dumps({"commit": "abc", "dirty": True}))
    done = run_script("publish.py", "experiment=mine", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("docs/results/mine: ")
    assert done.stderr == "note: alibi_L64_s1 was trained by uncommitted code\n"
    assert run_script("publish.py", "experiment=nothing", cwd=tmp_path).returncode == 1
