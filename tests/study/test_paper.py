"""The paper's tables are whole and agree with each other, and ours are set beside the right numbers."""

import math

import pytest
from study_rows import curve, paper_rows, row, run_script, unigram, write_run

from alibi_lm.results.curves import View, curves
from alibi_lm.results.rows import ResultRow, write_rows
from alibi_lm.study.evidence import Evidence
from alibi_lm.study.pages import markdown
from alibi_lm.study.paper import (
    SETTINGS,
    caveats,
    compare,
    comparison_page,
    direction,
    find,
    paper_curves,
    paper_values,
    shapes,
    shapes_table,
)
from alibi_lm.study.records import find_records

PLAIN = View("validation", "nonoverlapping")


def value(table, position, train, test, split="validation", stride=None):
    found = [
        v.perplexity
        for v in paper_values()
        if (v.table, v.position, v.train_length, v.inference_length, v.split, v.stride)
        == (table, position, train, test, split, stride)
    ]
    assert len(found) == 1, (table, position, train, test)
    return found[0]


def test_every_table_of_perplexities_is_there_in_full():
    counts = {}
    for item in paper_values():
        counts[item.table] = counts.get(item.table, 0) + 1
    # four schemes at 35, 35 and 33 lengths; the triangle of Table 5 with its 14 further values
    assert counts == {
        2: 140, 3: 140, 4: 132, 5: 50, 6: 10, 7: 21, 8: 9, 9: 6, 10: 13, 11: 4, 12: 12, 13: 10, 14: 10, 15: 10,
    }  # fmt: skip


def test_values_stand_where_they_belong():
    for args, expected in (
        ((2, "sinusoidal", 512, 1012), 43.54),
        ((2, "alibi", 512, 15512), 18.31),
        ((2, "t5", 512, 13512), None),
        ((3, "rotary", 1024, 2024), 31.17),
        ((4, "t5", 3072, 6072), 17.68),
        ((5, "alibi", 64, 3072), 21.53),
        ((5, "alibi", 1536, 2048), 17.90),
        ((5, "sinusoidal", 128, 128), 23.81),
        ((6, "alibi", 512, 3072, "test"), 19.08),
        ((7, "alibi", 3072, 3072, "test", 512), 17.66),
        ((8, "sinusoidal", 1024, 1024), 14.73),
        ((10, "alibi", 512, 3072, "validation", 512), 13.76),
        ((13, "sinusoidal", 512, 1024, "validation", 1), 204.42),
        ((14, "t5", 1024, 3072, "validation", 1), 20.66),
        ((15, "alibi", 512, 512, "validation", 1), 17.98),
    ):
        assert value(*args) == expected


def test_tables_agree_where_they_overlap():
    for table, length in ((2, 512), (3, 1024), (4, 3072)):
        for position in ("sinusoidal", "rotary", "t5", "alibi"):
            assert value(table, position, length, length) == value(5, position, length, length)
    for position in ("sinusoidal", "rotary", "t5", "alibi"):
        assert value(6, position, 3072, 3072) == value(5, position, 3072, 3072)


def test_columns_are_not_swapped():
    """At every length past the training length's reach the order of Figure 1 holds in each table."""
    for table, length, far in ((2, 512, 5512), (3, 1024, 8024), (4, 3072, 12072)):
        order = [value(table, name, length, far) for name in ("alibi", "t5", "rotary", "sinusoidal")]
        assert order == sorted(order)


def test_ours_stand_beside_the_papers_per_word():
    rows = [*curve("alibi", {512: 19.0, 1024: 18.0, 777: 18.5}, train=512), unigram()]
    found = {item.inference_length: item for item in compare(rows)}
    assert set(found) == {512, 1024}  # the paper has no 777
    word = [math.exp(math.log(v) * 10_000 / 8_000) for v in (19.0, 18.0)]
    assert found[512].ours == pytest.approx(word[0])
    assert found[512].paper == 19.73 and [v.table for v in found[512].values] == [2, 5]
    assert found[1024].our_ratio == pytest.approx(word[1] / word[0])
    assert found[1024].paper_ratio == pytest.approx(18.81 / 19.73)


