"""Changes for the test: tuned on one split, scored on the other, against passes that are made here by hand."""

import math

import numpy as np
import pytest
import torch

from alibi_lm import load_run
from alibi_lm.evaluate import changes
from alibi_lm.evaluate.changes import ChangesConfig, candidates, change_and_evaluate
from alibi_lm.evaluate.config import EvaluateConfig, EvaluateData
from alibi_lm.evaluate.plan import open_run, plan
from alibi_lm.evaluate.sweep import evaluate
from alibi_lm.experiment import change_and_draw
from alibi_lm.results.rows import read_rows


def settings(run: str, **more):
    return ChangesConfig(f"outputs/{run}", experiment="smoke", device="cpu", threads=1, lengths=[16], **more)


@pytest.fixture
def tried(monkeypatch):
    """Let only these changes, and these temperatures, be tried beside the crop."""

    def choose(*names, temperature=()):
        scales = [{"query_scale": {"name": "constant", "factor": factor}} for factor in temperature]

        def chosen(run, length):
            own = candidates(run, length)
            return {name: own[name] for name in names} | ({"temperature": scales} if scales else {})

        monkeypatch.setattr(changes, "candidates", chosen)

    return choose


def evaluated(run: str, split: str, **changes) -> float:
    """The same by the evaluator's own command."""
    config = EvaluateConfig(
        runs=f"outputs/{run}", split=split, lengths=[16], device="cpu", threads=1, output_dir="other", **changes
    )
    return next(row.nats for row in evaluate(config) if row.run is not None)


def test_the_value_with_the_lowest_validation_loss_is_scored_on_the_test_split(place, tried):
    run = "other/runs/rotary_L8_s1"
    config, names = load_config(run), {"unchanged", "log n", "SSMax", "temperature"}
    names |= {"position interpolation", "NTK", "dynamic NTK", "NTK by parts", "YaRN"}
    assert set(candidates(config, 16)) == names
    tried("unchanged", "YaRN", "temperature")
    rows = {row.extra["change"]: row for row in change_and_evaluate(settings(run))}
    assert set(rows) == {"unchanged", "YaRN", "temperature", "crop to L"}
    assert {row.split for row in rows.values()} == {"test"}
    for name in ("YaRN", "temperature"):
        values = candidates(config, 16)[name]
        losses = [evaluated(run, "validation", **value) for value in values]
        best = values[int(np.argmin(losses))]
        assert rows[name].changes == {f"{group}.{k}": v for group, own in best.items() for k, v in own.items()}
        assert rows[name].nats == evaluated(run, "test", **best)
        assert rows[name].extra["values_tried"] == len(values) and rows[name].extra["tuned_on"] == "validation"
    assert rows["unchanged"].nats == evaluated(run, "test") and rows["unchanged"].changes == {}
    assert "ALiBi interpolation: changes of another scheme" in rows["unchanged"].extra["untried"]


def load_config(run: str):
    return plan(EvaluateConfig(runs=f"outputs/{run}", lengths=[16]))[0][0].config


