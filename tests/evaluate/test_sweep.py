"""Evaluation and analysis of trained runs: what they share, and what one bad run does to the others."""

import dataclasses
import json
import math
import shutil
from collections import Counter

import numpy as np
import pytest
import study_rows
import torch

import alibi_lm.evaluate.passes as passes_module
import alibi_lm.evaluate.sweep as sweep_module
from alibi_lm import checkpoint
from alibi_lm.attention import chosen_backend
from alibi_lm.distributed import World
from alibi_lm.evaluate import plan
from alibi_lm.evaluate.config import VIEWS, EvaluateConfig, EvaluateData
from alibi_lm.evaluate.plan import FailedRuns
from alibi_lm.evaluate.rows import curve_name, describe
from alibi_lm.evaluate.stream import LongStreamConfig, long_stream
from alibi_lm.evaluate.sweep import analyse, evaluate, log_curve
from alibi_lm.experiment import analyse_and_draw, evaluate_and_draw
from alibi_lm.files import require_writable
from alibi_lm.model.transformer import TransformerLM
from alibi_lm.results.documents import read_documents
from alibi_lm.results.rows import read_rows, write_rows
from alibi_lm.runs import load_config
from alibi_lm.tracking import Tracker, WandbConfig
from alibi_lm.train import train


@pytest.fixture
def scored(monkeypatch):
    """Labels of the passes that are really made."""
    made = []

    def record(*arguments, original=passes_module.score, **more):
        made.append(more.get("progress"))
        return original(*arguments, **more)

    monkeypatch.setattr(passes_module, "score", record)
    return made


def settings(**changes):
    return EvaluateConfig(**{"experiment": "smoke", "device": "cpu", "threads": 1} | changes)


def rows_of(**changes):
    return [row for row in evaluate(settings(**changes)) if row.run is not None]


# --- shared passes -------------------------------------------------------------------------------


def test_views_and_rows_share_their_passes_and_their_values(place, scored):
    files = list(analyse(settings(view="all", stride=2, every=9, last=2, key_gain=0.001, key_loss=99.0)))
    assert [file.name for file in files] == [f"{view}.json" for view in VIEWS]
    made = len(scored)
    rows = rows_of()
    rows_of(mode="sliding", stride=2, lengths=[4, 8, 16, 24])
    assert len(scored) == made > 20 and len(rows) == 12
    nats = {(row.run, row.inference_length): row.nats for row in rows}
    for file in (f for f in files if f.stem != "windows"):  # learned positions have no bound
        alibi, learned = json.loads(file.read_text())["series"]
        assert (alibi["runs"], learned["runs"]) == (["alibi_L8_s1", "alibi_L8_s2"], ["learned_L8_s1"])
        assert alibi["points"] and alibi["documents"] == 6
        assert {p.get("reason", "position=learned has 8 positions") for p in learned["points"]} == {
            "position=learned has 8 positions"
        }
        for point in alibi["points"] if file.stem == "position" else []:
            for run, mean in point["by_run"].items():
                assert mean == pytest.approx(nats[run, point["length"]] / alibi["tokens"], rel=1e-9)
    list(analyse(settings(view="decomposition", stride=2)))
    assert len(scored) == made and rows_of() == rows


def test_the_backend_is_that_of_the_model_and_auto_is_no_other_one(place, scored):
    row = rows_of(lengths=[8])[0]
    assert row.extra["attention"] == chosen_backend("auto")
    scored.clear()
    rows_of(lengths=[8], attention=row.extra["attention"])
    assert scored == []
    other = rows_of(lengths=[8], attention="eager")[0]
    assert len(scored) == 3 and other.extra["attention"] == "eager"
    rows_of(lengths=[8])  # results of both backends are kept
    assert len(scored) == 3


def test_a_checkpoint_is_read_once_for_all_lengths(place, monkeypatch):
    read = []

    def record(path, original=checkpoint.sha256_of):
        read.append(path.name)
        return original(path)

    monkeypatch.setattr(checkpoint, "sha256_of", record)
    rows_of()
    assert read.count("weights.safetensors") == 3


