"""Models of transformers as language models: the same nats as theirs, honest about what they can do."""

import math
import os

import pytest
import torch
from hub_models import VOCAB, WINDOW, build, configs, save

from alibi_lm.model.hub_folder import open_hub_folder
from alibi_lm.model.huggingface import HuggingFaceLM, load_huggingface
from alibi_lm.model.interface import LanguageModel

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
LATER = {"gemma2", "gpt_neox", "opt", "qwen2", "qwen3"}
"""Close to others: tested by `make test-slow`."""
NAMES = [pytest.param(n, marks=pytest.mark.slow) if n in LATER else n for n in sorted(configs())]
LEARNED = {"gpt2", "opt"}
COUNT_THEMSELVES = {"bloom", "mpt", "falcon"}
WINDOWED = {"mistral"}  # Gemma 2 has layers of either kind
CPU = torch.device("cpu")


def tokens(*shape):
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(3))


def wrapped(model):
    limit = 32 if model.config.model_type in LEARNED else None
    return HuggingFaceLM(model, "tiny", 32, max_length=limit)


def load(folder, **changes):
    return load_huggingface(open_hub_folder(f"hf:{folder}", changes, None, False), CPU, "float32", "auto")


@pytest.mark.parametrize("name", NAMES)
def test_nats_are_those_of_transformers(name):
    model = build(name)
    lm: LanguageModel = wrapped(model)
    ids = tokens(3, 25)
    with torch.no_grad():
        theirs = model(ids, labels=ids).loss
        full = model(ids[:, :-1], use_cache=False).logits.double().log_softmax(-1)
    found = lm.score(ids[:, :-1], ids[:, 1:], hits=True)
    torch.testing.assert_close(found.nats.mean(), theirs, atol=1e-5, rtol=1e-5)
    expected = -full.gather(-1, ids[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(found.nats.double(), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(found.hits, full.argmax(-1) == ids[:, 1:])
    part = lm.score(ids[:, :-1], ids[:, 1:], score_from=20)
    torch.testing.assert_close(part.nats, found.nats[:, 20:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_cached_equals_full(name):
    """What keras-hub, TransformerLens and others had wrong: biases and positions while decoding."""
    model, ids = build(name), tokens(2, 24)
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
        first = model(ids[:, :10], use_cache=True)
        second = model(ids[:, 10:11], past_key_values=first.past_key_values, use_cache=True)
        third = model(ids[:, 11:], past_key_values=second.past_key_values, use_cache=True)
    pieces = torch.cat([first.logits, second.logits, third.logits], dim=1)
    torch.testing.assert_close(pieces, full, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_window_limits_every_layer(name):
    """Within two layers a token reaches 2 (w - 1) further; at full width nothing changes, own windows included."""
    model = build(name)
    lm, ids = wrapped(model), tokens(1, 30)
    assert lm.refuses("window") == ""
    other = ids.clone()
    other[0, 0] += 1
    for window in (1, 3, 6):
        a, b = (lm.score(each, ids, window=window).nats for each in (ids, other))
        reached = (a - b).abs()[0] > 1e-6
        last = 2 * (window - 1)
        assert not reached[last + 1 :].any() and (window == 1 or reached[window : last + 1].any())
        assert reached[0]
    torch.testing.assert_close(lm.score(ids, ids, window=30).nats, lm.score(ids, ids).nats, atol=2e-5, rtol=1e-5)
    if name in WINDOWED:
        wide = lm.score(ids, ids, window=WINDOW + 5).nats
        torch.testing.assert_close(wide, lm.score(ids, ids).nats, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_positions_are_honoured_or_refused(name):
    lm, ids = wrapped(build(name)), tokens(1, 12)
    here, beyond = torch.arange(12), torch.arange(7, 19)
    if name in COUNT_THEMSELVES:
        assert "positions" in lm.refuses("positions")
        with pytest.raises(ValueError, match="positions"):
            lm.score(ids, ids, positions=beyond)
        return
    assert lm.refuses("positions") == ""
    plain = lm.score(ids, ids).nats
    torch.testing.assert_close(lm.score(ids, ids, positions=here).nats, plain, atol=1e-5, rtol=1e-5)
    shifted = (lm.score(ids, ids, positions=beyond).nats - plain).abs().max()
    assert shifted > 1e-3 if name in LEARNED else shifted < 1e-4
    gap = torch.cat([torch.arange(6), torch.arange(16, 22)])
    changed = (lm.score(ids, ids, positions=gap).nats - plain).abs()[0]
    assert changed[:6].max() < 1e-4 and changed[6:].max() > 1e-3, "a gap is no border of documents"


def test_a_gap_in_the_positions_hides_no_key():
    """transformers takes a jump of position_ids for the next packed document, unless there is a mask."""
    lm, ids = wrapped(build("llama")), tokens(1, 12)
    other = ids.clone()
    other[0, 2] += 1
    gap = torch.cat([torch.arange(6), torch.arange(16, 22)])
    a, b = (lm.score(each, ids, positions=gap).nats[0] for each in (ids, other))
    assert ((a - b).abs() > 1e-5)[6:].any()


@pytest.mark.parametrize("name", NAMES)
def test_longest_length_is_found(name, tmp_path):
    lm = load(save(build(name), tmp_path / name, tokenizer=False))
    assert lm.train_length == 32 and lm.label == name
    assert lm.max_length == (32 if name in LEARNED else None)
    ids = tokens(1, 80)
    if name in LEARNED:
        with pytest.raises(ValueError, match="has 32 positions"):
            lm.score(ids, ids)
        return
    before = lm.score(ids[:, :20], ids[:, :20]).nats
    lm.serve(80)
    assert lm.score(ids, ids).nats.isfinite().all()
    torch.testing.assert_close(lm.score(ids[:, :20], ids[:, :20]).nats, before, atol=1e-5, rtol=1e-5)


def test_mpt_reads_on_past_the_length_of_its_config(tmp_path):
    """llm-foundry #331: a longer table of biases is all that it takes, and shorter texts keep theirs."""
    longer = build("mpt", max_seq_len=128)
    lm, ids = load(save(build("mpt"), tmp_path / "mpt", tokenizer=False)), tokens(1, 100)
    lm.serve(100)
    with torch.no_grad():
        expected = longer(ids, use_cache=False).logits
    torch.testing.assert_close(lm.logits(ids), expected, atol=1e-5, rtol=1e-5)


def test_changes_of_the_config(tmp_path):
    folder = save(build("llama"), tmp_path / "llama", tokenizer=False)
    found = open_hub_folder(f"hf:{folder}", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, None, False)
    assert found.changes == {"model.rope_scaling.rope_type": "linear", "model.rope_scaling.factor": 4.0}
    lm, ids = load_huggingface(found, CPU, "float32", "auto"), tokens(1, 20)
    plain = load(folder)
    # Linear scaling by 4 is the model without it, read at every fourth position.
    stretched = plain.score(ids, ids, positions=torch.arange(20)).nats
    assert (lm.score(ids, ids).nats - stretched).abs().max() > 1e-3
    expected = lm.score(ids, ids, positions=torch.arange(20) * 4).nats
    torch.testing.assert_close(expected, stretched, atol=1e-4, rtol=1e-4)
    assert load(folder, rope_theta=500.0).model.config.rope_parameters["rope_theta"] == 500.0
    assert open_hub_folder(f"hf:{folder}", {}, 16, False).train_length_from == "train_length"
    with pytest.raises(ValueError, match=r"\+model.rope_thata.*rope_theta"):
        open_hub_folder(f"hf:{folder}", {"rope_thata": 1.0}, None, False)
    with pytest.raises(ValueError, match="changes nothing"):
        open_hub_folder(f"hf:{folder}", {"hidden_size": 32}, None, False)


def test_attention_and_precision_are_the_users(tmp_path):
    folder, ids = save(build("llama"), tmp_path / "llama", tokenizer=False), tokens(1, 20)
    found = open_hub_folder(f"hf:{folder}", {}, None, False)
    eager = load_huggingface(found, CPU, "float32", "eager")
    half = load_huggingface(found, CPU, "bfloat16", "sdpa")
    assert (eager.attention, half.attention, half.precision) == ("eager", "sdpa", "bfloat16")
    exact = load(folder).score(ids, ids).nats
    torch.testing.assert_close(eager.score(ids, ids).nats, exact, atol=1e-5, rtol=1e-5)
    found_half = half.score(ids, ids).nats
    assert found_half.dtype == torch.float32 and 0 < (found_half - exact).abs().max() < 0.5
    with pytest.raises(ValueError, match="attention = native"):
        load_huggingface(found, CPU, "float32", "native")


def test_falcons_biases_are_added_once(tmp_path):
    """transformers adds them twice in its eager form, and a public bug had its other form drop them."""
    folder = save(build("falcon"), tmp_path / "falcon", tokenizer=False)
    with pytest.raises(ValueError, match="twice"):
        load_huggingface(open_hub_folder(f"hf:{folder}", {}, None, False), CPU, "float32", "eager")


class Mocked(torch.nn.Module):
    """A model that is not what it says: it looks ahead, or gives NaN."""

    def __init__(self, inner, change):
        super().__init__()
        self.inner, self.change, self.config, self.dtype = inner, change, inner.config, inner.dtype
        self.device, self.base_model = inner.device, inner.base_model

    def forward(self, input_ids, **options):
        out = self.inner(input_ids, **options)
        out.logits = self.change(out.logits)
        return out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda logits: logits + logits.roll(-1, 1), "depend on later tokens"),
        (lambda logits: logits * math.nan, "NaN"),
    ],
)
def test_what_is_no_causal_model_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        HuggingFaceLM(Mocked(build("gpt2"), change), "mocked", 32)