def test_the_crop_gives_each_target_the_last_tokens_of_its_window(place, tried):
    tried()
    run = "smoke/runs/alibi_L8_s1"
    (row,) = change_and_evaluate(settings(run))
    evaluation = EvaluateConfig(runs=f"outputs/{run}", split="test", lengths=[16], device="cpu", threads=1)
    text = open_run(evaluation, plan(evaluation)[0][0], torch.device("cpu")).passes.text
    model, total = load_run(f"outputs/{run}"), 0.0
    stream = np.concatenate([[text.start_id], text.tokens]).astype(np.int64)
    for target in range(len(text.tokens)):
        first = max(target // 16 * 16, target - 7)
        ids = torch.from_numpy(stream[first : target + 2])[None]
        total += float(model.score(ids[:, :-1], ids[:, 1:], score_from=target - first).nats)
    assert row.changes == {"crop": 8} and row.nats == pytest.approx(total, rel=1e-6)
    unchanged = evaluated(run, "test")
    assert abs(row.nats - unchanged) > 1e-4


def test_what_cannot_run_at_a_length_says_why_and_the_crop_runs_all_the_same(place, capsys):
    change_and_draw(settings("smoke/runs/learned_L8_s1"))
    printed = capsys.readouterr().out
    assert "learned_L8_s1 at 16: not evaluated, position=learned has 8 positions" in printed
    table = (place / "test_time" / "table.md").read_text()
    assert "## learned, trained at 8 (learned_L8, seed 1)" in table and table in printed
    lines = {line.split("|")[1].strip(): line.split("|")[2].strip() for line in table.splitlines() if "|" in line}
    assert lines["unchanged"] == lines["SSMax"] == "- [1]" and lines["crop to L"].startswith("**")
    assert "[1] position=learned has 8 positions" in table


def test_seeds_share_a_table_and_the_signs_are_those_of_the_paired_intervals(place, tried):
    tried("unchanged")
    change_and_draw(settings("smoke/runs/alibi_L8_s*"))
    rows = read_rows("outputs/smoke/test_time/results.jsonl")
    table = (place / "test_time" / "table.md").read_text()
    assert table.count("## ") == 1 and "(alibi_L8, seed 1, 2)" in table
    both = [row.loss for row in rows if row.extra["change"] == "unchanged"]
    cell = next(line.split("|")[2].strip() for line in table.splitlines() if line.startswith("| unchanged"))
    assert f"{math.exp(sum(both) / 2):.2f}" in cell and len(both) == 2


@pytest.mark.parametrize(
    ("run", "changes", "message"),
    [
        ("smoke/runs/alibi_L8_s1", {"lengths": [8]}, "Give lengths above its train_length = 8"),
        ("smoke/runs/none", {}, "matches no folder"),
    ],
)
def test_what_means_nothing_is_refused(place, run, changes, message):
    with pytest.raises(ValueError, match=message):
        list(change_and_evaluate(ChangesConfig(f"outputs/{run}", device="cpu", **changes)))


def test_another_text_is_encoded_by_the_tokenizer_of_the_run(place, write_text, tmp_path, tried):
    tried("unchanged")
    folder = write_text(tmp_path / "other_text")
    (folder / "wiki.train.tokens").unlink()  # from which a new tokenizer would be built
    run, data = "smoke/runs/alibi_L8_s1", EvaluateData(name="wikitext103", path=str(folder))
    (row,) = [r for r in change_and_evaluate(settings(run, data=data)) if r.extra["change"] == "unchanged"]
    assert row.nats == evaluated(run, "test", data=data)


def test_another_checkpoint_has_a_table_of_its_own(place, tried):
    tried(temperature=(0.5, 2.0))
    for checkpoint in ("best", "step:4"):
        change_and_draw(settings("smoke/runs/alibi_L8_s1", checkpoint=checkpoint))
    rows, text = read_rows("outputs/smoke/test_time/results.jsonl"), (place / "test_time" / "table.md").read_text()
    assert len(rows) == 4 and [row.changes.get("crop") for row in rows].count(8) == 2
    assert "(alibi_L8, seed 1)\n" in text and "(alibi_L8, seed 1, step:4)\n" in text


def test_a_value_that_was_chosen_earlier_is_no_second_seed(place, tried):
    for factors in ((0.5, 0.25), (2.0, 4.0)):
        tried(temperature=factors)
        change_and_draw(settings("smoke/runs/alibi_L8_s1"))
    (row,) = [r for r in read_rows("outputs/smoke/test_time/results.jsonl") if r.extra["change"] == "temperature"]
    factor = row.changes["query_scale.factor"]
    (line,) = [line for line in (place / "test_time" / "table.md").read_text().splitlines() if "| temp" in line]
    assert factor >= 2 and f"{row.perplexity:.2f}" in line and f"({factor:.3g})" in line