def test_a_run_without_a_perplexity_per_word_takes_no_other_with_it():
    rows = curve("alibi", {512: 19.0}, train=512)
    long = dict(nats=5306.0 * 10_000, words=20, reason="exp(5306) is too large for a number")
    rows.append(row("t5", 512, None, train=512, **long))
    assert [item.curve.position for item in compare(rows)] == ["alibi"]
    assert "| ALiBi | 512 | 512 | 19.73 |" in markdown(comparison_page(Evidence(rows)))


def test_the_papers_curves_leave_out_what_it_did_not_measure():
    ours = curves(curve("t5", {512: 20.0}, train=512) + curve("none", {512: 20.0}, train=512), PLAIN)
    (found,) = paper_curves(ours, PLAIN)
    assert found.position == "t5" and max(found.losses) == 12512


def paper_config(**changes):
    import yaml

    nested = {"train_length": 512}
    for key, item in (SETTINGS | changes).items():
        place = nested
        *parents, last = key.split(".")
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = item
    return yaml.safe_dump(nested)


def real_row(**changes):
    nats = 217_646 * math.log(19.7)
    counts = dict(tokens=217_646, n=217_646, words=217_646, nats=nats, perplexity=19.7, value=19.7)
    counts |= dict(word_perplexity=19.7)
    if "tokens" in changes:
        changes |= dict(n=changes["tokens"], value=changes["perplexity"])
    return ResultRow(**(row(train=512, length=512).__dict__ | counts | changes))


PAPERS = {"tokens_seen": 286_000 * 73_728}
OTHER_TEXT = "not the original WikiText-103 training split (5 words, not 6)"


def trained_on(identity):
    return {"splits": {"train": {"identity": identity}}}


@pytest.mark.parametrize(
    "config, finished, corpus, changes, message",
    [
        ({}, PAPERS, trained_on("the original WikiText-103 training split"), {}, None),
        ({"model.num_layers": 4}, {}, None, {}, "model.num_layers = 4, the paper's 16"),
        ({"data.name": "wikitext2"}, {}, None, {}, "data.name = wikitext2, the paper's wikitext103"),
        ({}, {"tokens_seen": 2_108_620_800}, None, {}, "budget: 10.00% of the paper's training tokens"),
        ({}, {}, None, {}, "budget: tokens seen in training are not recorded for every run"),
        ({}, PAPERS, trained_on(OTHER_TEXT), {}, f"training text: {OTHER_TEXT}"),
        ({}, {}, None, {"tokens": 300_000, "perplexity": 19.7 ** (217_646 / 300_000)}, "tokens are not words"),
        (
            {},
            {},
            None,
            {"words": 9_000, "word_perplexity": None},
            "validation has 9,000 words, the paper's 217,646",
        ),
    ],
)
def test_each_difference_from_the_paper_is_said(tmp_path, config, finished, corpus, changes, message):
    rows = [real_row(**changes)]
    write_run(tmp_path / "runs", rows[0].run, paper_config(**config), finished, corpus=corpus)
    notes = caveats(rows, find_records(rows, tmp_path / "extrapolation"))
    assert any(message in note for note in notes) if message else notes == []


