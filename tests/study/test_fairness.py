"""Every difference other than the scheme is found, and what the scheme itself brings is not held against it."""

import pytest
from study_rows import accuracy, real_config, row, write_run

from alibi_lm.study import fairness
from alibi_lm.study.records import find_records, recipes

FINISHED = {"tokens_seen": 2_457_600, "num_parameters": 1_000_000, "corpus": "c0ffee"}
ENVIRONMENT = {"commit": "abc1234", "dirty": False, "torch": "2.13", "python": "3.11", "device": "cpu"}
SCHEMES = ("alibi", "sinusoidal", "rotary", "t5")


def differences(rows, folder):
    return fairness.differences(rows, find_records(rows, folder))


@pytest.fixture
def found(tmp_path):
    """Differences between four equal runs, the last of which is changed."""

    def compare(config=None, finished=None, environment=None, rows=None):
        rows = rows or [row(position) for position in SCHEMES]
        for index, item in enumerate(rows):
            last = index == len(rows) - 1
            write_run(
                tmp_path / "runs",
                item.run,
                real_config(item.position, **(config or {} if last else {})),
                FINISHED | (finished or {} if last else {}),
                ENVIRONMENT | (environment or {} if last else {}),
            )
        return differences(rows, tmp_path / "extrapolation")

    return compare


@pytest.mark.parametrize(
    "changes",
    [
        dict(
            seed=7,
            device="cpu",
            log_every=3,
            threads=2,
            keep_last=9,
            tracking__name="jsonl",
            measurements=["analyse view=last"],
            study=["position=alibi"],
        ),
        dict(data__cache_dir="elsewhere", experiment="other", evaluation__lengths=[16], output_dir="x"),
    ],
    ids=["machine and measurements", "places"],
)
def test_what_no_result_depends_on_is_no_difference(found, changes):
    assert found(config=changes) == []


def test_the_place_of_the_text_is_no_difference(tmp_path):
    rows = [row(position) for position in SCHEMES[:2]]
    for item, place in zip(rows, ("text", "text/"), strict=True):
        data = dict(data__name="wikitext2", data__path=place)
        write_run(tmp_path / "runs", item.run, real_config(item.position, **data))
    assert all(record.readable for record in find_records(rows, tmp_path / "extrapolation").values())
    assert differences(rows, tmp_path / "extrapolation") == []


def test_a_config_of_another_version_is_compared_in_all_its_settings_and_that_is_said(found, tmp_path):
    found()
    path = tmp_path / "runs" / "t5_L64_s1" / "config.yaml"
    path.write_text(path.read_text() + "dialect: old\n")
    item, note = differences([row(position) for position in SCHEMES], tmp_path / "extrapolation")
    assert item.sentence == "dialect: unset in 3 runs; old in t5_L64_s1" and item.matters
    assert not note.matters and note.sentence == (
        "all settings compared, also those without effect: config.yaml of another version in t5_L64_s1"
    )


@pytest.mark.parametrize(
    "change, what, matters",
    [
        (dict(config=dict(optimizer__lr=0.001)), "optimizer.lr", True),
        (dict(config=dict(steps=601)), "steps", True),
        (dict(config=dict(compile=True)), "compile", False),
        (dict(environment={"commit": "fff"}), "commit of the training", True),
        (dict(config=dict(model__num_layers=5)), "model.num_layers", True),
        (dict(config=dict(attention__name="eager")), "attention.name", False),
        (dict(finished={"tokens_seen": 2_400_000}), "tokens seen in training", True),
        (dict(finished={"num_parameters": 1_008_192}), "parameters", False),
        (dict(finished={"num_parameters": 1_100_000}), "parameters", True),
        (dict(finished={"corpus": "facade"}), "training text (hash)", True),
        (dict(environment={"dirty": True}), "commit of the training", True),
        (dict(environment={"torch": "2.6"}), "environment: torch", False),
        (dict(rows=[row(), row("t5", corpus="facade")]), "validation text (hash)", True),
        (dict(rows=[row(), row("t5", commit="fff")]), "commit of the evaluation", True),
    ],
)
def test_each_difference_is_listed_with_its_runs(found, change, what, matters):
    (item,) = found(**change)
    assert (item.what, item.matters) == (what, matters)
    assert item.sentence.startswith(what + ": ") and "t5_L64_s1" in item.sentence


@pytest.mark.parametrize("stops", [True, False])
def test_a_run_that_ends_when_its_task_is_solved_is_not_unfair(stops, tmp_path):
    task = {"name": "sort", "stop_when_solved": stops}
    for position, tokens in (("alibi", 2_000_000), ("t5", 1_000_000)):
        write_run(tmp_path, f"{position}_L64_s1", real_config(position, task=task), {"tokens_seen": tokens})
    rows = [
        accuracy(position, 64, 0.9, folder=str(tmp_path / f"{position}_L64_s1")) for position in ("alibi", "t5")
    ]
    (item,) = [d for d in differences(rows, tmp_path / "extrapolation") if "tokens seen" in d.what]
    assert item.matters != stops


def test_parameters_of_the_scheme_itself_are_no_difference(found):
    own = dict(num_parameters=1_100_000, position_parameters=100_000)
    assert not found(finished=own)
    (item,) = found(finished=own | {"position_parameters": 30_000})
    assert item.matters and item.sentence == "parameters: 1,000,000 in 3 runs; 1,070,000 in t5_L64_s1"