def test_another_precision_and_another_text_are_scored_anew(place, scored, tmp_path):
    runs = str(place / "runs" / "alibi_L8_s1")
    (first,) = rows_of(runs=runs, lengths=[8])
    (other,) = rows_of(runs=runs, lengths=[8], precision="bfloat16")
    assert len(scored) == 2 and other.extra["precision"] == "bfloat16" and other.nats != first.nats
    text = tmp_path / "text"
    text.mkdir()
    (text / "wiki.valid.tokens").write_text(" \n = A = \n \n w1 w2 w3 \n \n = B = \n \n w4 w5 w6 \n")
    data = EvaluateData(path=str(text), cache_dir=str(tmp_path / "cache"))
    (other,) = rows_of(runs=runs, lengths=[8], data=data)
    assert len(scored) == 3 and other.tokens < first.tokens
    assert len(read_rows(place / "extrapolation" / "results.jsonl")) == 3  # both texts, and the baseline of one


def test_changes_for_the_test_are_a_field_of_the_row(place, scored):
    changes = {"scaling": "linear", "factor": 2.0}
    (plain,), (changed,) = (rows_of(experiment="other", lengths=[8], position=p) for p in ({}, changes))
    assert changed.run == plain.run == "rotary_L8_s1" and plain.changes == {}
    assert changed.changes == {"position.scaling": "linear", "position.factor": 2.0}
    assert changed.nats != plain.nats and len(scored) == 2
    assert "rotary_L8_s1 position.factor=2.0 position.scaling=linear at 8: perplexity" in describe(changed)
    assert {row.key for row in read_rows("outputs/other/extrapolation/results.jsonl")} > {plain.key, changed.key}
    (file,) = analyse(settings(experiment="other", view="position", position=changes))
    (series,) = json.loads(file.read_text())["series"]
    assert series["changes"] == changed.changes and series["runs"] == ["rotary_L8_s1"]


def test_a_query_scale_is_switched_on_for_the_test(place):
    """A factor of 1 changes nothing but the row's name; another one does, and both are rows of their own."""
    plain, same, other = (
        rows_of(lengths=[16], runs="outputs/smoke/runs/alibi_L8_s1", query_scale=scale)[0]
        for scale in ({}, {"name": "constant", "factor": 1.0}, {"name": "log_n"})
    )
    assert plain.nats == same.nats != other.nats
    assert other.changes == {"query_scale.name": "log_n"}
    assert curve_name(other) == "alibi_L8_s1+query_scale=log_n"
    with pytest.raises(ValueError, match=r"position\.random_offset = True changes nothing in a run"):
        rows_of(lengths=[8], runs="outputs/smoke/runs/learned_L8_s1", position={"random_offset": True})
    with pytest.raises(ValueError, match=r"query_scale\.factor = -1"):
        rows_of(lengths=[16], query_scale={"name": "constant", "factor": -1.0})


def test_an_earlier_checkpoint_has_rows_of_its_own(place):
    runs = str(place / "runs" / "alibi_L8_s1")
    (best,), (same,) = (rows_of(runs=runs, lengths=[8], checkpoint=which) for which in ("best", "step:4"))
    assert same.changes == {"checkpoint": "step:4"} and same.key != best.key and same.nats == best.nats
    with pytest.raises(ValueError, match=r"no whole step:3 checkpoint\. Steps that lie here: 4\."):
        rows_of(runs=runs, checkpoint="step:3")


# --- rows ----------------------------------------------------------------------------------------


def test_rows_have_what_they_depend_on_and_their_sums_per_document(place):
    rows_of()
    rows_of(lengths=[8], mode="sliding", stride=4)
    rows = {row.key: row for row in read_rows(place / "extrapolation" / "results.jsonl") if row.run}
    valued = {key for key, row in rows.items() if row.nats is not None}
    sums = read_documents(place / "extrapolation")
    assert set(sums) == valued and len(rows) == 15 and len(valued) == 13
    for key, row in rows.items():
        assert (row.task, row.metric, row.n, row.value) == ("text", "perplexity", row.tokens, row.perplexity)
        assert row.folder == f"outputs/smoke/runs/{row.run}" and len(row.run_id) == 12 and row.changes == {}
        assert {"checkpoint": "best", "precision": "float32", "documents": 6}.items() <= row.extra.items()
        if key in valued:
            assert sums[key].nats.sum() == pytest.approx(row.nats, abs=1e-5) and len(sums[key].nats) == 6
            assert sums[key].tokens.sum() == row.tokens
        else:
            assert row.reason == "position=learned has 8 positions"
    assert len({row.run_id for row in rows.values()}) == 3
    assert (place / "extrapolation" / "results.csv").exists()


