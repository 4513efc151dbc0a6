"""Every difference other than the scheme is found, and what the scheme itself brings is not held against it."""

import pytest
from study_rows import row, write_run

from alibi_lm.study.fairness import differences
from alibi_lm.study.records import find_records, flatten, run_of

BASE = """
position: {name: POSITION, learned_slopes: false}
model: {num_layers: 4, model_dim: 128}
optimizer: {name: adamw, lr: 0.002}
tracking: {name: jsonl}
train_length: 64
steps: 600
seed: 1
device: cpu
"""
FINISHED = {"tokens_seen": 2_457_600, "num_parameters": 1_000_000, "corpus": "c0ffee"}
ENVIRONMENT = {"commit": "abc1234", "dirty": False, "torch": "2.13", "python": "3.11", "device": "cpu"}


def found(tmp_path, config=None, finished=None, environment=None, rows=None):
    """Differences between four equal runs, the last of which is changed."""
    rows = rows or [row(position) for position in ("alibi", "sinusoidal", "rotary", "t5")]
    for index, item in enumerate(rows):
        last = index == len(rows) - 1
        text = BASE.replace("POSITION", item.position)
        for old, new in (config or {}).items() if last else ():
            assert old in text
            text = text.replace(old, new)
        write_run(
            tmp_path / "runs",
            run_of(item.run),
            text,
            FINISHED | (finished or {} if last else {}),
            ENVIRONMENT | (environment or {} if last else {}),
        )
    return differences(rows, tmp_path / "extrapolation")


def test_equal_runs_of_different_schemes_and_seeds_differ_in_nothing(tmp_path):
    assert found(tmp_path) == []
    assert found(tmp_path, config={"seed: 1": "seed: 7", "device: cpu": "device: cuda", "jsonl": "wandb"}) == []


@pytest.mark.parametrize(
    "change, what, matters",
    [
        (dict(config={"lr: 0.002": "lr: 0.001"}), "optimizer.lr", True),
        (dict(config={"steps: 600": "steps: 601"}), "steps", True),
        (dict(config={"num_layers: 4": "num_layers: 5"}), "model.num_layers", True),
        (dict(config={"steps: 600": "steps: 600\ncompile: true"}), "compile", False),
        (dict(finished={"tokens_seen": 2_400_000}), "tokens seen in training", True),
        (dict(finished={"num_parameters": 1_008_192}), "parameters", False),
        (dict(finished={"num_parameters": 1_100_000}), "parameters", True),
        (dict(finished={"corpus": "facade"}), "training text (hash)", True),
        (dict(environment={"commit": "fff"}), "commit of the training", True),
        (dict(environment={"dirty": True}), "commit of the training", True),
        (dict(environment={"torch": "2.6"}), "environment: torch", False),
        (dict(rows=[row(), row("t5", corpus="facade")]), "validation text (hash)", True),
        (dict(rows=[row(), row("t5", commit="fff")]), "commit of the evaluation", True),
    ],
)
def test_each_difference_is_listed_with_its_runs(tmp_path, change, what, matters):
    (item,) = found(tmp_path, **change)
    assert (item.what, item.matters) == (what, matters)
    assert item.sentence.startswith(what + ": ") and "t5_L64_s1" in item.sentence


def test_views_measured_at_different_times_are_no_difference(tmp_path):
    later = dict(commit="fff", split="test")
    found = differences([row(), row("t5"), row(**later), row("t5", **later)], tmp_path)
    assert not [d for d in found if "commit" in d.what]
    refused = row("learned", perplexity=None, commit="fff")
    assert not [d for d in differences([row(), refused], tmp_path) if d.what == "commit of the evaluation"]
    (item,) = [d for d in differences([row(), row("t5", commit="fff")], tmp_path) if "commit" in d.what]
    assert item.matters


def test_several_differences_come_with_those_that_matter_first(tmp_path):
    items = found(tmp_path, config={"lr: 0.002": "lr: 0.1"}, environment={"torch": "2.6"})
    assert [item.matters for item in items] == [True, False]
    assert items[0].sentence == "optimizer.lr: 0.002 in 3 runs; 0.1 in t5_L64_s1"


def test_runs_without_a_config_are_named_not_passed_over(tmp_path):
    write_run(tmp_path / "runs", "alibi_L64_s1", BASE)
    (item,) = differences([row(), row("t5")], tmp_path / "extrapolation")
    assert item.sentence == "settings not compared: no config.yaml at hand in t5_L64_s1" and not item.matters


def test_run_folders_are_found_beside_and_below_the_results(tmp_path):
    rows = [row(), row("t5"), row("none", suffix="+scaling=yarn")]
    write_run(tmp_path / "runs", "alibi_L64_s1", "steps: 1")
    write_run(tmp_path / "extrapolation" / "runs", "t5_L64_s1", "steps: 2")
    write_run(tmp_path / "runs", "none_L64_s1", "steps: 3")
    records = find_records(rows, tmp_path / "extrapolation")
    assert [records[item.run].config["steps"] for item in rows] == [1, 2, 3]


def test_a_damaged_run_folder_is_a_clear_error(tmp_path):
    write_run(tmp_path / "runs", "alibi_L64_s1", "a: [")
    with pytest.raises(ValueError, match=r"config\.yaml cannot be read"):
        differences([row()], tmp_path / "extrapolation")
    write_run(tmp_path / "runs", "alibi_L64_s1", "a: 1")
    (tmp_path / "runs" / "alibi_L64_s1" / "finished.json").write_text("{")
    with pytest.raises(ValueError, match=r"finished\.json cannot be read"):
        differences([row()], tmp_path / "extrapolation")


def test_flatten_keeps_lists_whole():
    assert flatten({"a": {"b": [1, {"c": 2}], "d": None}, "e": 1}) == {"a.b": [1, {"c": 2}], "a.d": None, "e": 1}


@pytest.mark.parametrize(
    "way, other, matters",
    [("checkpoint", "last", True), ("precision", "bfloat16", True), ("attention", "eager", False)],
)
def test_rows_that_were_computed_in_another_way_are_named(tmp_path, way, other, matters):
    usual = {"checkpoint": "best", "precision": "float32", "attention": "sdpa"}
    rows = [row("alibi", extra=usual), row("rotary", extra=usual | {way: other}), row("t5")]
    (difference,) = found(tmp_path, rows=rows)
    assert difference.what == f"{way} of the evaluation" and difference.matters is matters
    assert difference.values == {usual[way]: ["alibi_L64_s1"], other: ["rotary_L64_s1"]}