def test_the_script_prints_and_writes_the_comparison(tmp_path):
    rows = curve("alibi", {512: 19.0, 1024: 18.0}, train=512)
    write_rows(tmp_path / "results.jsonl", rows)
    done = run_script("compare_paper.py", f"folder={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "**These are not the paper's experiments.**" in done.stdout
    assert "| ALiBi | 512 | 512 | 19.73 | 2, 5 |" in done.stdout
    assert done.stdout == (tmp_path / "paper.md").read_text() + "\n"
    failed = run_script("compare_paper.py", f"folder={tmp_path}", "near=3")
    assert failed.returncode == 1 and "near = 3.0. Use a share from 0 to 0.1" in failed.stderr


def test_the_gain_vanishes_when_every_token_has_a_full_window():
    for length, longer in ((512, 3072), (1024, 3072)):
        blocks = value(5, "alibi", length, longer) / value(5, "alibi", length, length)
        sliding = value(15, "alibi", length, longer, stride=1) / value(15, "alibi", length, length, stride=1)
        assert blocks < 0.97 and sliding > 1.01


def at(shape):
    """Scheme and multiple of the training length."""
    return shape.curve.position, shape.inference_length // shape.curve.train_length


def test_the_paper_has_its_own_shapes():
    # It tested at 512 + 500 and so on: those stand for the multiples here, as they do in the comparison.
    table = {(r.position, r.train_length, r.inference_length): r for r in paper_rows() if r.mode != "sliding"}
    schemes = ("sinusoidal", "rotary", "t5")
    paper_at = {2: 1012, 8: 4512, 16: 8512}
    rows = []
    for scheme in schemes:
        values = {64: table[scheme, 512, 512].perplexity}
        values |= {64 * k: table[scheme, 512, n].perplexity for k, n in paper_at.items()}
        rows += curve(scheme, values)
    found = shapes(rows)
    assert {at(s) for s in found} == {(s, k) for s in schemes for k in paper_at}
    assert all(s.our_ratio == pytest.approx(s.paper_ratio) for s in found)
    at_2 = {s.curve.position: s.paper_ratio for s in found if at(s)[1] == 2}
    assert at_2["sinusoidal"] == pytest.approx(43.54 / 20.05, abs=1e-3)
    assert direction(at_2["t5"]) == "better" and direction(at_2["rotary"]) == "worse"


def test_a_curve_that_goes_the_other_way_is_not_the_same():
    rows = curve("alibi", {64: 20.0, 128: 30.0, 512: 20.1}) + curve("sinusoidal", {64: 20.0, 128: 19.0})
    found = {at(s): s for s in shapes(rows)}
    assert all(direction(s.our_ratio) != direction(s.paper_ratio) for s in found.values()) and len(found) == 3
    text = markdown([shapes_table(found.values())])
    assert "| ALiBi | 2 L | 0.953 (1,024) | 1.500 (L = 64) | no: better, worse |" in text
    assert "no: better, flat" in text and "no: worse, better" in text


def test_what_the_paper_has_not_is_left_out():
    rows = curve("none", {64: 20.0, 128: 21.0}) + curve("alibi", {64: 20.0, 100: 21.0, 192: 20.0, 32: 22.0})
    rows += curve("alibi", {64: 20.0, 128: 21.0}, split="test")
    assert shapes(rows) == []


def test_directions():
    assert [direction(ratio) for ratio in (0.98, 0.991, 1.009, 1.02)] == ["better", "flat", "flat", "worse"]


def test_where_alibi_is_not_the_best():
    assert value(5, "t5", 512, 512) < value(5, "alibi", 512, 512)
    better = [n for n in (64, 128, 256, 512, 1024, 1536, 2048, 3072)
              if value(5, "alibi", n, n) < value(5, "sinusoidal", n, n)]  # fmt: skip
    assert better == [256, 512, 1024, 1536, 2048, 3072]


def test_equal_time_and_equal_updates_disagree():
    assert value(11, "alibi", 1024, 2048) < value(11, "sinusoidal", 2048, 2048)
    assert value(12, "alibi", 1024, 2048) > value(12, "sinusoidal", 2048, 2048)


def test_longer_is_not_always_better_for_alibi():
    curve_of_512 = [value(12, "alibi", 512, n) for n in (512, 1024, 2048)]
    assert curve_of_512[1] == min(curve_of_512) and curve_of_512[2] > curve_of_512[1]


def test_no_gain_at_equal_length_in_the_large_model():
    for length in (512, 1024, 2048):
        assert value(12, "alibi", length, length) > value(12, "sinusoidal", length, length)


def test_find_is_exact_unless_near_is_asked_for():
    assert {(v.table, v.perplexity) for v in find("alibi", 512, 512, PLAIN)} == {(2, 19.73), (5, 19.73)}
    assert find("rotary", 512, 1024, PLAIN) == [] and find("t5", 512, 13512, PLAIN) == []  # out of memory
    assert find("rotary", 512, 2048, PLAIN, near=0.02) == []
    assert find("alibi", 512, 3072, View("validation", "sliding", 256)) == []
    (close,) = find("rotary", 512, 1024, PLAIN, near=0.02)
    assert (close.inference_length, close.perplexity) == (1012, 21.37)
    # those of the other corpora are never taken for WikiText-103
    assert {v.perplexity for v in find("alibi", 512, 1024, PLAIN)} == {18.81}


def test_a_number_of_a_near_length_stands_beside_ours_with_its_own_length():
    ours = Evidence(curve("rotary", {512: 20.0, 1024: 21.0}, train=512))
    assert "1024" not in markdown(comparison_page(ours)).partition("## Shapes")[0]
    assert "| rotary | 512 | 1024 (paper: 1012) | 21.37 | 2 |" in markdown(comparison_page(ours, 0.02))