def test_one_baseline_for_each_text(place, tmp_path, trained_runs):
    text = tmp_path / "text"
    text.mkdir()
    for split in ("train", "valid", "test"):
        lines = (trained_runs / f"wiki.{split}.tokens").read_text().split("\n")
        (text / f"wiki.{split}.tokens").write_text("\n".join(lines[: len(lines) // 2]) + "\n")
    output = str(tmp_path / "results")
    rows_of(runs=str(place / "runs" / "alibi_L8_s1"), lengths=[8], output_dir=output)
    config = load_config(place / "runs" / "alibi_L8_s2")
    train(dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(text))), tmp_path / "other")
    rows_of(runs=str(tmp_path / "other"), lengths=[4], output_dir=output)
    rows = read_rows(tmp_path / "results" / "results.jsonl")
    baselines = {row.corpus: row.perplexity for row in rows if row.run is None}
    assert set(baselines) == {row.corpus for row in rows if row.run} and len(set(baselines.values())) == 2


def test_a_relative_path_that_means_another_text_elsewhere(place, tmp_path, trained_runs, monkeypatch):
    folders = [tmp_path / "where_it_was_trained", tmp_path / "elsewhere"]
    for folder in folders:
        (folder / "text").mkdir(parents=True)
        for split in ("train", "valid", "test"):
            shutil.copy(trained_runs / f"wiki.{split}.tokens", folder / "text")
    shorter = folders[1] / "text" / "wiki.valid.tokens"
    shorter.write_text("".join(shorter.read_text().splitlines(keepends=True)[:12]))
    run = tmp_path / "alibi_L8_s1"
    shutil.copytree(place / "runs" / "alibi_L8_s1", run)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(f"path: {trained_runs}\n", "path: text\n"))
    of_run = {"runs": str(run), "lengths": [8], "output_dir": str(tmp_path / "results")}
    monkeypatch.chdir(folders[0])
    (own,) = rows_of(**of_run)

    monkeypatch.chdir(folders[1])
    with pytest.raises(ValueError, match=r"data\.path = text in .*config\.yaml leads from here to another valid"):
        rows_of(**of_run)
    with pytest.raises(ValueError, match=r"leads from here to another valid"):
        next(long_stream(LongStreamConfig(str(run), 8, 8, "validation", cache="full", threads=1)))
    (other,) = rows_of(**of_run, data=EvaluateData(path="text"))
    assert other.tokens < own.tokens
    (again,) = rows_of(**of_run, data=EvaluateData(path=str(folders[0] / "text")))
    assert again.nats == own.nats

    # Nor is the baseline made from another training text: in the third folder only that one differs.
    shutil.copytree(folders[0] / "text", tmp_path / "third" / "text")
    training = tmp_path / "third" / "text" / "wiki.train.tokens"
    training.write_text("".join(training.read_text().splitlines(keepends=True)[:-1]))
    for folder, baselines in ((folders[0], [None]), (tmp_path / "third", [])):
        monkeypatch.chdir(folder)
        of_run["output_dir"] = f"results_{len(baselines)}"
        assert [row.run for row in evaluate(settings(**of_run))] == [*baselines, own.run]


@pytest.mark.parametrize("mode", [{}, {"mode": "sliding", "stride": 4}])
def test_a_length_that_the_text_does_not_have_is_no_measured_point(place, scored, mode):
    runs = str(place / "runs" / "alibi_L8_s1")
    short, long = rows_of(runs=runs, lengths=[8, 10**9], **mode)
    assert short.value and long.value is long.nats is None and len(scored) == 1
    assert long.reason == f"the split has {short.tokens:,} tokens: no window of 1,000,000,000 is full"
    assert "not evaluated, the split has" in describe(long)
    assert set(read_documents(place / "extrapolation")) == {short.key}


