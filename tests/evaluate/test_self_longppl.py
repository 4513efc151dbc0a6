"""Self-LongPPL on models whose losses are known."""

import numpy as np
import pytest
import torch
from toy_models import Toy

from alibi_lm.evaluate import views
from alibi_lm.evaluate.passes import Passes
from alibi_lm.evaluate.self_longppl import finish, self_longppl
from alibi_lm.evaluate.store import TokenStore
from alibi_lm.evaluate.stream import descriptors
from alibi_lm.tasks.text import TextTask


class Reader(Toy):
    """A token costs 0.5 nats where the same token stands within `reach` of it and in its window, else 5."""

    def nats(self, inputs, targets, positions, window):
        nats = torch.full(targets.shape, 5.0)
        for row, (before, after) in enumerate(zip(inputs.tolist(), targets.tolist(), strict=True)):
            for t, target in enumerate(after):
                if target in before[max(0, t + 1 - self.reach) : t + 1]:
                    nats[row, t] = 0.5
        return nats


def test_key_tokens_are_those_of_any_judge_and_the_same_for_all():
    text = TextTask(
        np.random.default_rng(0).integers(1, 30, 240), 0, documents=np.array([0, 70, 150]), corpus="toy"
    )
    models = [
        Reader(label="near_L8_s1", reach=3),
        Reader(label="far_L8_s1", reach=8, max_length=16),
        Reader(label="far_L8_s2", reach=7),
    ]
    groups = [views.Group("near", 8, [Passes(models[0], text)])]
    groups.append(views.Group("far", 8, [Passes(m, text) for m in models[1:]]))
    gathered = [self_longppl(group, [4, 8, 16, 24], None, 2.0, 2.0) for group in groups]
    assert not gathered[0].keys.any(), "what it sees in 8 tokens it sees in 4"
    assert models[0].served == [4, 8, 16, 24, 4], "one short pass beside those of the lengths"

    assert not self_longppl(groups[1], [8], None, 2.0, 0.4).keys.any(), "it pays 0.5 nats for them itself"
    assert not self_longppl(groups[1], [8], None, 4.6, 2.0).keys.any(), "they are 4.5 nats cheaper"
    assert self_longppl(groups[1], [8], None, 4.4, 0.6).keys.any()

    tokens, wanted = text.tokens.tolist(), set()
    for t in range(240):  # the input before a target is the token before it, also across the border of a window
        for reach in (7, 8):
            long = tokens[max(0, t // 8 * 8 - 1) : t][-reach:]
            if tokens[t] in long and tokens[t] not in tokens[max(0, t - 4) : t]:
                wanted.add(t)
    assert set(np.flatnonzero(gathered[1].keys)) == wanted and wanted

    series = [{"corpus": "toy", "points": one} for one in gathered]
    finish(series)
    near, far = (one["points"] for one in series)
    assert {p["targets"] for p in [*near, *far] if p["nats"] is not None} == {len(wanted)}
    at = sorted(wanted)
    for point in near:
        nats = groups[0].passes[0].nats(point["length"])[at]
        assert point["nats"] == pytest.approx(nats.mean()) and point["short"] == 4
    assert near[1]["nats"] == 5.0 or near[1]["nats"] > far[1]["nats"]
    assert far[-1]["nats"] is None and "16 positions" in far[-1]["reason"] and len(far[1]["by_run"]) == 2
    assert far[1]["difference"]["nats"] == 0 and far[2]["difference"]["from"] == 8


@pytest.mark.skipif(not descriptors(), reason="the system does not tell")
def test_curves_that_wait_for_the_others_hold_no_files(tmp_path):
    text = TextTask(np.random.default_rng(0).integers(1, 30, 240), 0, corpus="toy")
    group = views.Group("far", 8, [Passes(Reader(reach=8, identity="far"), text, TokenStore(tmp_path))])
    before = descriptors()
    gathered = [self_longppl(group, [4, 8, 16, 24]) for _ in range(5)]  # all but the first from the disk
    assert descriptors() == before and len(gathered) == 5


def test_without_key_tokens_the_thresholds_are_named():
    text = TextTask(np.arange(1, 100), 0, corpus="toy")
    found = self_longppl(views.Group("far", 8, [Passes(Reader(reach=8), text)]), [8], 2, 2.0, 0.1)
    series = [{"corpus": "toy", "points": found}]
    finish(series)
    (point,) = series[0]["points"]
    assert point["nats"] is None and "2 nats cheaper in windows of 8 than of 2, and below 0.1" in point["reason"]
