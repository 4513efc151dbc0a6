"""Generation: the tokens of the full pass, the same for a seed, alone or in a batch; text as it is made."""

from __future__ import annotations

import pytest
import torch

from alibi_lm.data.tokenizers import BPEConfig, word_tokenizer
from alibi_lm.generation import GenerateConfig, TextStream
from alibi_lm.model import generate as generate_module
from alibi_lm.model.generate import Sampling, generate, generate_batch
from alibi_lm.model.streaming import open_cache

GREEDY = Sampling(temperature=0)


def by_full_passes(model, ids, count):
    ids = list(ids)
    for _ in range(count):
        with torch.inference_mode():
            ids.append(int(model(torch.tensor([ids]), last=True)[0, 0].argmax()))
    return ids[-count:]


@pytest.mark.parametrize("position", ["alibi", "learned"])
def test_greedy_tokens_are_those_of_full_passes(tiny_model, position):
    model, prompt = tiny_model(position, "auto"), [3, 1, 4, 1, 5]
    assert list(generate(model, prompt, 5, sampling=GREEDY)) == by_full_passes(model, prompt, 5)


@pytest.mark.parametrize("policy", ["full", "proved", "certified"])
def test_a_batch_of_ragged_prompts_is_each_one_alone(tiny_model, monkeypatch, policy):
    monkeypatch.setattr(generate_module, "PREFILL", 4)
    model, prompts = tiny_model("alibi", "auto"), [[1, 2, 3, 4, 5, 6, 7], [8], [9, 10, 11]]
    found = generate_batch(model, prompts, 6, caches=[open_cache(model, policy) for _ in prompts], sampling=GREEDY)
    assert list(map(list, zip(*found, strict=True))) == [by_full_passes(model, p, 6) for p in prompts]


def test_a_seed_gives_its_tokens_and_rows_draw_by_themselves(tiny_model):
    model = tiny_model("alibi", "auto")
    first, again, other = (list(generate(model, [1, 2], 12, seed=s)) for s in (5, 5, 6))
    assert first == again != other
    rows = list(zip(*generate_batch(model, [[1, 2], [1, 2]], 12, seed=5), strict=True))
    assert list(rows[0]) == first and list(rows[1]) == other


def test_sampling_keeps_the_tokens_that_it_should():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    draws = {}
    for name, sampling in {
        "all": Sampling(), "k": Sampling(top_k=2), "p": Sampling(top_p=0.75), "tiny": Sampling(temperature=1e-9),
        "p small": Sampling(top_p=1e-9), "zero": GREEDY,
    }.items():  # fmt: skip
        generator = torch.Generator().manual_seed(0)
        draws[name] = torch.tensor([sampling.choose(logits, generator) for _ in range(800)]).bincount(minlength=4)
    torch.testing.assert_close(draws["all"] / 800, logits.exp(), atol=0.04, rtol=0)
    torch.testing.assert_close(draws["k"] / 800, torch.tensor([0.625, 0.375, 0, 0]), atol=0.04, rtol=0)
    assert draws["p"].tolist()[2:] == [0, 0] and draws["p"].tolist()[1] > 200
    for name in ("tiny", "zero", "p small"):
        assert draws[name].tolist() == [800, 0, 0, 0]


@pytest.mark.parametrize(
    "prompt, settings, words",
    [
        ([], {}, "The prompt is empty"),
        ([50], {}, "input_ids holds 50, and the vocabulary has 50 words"),
        ([-1], {}, "input_ids holds -1"),
        ([1] * 129, {}, "A prompt of 129 tokens and max_tokens = 5 need 133 positions; position=learned has 128"),
        ([1] * 128, {}, "need 132 positions"),
        ([1], {"max_tokens": 0}, "max_tokens = 0"),
    ],
)
def test_what_cannot_be_gone_on_from_is_refused_at_once(tiny_model, prompt, settings, words):
    with pytest.raises(ValueError, match=words):
        generate(tiny_model("learned"), prompt, **({"max_tokens": 5} | settings))


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"temperature": -0.1}, "temperature = -0.1"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"top_k": 0}, "top_k = 0"),
        ({"top_p": 0.0}, "top_p = 0.0"),
        ({"top_p": 1.5}, "top_p = 1.5"),
        ({"max_tokens": -3}, "max_tokens = -3"),
        ({"seed": -1}, "seed = -1"),
        ({"stop": [""]}, "stop = "),
        ({"cache": "lru"}, "cache = 'lru'"),
        ({"beyond": "stop"}, "beyond = stop with cache=full"),
        ({"file": "-"}, "There is no prompt, or there are two"),
    ],
)
def test_settings_out_of_range_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        GenerateConfig(run="run", prompt="a", **settings)


# --- text as it is made --------------------------------------------------------------------------


def streamed(tokenizer, ids, after, stop=(), join=False):
    stream, pieces = TextStream(tokenizer, after, list(stop), join), []
    for token in ids:
        pieces.append(stream.feed(int(token)))
        if stream.stopped:
            break
    pieces.append(stream.end())
    assert "".join(pieces) == stream.text
    return stream.text, pieces


def test_words_have_one_blank_between_them_and_marks_are_joined_on_request():
    words = ["a", "b", "@-@", "@,@", "@", "1", "000"]
    tokenizer = word_tokenizer(words)
    ids = tokenizer.encode("b @-@ a\n1 @,@ 000 @ a")
    assert streamed(tokenizer, ids, 4)[0] == " b @-@ a\n1 @,@ 000 @ a"
    assert streamed(tokenizer, ids, 2, join=True)[0] == "b-a\n1,000 @ a"


def test_bytes_of_one_character_wait_for_each_other():
    tokenizer = BPEConfig(vocab_size=257).train(["abc\n"])
    text = "a\u00e9\u20ac\U0001f600b"
    found, pieces = streamed(tokenizer, tokenizer.encode(text), 0)
    assert found == text and "\ufffd" not in "".join(pieces)
    assert (
        streamed(tokenizer, tokenizer.encode(text)[:2], 0)[0] == "a\ufffd"
    )  # cut in the middle: shown at the end


def test_a_stop_string_ends_the_text_and_no_part_of_it_is_shown():
    tokenizer = BPEConfig(vocab_size=257).train(["abc\n"])
    text, pieces = streamed(tokenizer, tokenizer.encode("one STtwo STOP three"), 0, ["STOP", "never"])
    assert text == "one STtwo " and "".join(pieces) == text