MEMORY = [
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you "),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB."),
    MemoryError(),
]


def failing(monkeypatch, length, error):
    """Passes at a length raise an error."""

    def raising(*arguments, original=passes_module.score, **more):
        if more["progress"].endswith(f"@ {length}"):
            raise error
        return original(*arguments, **more)

    monkeypatch.setattr(passes_module, "score", raising)


@pytest.mark.parametrize("error", MEMORY, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("length", [8, 16])  # 8: also the length of the check against the training's validation
def test_a_length_that_does_not_fit_into_the_memory_stops_no_other(place, monkeypatch, error, length):
    failing(monkeypatch, length, error)
    rows = [row for row in rows_of(lengths=[4, length, 24]) if row.position == "alibi"]
    assert [(row.inference_length, row.nats is None) for row in rows] == [
        (4, False),
        (length, True),
        (24, False),
    ] * 2
    said = str(error).strip() or "no details"
    assert {row.reason for row in rows if row.nats is None} == {f"out of memory at {length} tokens: {said}"}
    assert {row.key for row in rows} <= {row.key for row in read_rows(place / "extrapolation" / "results.jsonl")}
    monkeypatch.undo()
    monkeypatch.chdir(place.parent.parent)
    assert all(row.nats for row in rows_of(lengths=[4, length, 24]) if row.position == "alibi")


def test_other_errors_of_a_pass_and_memory_with_several_processes_end_the_work(place, monkeypatch):
    failing(monkeypatch, 16, RuntimeError("a bug of ours"))
    with pytest.raises(RuntimeError, match="a bug of ours"):
        rows_of(lengths=[16])
    monkeypatch.setattr(passes_module, "gather_objects", lambda value, world: [value])
    failing(monkeypatch, 16, MEMORY[0])
    with pytest.raises(passes_module.OutOfMemory, match="out of memory at 16 tokens"):
        list(evaluate(settings(lengths=[16]), World(rank=0, world_size=2)))


def test_a_model_that_does_not_fit_into_the_memory_is_that_runs_failure(place, monkeypatch):
    def loading(folder, original=plan.load_run, **more):
        if folder.name == "alibi_L8_s1":
            raise MEMORY[1]
        return original(folder, **more)

    monkeypatch.setattr(plan, "load_run", loading)
    with pytest.raises(FailedRuns, match="alibi_L8_s1: out of memory when its model was loaded: CUDA out of"):
        rows_of(lengths=[4])


@pytest.mark.parametrize("lengths", [[16, 4], [16, 24, 4]])
def test_a_length_that_the_scheme_refuses_stops_no_other(place, monkeypatch, lengths):
    """As xpos refuses sequences for which its factors leave the range of floats."""

    def build(model, original=TransformerLM._build_schemes):
        if model.shape.context_length in (16, 24):
            raise ValueError(f"position=xpos and a sequence of {model.shape.context_length} tokens")
        return original(model)

    monkeypatch.setattr(TransformerLM, "_build_schemes", build)
    for _ in range(2):
        rows = rows_of(runs=str(place / "runs" / "alibi_L8_s1"), lengths=lengths)
        assert [row.inference_length for row in rows] == lengths and rows[-1].nats
        for row in rows[:-1]:
            assert row.nats is None
            assert row.reason == f"position=xpos and a sequence of {row.inference_length} tokens"


def test_a_text_of_one_document_says_why_there_are_no_intervals(place, tmp_path):
    (tmp_path / "wiki.valid.tokens").write_text("\n".join(f" w{k % 7} w{k % 5} w3 " for k in range(20)) + "\n")
    data = EvaluateData(path=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    runs = str(place / "runs" / "alibi_L8_s1")
    (row,) = rows_of(runs=runs, lengths=[8], data=data)
    assert row.extra["documents"] == 1 and "one document" in row.extra["note"]
    (file,) = analyse(settings(runs=runs, view="position", data=data))
    assert "one document" in json.loads(file.read_text())["series"][0]["note"]


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("draw", [evaluate_and_draw, analyse_and_draw])
def test_an_output_folder_that_cannot_be_written_is_refused_before_the_work(
    place, tmp_path, scored, monkeypatch, exists, draw
):
    """The system is made to refuse, because root may write everywhere."""
    folder = tmp_path / "closed"
    if exists:
        folder.mkdir()

    def refuse(dir):
        assert dir == (folder if exists else tmp_path)
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("alibi_lm.files.tempfile.TemporaryFile", refuse)
    view = "curve" if draw is evaluate_and_draw else "position"
    with pytest.raises(ValueError, match=r"output_dir = .*closed cannot be written \(Permission denied\)\. Give"):
        draw(settings(lengths=[4], output_dir=str(folder), view=view))
    assert scored == [] and folder.exists() == exists and not (exists and list(folder.iterdir()))


def test_nothing_stays_of_the_question_whether_a_folder_can_be_written(tmp_path):
    require_writable(tmp_path)
    require_writable(tmp_path / "new" / "folder")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"output_dir = .*file/folder cannot be written"):
        require_writable(tmp_path / "file" / "folder")


# --- one bad run among others --------------------------------------------------------------------


def swap(folder):
    shutil.rmtree(folder / "checkpoints")
    shutil.copytree(folder.parent / "alibi_L8_s2" / "checkpoints", folder / "checkpoints")


def bad_config(folder):
    (folder / "config.yaml").write_text("steps: [")


@pytest.mark.parametrize("harm", [swap, bad_config])
def test_a_bad_run_stops_no_other_and_is_told_of_at_the_end(place, harm):
    harm(place / "runs" / "alibi_L8_s1")
    rows = []
    with pytest.raises(FailedRuns, match="1 of 3 runs could not be evaluated; the others were") as failed:
        rows.extend(evaluate(settings(lengths=[4, 8])))
    assert list(failed.value.failures) == ["alibi_L8_s1"] and "alibi_L8_s1: " in str(failed.value)
    assert {row.run for row in rows} == {None, "alibi_L8_s2", "learned_L8_s1"}
    assert {row.run for row in read_rows(place / "extrapolation" / "results.jsonl")} == {row.run for row in rows}
    assert (place / "extrapolation" / "results.csv").exists()
    files = []
    with pytest.raises(FailedRuns):
        files.extend(analyse(settings(view="position")))
    assert [s["runs"] for s in json.loads(files[0].read_text())["series"]] == [["alibi_L8_s2"], ["learned_L8_s1"]]
    with pytest.raises(ValueError) as alone:
        rows_of(runs=str(place / "runs" / "alibi_L8_s1"))
    assert not isinstance(alone.value, FailedRuns)


def test_of_several_processes_one_that_cannot_go_on_ends_the_work(place):
    """It must not turn to its next run: the others wait for it in this one."""
    swap(place / "runs" / "alibi_L8_s1")
    with pytest.raises(ValueError) as alone:
        list(evaluate(settings(lengths=[4]), World(rank=0, world_size=2)))
    assert not isinstance(alone.value, FailedRuns) and not (place / "extrapolation" / "results.jsonl").exists()


def test_weights_that_lack_the_recorded_validation_loss_are_refused_before_a_row_is_written(place, monkeypatch):
    """Also where nothing else tells: a run of an earlier version, whose files name no run."""
    folder = place / "runs" / "alibi_L8_s1"
    done = json.loads((folder / "finished.json").read_text())
    done["best_validation_loss"] += 0.01
    for path in (folder / "finished.json", folder / "checkpoints" / "best.json"):
        content = json.loads(path.read_text()) | {"best_validation_loss": done["best_validation_loss"]}
        path.write_text(json.dumps(content))
    monkeypatch.setattr("alibi_lm.load.require_own_files", lambda *_: None)
    with pytest.raises(ValueError, match=r"recorded \d.*not the weights of this run"):
        rows_of(runs=str(folder))
    assert not (place / "extrapolation" / "results.jsonl").exists()
    rows_of(runs=str(folder), lengths=[4])  # nothing to compare with at another length
    rows_of(runs=str(folder), lengths=[8], split="test")


def test_a_diverged_run_keeps_its_nats_and_has_no_perplexity(place, monkeypatch):
    def scaled(*arguments, original=passes_module.score, **more):
        found = original(*arguments, **more)
        return found._replace(nats=found.nats * np.float32(1000))

    monkeypatch.setattr(passes_module, "score", scaled)
    monkeypatch.setattr(plan, "_check_validation", lambda *_: None)
    rows = rows_of(lengths=[8])
    assert len(rows) == 3
    for row in rows:
        assert row.loss > 1000 and row.perplexity is row.value is row.word_perplexity is None
        assert row.reason == f"exp({row.loss:.6g}) is too large for a number"
        assert f"{row.loss:.4f} nats per token, no perplexity, exp(" in describe(row)
    assert len(read_documents(place / "extrapolation")) == 3


def test_lines_without_blanks_have_a_perplexity_and_no_word_perplexity(place, monkeypatch):
    def few_words(*arguments, original=plan.prepare, **more):
        corpus = original(*arguments, **more)
        corpus.split("validation").words = 1
        return corpus

    monkeypatch.setattr(plan, "prepare", few_words)
    rows = list(evaluate(settings(lengths=[8])))
    assert {row.position for row in rows} == {"unigram", "alibi", "learned"}
    for row in rows:
        assert row.value == row.perplexity == pytest.approx(math.exp(row.nats / row.tokens))
        assert row.nats > 710 and row.word_perplexity is None
        assert row.reason.startswith("word_perplexity is null: exp(")


# --- two runs of one name ------------------------------------------------------------------------


def test_two_folders_of_one_name_are_refused_naming_both(place, tmp_path, scored):
    shutil.copytree(place / "runs" / "alibi_L8_s1", tmp_path / "expB" / "runs" / "alibi_L8_s1")
    shutil.copytree(place / "runs" / "alibi_L8_s1", tmp_path / "expA" / "runs" / "alibi_L8_s1")
    for action in (evaluate, analyse):
        view = "curve" if action is evaluate else "position"
        with pytest.raises(ValueError, match="expA/runs/alibi_L8_s1 and expB/runs/alibi_L8_s1 have the same name"):
            list(action(settings(runs="exp*/runs/*", view=view)))
    assert scored == []


def test_rows_of_another_run_of_the_same_name_are_refused_before_work(place, tmp_path, scored):
    other = tmp_path / "other" / "alibi_L8_s1"
    other.parent.mkdir()
    (place / "runs" / "alibi_L8_s2").rename(other)
    output = str(tmp_path / "results")
    first = rows_of(runs=str(place / "runs" / "alibi_L8_s1"), lengths=[8], output_dir=output)
    before = (tmp_path / "results" / "results.jsonl").read_bytes()
    scored.clear()
    with pytest.raises(ValueError, match=r"rows of .*smoke/runs/alibi_L8_s1 .*other/alibi_L8_s1 .*another run"):
        rows_of(runs=str(other), lengths=[4], output_dir=output)
    assert scored == [] and (tmp_path / "results" / "results.jsonl").read_bytes() == before
    # The same run in a folder that was moved is no other one, and a run trained anew replaces its old rows.
    moved = tmp_path / "moved" / "alibi_L8_s1"
    moved.parent.mkdir()
    (place / "runs" / "alibi_L8_s1").rename(moved)
    assert [r.nats for r in rows_of(runs=str(moved), lengths=[8], output_dir=output)] == [r.nats for r in first]
    shutil.rmtree(moved)
    other.rename(moved)
    (again,) = rows_of(runs=str(moved), lengths=[4], output_dir=output)
    rows = [row for row in read_rows(tmp_path / "results" / "results.jsonl") if row.run]
    assert [(row.run_id, row.inference_length) for row in rows] == [(again.run_id, 4)]


# --- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"view": "positions"}, "view = 'positions'. Allowed: curve, perplexity, position"),
        (
            {"view": "position", "stride": 4},
            "stride = 4 has no effect with view=position. It belongs to view=curve",
        ),
        (
            {"view": "last", "contexts": [4]},
            "contexts = [4] has no effect with view=last. It belongs to view=fixed",
        ),
        ({"view": "perplexity", "mode": "sliding"}, "mode = sliding has no effect with view=perplexity"),
        ({"view": "all", "task": "text"}, "task = text has no effect with view=all. It belongs to view=curve"),
        ({"view": "windows", "tracking": WandbConfig()}, "tracking = wandb has no effect with view=windows"),
        ({"last": 3}, "last = 3 has no effect with view=curve. It belongs to view=last."),
        ({"view": "fixed", "every": 0}, "every = 0. Use a whole number >= 1"),
        ({"view": "offset", "offsets": [-1]}, "offsets = [-1]. Use whole numbers >= 0"),
        ({"lengths": []}, "lengths = []. Name some, quoted: 'lengths=[64,128]'"),
        ({"runs": ""}, "runs is empty"),
        ({"checkpoint": "step:x"}, "checkpoint = 'step:x'. Allowed: best, last, step:<number>"),
        ({"split": "train"}, "split = 'train'. Allowed: validation, test"),
        ({"mode": "items"}, "mode = 'items'. Allowed: nonoverlapping, sliding"),
        ({"cache": "proved"}, "cache = proved with mode=None. It belongs to mode=stream"),
        ({"mode": "stream", "lengths": [8]}, "which has one window: the whole split"),
        ({"mode": "stream", "cache": "lru"}, "cache = 'lru'. Allowed: full, proved, certified, window"),
        ({"mode": "stream", "cache": "window", "window": 0}, "window = 0. Use a whole number >= 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes, message):
    with pytest.raises(ValueError) as error:
        EvaluateConfig(**changes)
    assert message in str(error.value)


def test_each_command_has_its_own_views():
    with pytest.raises(ValueError, match=r"view = position is a view of scripts/analyse\.py"):
        next(evaluate(EvaluateConfig(view="position")))
    with pytest.raises(ValueError, match=r"view = curve is what scripts/evaluate\.py computes"):
        next(analyse(EvaluateConfig()))


def test_perplexity_and_accuracy_each_have_a_table_in_wandb(tmp_path, monkeypatch):
    class Recorder(Tracker):
        tables, values = {}, {}

        def table(self, name, columns, rows, line_plot):
            self.tables[name] = [dict(zip(columns, one, strict=True)) for one in rows], line_plot

        def summary(self, values):
            self.values |= values

    monkeypatch.setattr(sweep_module, "open_tracker", lambda *given: Recorder())
    rows = [study_rows.row(length=128), study_rows.row("learned", 128, None)]
    rows += [study_rows.accuracy("alibi", 64, 0.25), study_rows.accuracy("learned", 128, None)]
    write_rows(tmp_path / "results.jsonl", rows)
    log_curve(settings(tracking=WandbConfig(), output_dir=str(tmp_path)))
    assert {name: (len(body), plot[1]) for name, (body, plot) in Recorder.tables.items()} == {
        "extrapolation": (1, "perplexity"), "accuracy": (1, "accuracy"),
    }  # fmt: skip
    (text,), (task,) = (Recorder.tables[name][0] for name in ("extrapolation", "accuracy"))
    assert (text["curve"], text["perplexity"]) == ("alibi_L64_s1", pytest.approx(20))
    assert (task["curve"], task["task"], task["accuracy"]) == ("alibi_L64_s1 copy", "copy", 0.25)
    assert Recorder.values["accuracy/alibi_L64_s1 copy@64"] == 0.25


def test_the_baseline_knows_how_often_each_token_is_in_the_training_text(place):
    run = place / "runs" / "alibi_L8_s1"
    corpus = plan.prepare(load_config(run).data, plan.run_tokenizer(run), splits=("train", "validation"))
    counts = Counter(corpus.split("train").tokens.tolist())
    size, total = corpus.vocab_size, corpus.split("train").tokens.size
    tokens = corpus.split("validation").tokens.tolist()
    nats = math.fsum(-math.log((counts[token] + 1) / (total + size)) for token in tokens)
    (row,) = (row for row in evaluate(settings(lengths=[8])) if row.run is None)
    assert row.nats == pytest.approx(nats, rel=1e-12) and row.tokens == len(tokens)
