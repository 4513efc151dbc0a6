"""Shapes are compared at equal multiples of the training length, and can disagree."""

import pytest
from study_rows import curve, paper_rows

from alibi_lm.study.shapes import direction, shapes, shapes_markdown


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
    assert {(s.position, s.factor) for s in found} == {(s, k) for s in schemes for k in paper_at}
    assert all(s.same and s.ours == pytest.approx(s.paper) for s in found)
    at_2 = {s.position: s for s in found if s.factor == 2}
    assert at_2["sinusoidal"].paper == pytest.approx(43.54 / 20.05, abs=1e-3)
    assert direction(at_2["t5"].paper) == "better" and direction(at_2["rotary"].paper) == "worse"


def test_a_curve_that_goes_the_other_way_is_not_the_same():
    rows = curve("alibi", {64: 20.0, 128: 30.0, 512: 20.1}) + curve("sinusoidal", {64: 20.0, 128: 19.0})
    found = {(s.position, s.factor): s for s in shapes(rows)}
    assert not any(s.same for s in found.values()) and len(found) == 3
    text = shapes_markdown(found.values())
    assert "| ALiBi | 2 L | 0.953 (1,024) | 1.500 (L = 64) | no: better, worse |" in text
    assert "no: better, flat" in text and "no: worse, better" in text


def test_what_the_paper_has_not_is_left_out():
    rows = curve("none", {64: 20.0, 128: 21.0}) + curve("alibi", {64: 20.0, 100: 21.0, 192: 20.0, 32: 22.0})
    rows += curve("alibi", {64: 20.0, 128: 21.0}, split="test")
    assert shapes(rows) == [] and shapes_markdown([]) == ""


@pytest.mark.parametrize("ratio, word", [(0.98, "better"), (0.991, "flat"), (1.009, "flat"), (1.02, "worse")])
def test_directions(ratio, word):
    assert direction(ratio) == word