def test_views_measured_at_different_times_are_no_difference(tmp_path):
    later = dict(commit="fff", split="test")
    found = differences([row(), row("t5"), row(**later), row("t5", **later)], tmp_path)
    assert not [d for d in found if "commit" in d.what]
    refused = row("learned", perplexity=None, commit="fff")
    assert not [d for d in differences([row(), refused], tmp_path) if d.what == "commit of the evaluation"]
    (item,) = [d for d in differences([row(), row("t5", commit="fff")], tmp_path) if "commit" in d.what]
    assert item.matters


def test_several_differences_come_with_those_that_matter_first(found):
    items = found(config=dict(optimizer__lr=0.1), environment={"torch": "2.6"})
    assert [item.matters for item in items] == [True, False]
    assert items[0].sentence == "optimizer.lr: 0.003 in 3 runs; 0.1 in t5_L64_s1"


def test_runs_without_a_config_are_named_not_passed_over(tmp_path):
    write_run(tmp_path / "runs", "alibi_L64_s1", real_config("alibi"))
    (item,) = differences([row(), row("t5")], tmp_path / "extrapolation")
    assert item.sentence == "settings not compared: no config.yaml at hand in t5_L64_s1" and not item.matters


def test_run_folders_are_found_beside_and_below_the_results(tmp_path):
    rows = [row(), row("t5"), row("none", changes={"position.scaling": "yarn"})]
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
    with pytest.raises(ValueError, match=r"finished\.json"):
        differences([row()], tmp_path / "extrapolation")


@pytest.mark.parametrize(
    "way, other, matters",
    [("checkpoint", "last", True), ("precision", "bfloat16", True), ("attention", "eager", False)],
)
def test_rows_that_were_computed_in_another_way_are_named(way, other, matters, found):
    usual = {"checkpoint": "best", "precision": "float32", "attention": "sdpa"}
    rows = [row("alibi", extra=usual), row("rotary", extra=usual | {way: other}), row("t5")]
    (difference,) = found(rows=rows)
    assert difference.what == f"{way} of the evaluation" and difference.matters is matters
    assert difference.values == {usual[way]: ["alibi_L64_s1"], other: ["rotary_L64_s1"]}


def test_seeds_of_one_recipe_share_its_words_and_others_differ_in_words(tmp_path):
    made = {
        "alibi_L64_s1": {},
        "alibi_L64_s2": dict(seed=2, measurements=["analyse view=last"], data__cache_dir="elsewhere", keep_last=3),
        "alibi_L64_s3_0f3a9c21": dict(seed=3, evaluation__lengths=[16]),
        "alibi_L64_s1_a1f069d5": dict(position__learned_slopes=True),
        "alibi_L64_s2_a1f069d5": dict(position__learned_slopes=True, seed=2),
        "alibi_L64_s1_bbbbbbbb": dict(optimizer__lr=0.002, clip_norm=0.0, model__activation="relu"),
    }
    for name, changes in made.items():
        write_run(tmp_path / "runs", name, real_config("alibi", **changes))
    rows = [row(run=name, seed=int(name[11])) for name in made]
    found = recipes(rows, find_records(rows, tmp_path / "extrapolation"))
    assert list(found.values()).count("") == 3 and found["alibi_L64_s3_0f3a9c21"] == ""
    assert found["alibi_L64_s1_a1f069d5"] == found["alibi_L64_s2_a1f069d5"] == "learned_slopes"
    assert found["alibi_L64_s1_bbbbbbbb"] == "clip_norm 0, activation=relu, lr 0.002"


def test_of_equally_many_runs_those_with_the_schemes_defaults_are_meant(tmp_path):
    made = {"alibi_L64_s1_a1f069d5": {"position__learned_slopes": True}, "alibi_L64_s1_bbbbbbbb": {}}
    for name, changes in made.items():
        write_run(tmp_path / "runs", name, real_config("alibi", **changes))
    rows = [row(run=name) for name in made]
    words = recipes(rows, find_records(rows, tmp_path / "extrapolation"))
    assert words == {"alibi_L64_s1_a1f069d5": "learned_slopes", "alibi_L64_s1_bbbbbbbb": ""}


def test_what_combines_with_a_scheme_is_told_also_where_all_runs_have_it(tmp_path):
    for name in ("alibi_L64_s1", "alibi_L64_s2", "t5_L64_s1"):
        write_run(tmp_path / "runs", name, real_config(name.split("_")[0], query_scale={"name": "log_n"}))
    write_run(tmp_path / "runs", "rotary_L64_s1", real_config("rotary", query_scale={"name": "none"}))
    write_run(tmp_path / "runs", "none_L64_s1", real_config("none", positions_until=300))
    rows = [row(), row(seed=2), row("t5"), row("rotary"), row("none")]
    words = recipes(rows, find_records(rows, tmp_path / "extrapolation"))
    assert words["alibi_L64_s1"] == words["alibi_L64_s2"] == words["t5_L64_s1"] == "query_scale=log_n"
    assert words["rotary_L64_s1"] == "" and words["none_L64_s1"] == "positions_until 300"


def test_another_training_text_is_another_recipe(tmp_path):
    for name, corpus in (("alibi_L64_s1", "c0ffee"), ("alibi_L64_s2", "c0ffee"), ("alibi_L64_s3", "facade")):
        write_run(tmp_path / "runs", name, real_config("alibi", seed=int(name[-1])), {"corpus": corpus})
    rows = [row(seed=seed) for seed in (1, 2, 3)]
    words = recipes(rows, find_records(rows, tmp_path / "extrapolation"))
    assert words == {"alibi_L64_s1": "", "alibi_L64_s2": "", "alibi_L64_s3": "training text 2"}
