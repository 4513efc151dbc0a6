"""Decoding with a cache equals the full pass: every scheme, policy and backend, cut anywhere, ragged rows."""

from __future__ import annotations

import pytest
import torch

from alibi_lm.attention.native import why_not
from alibi_lm.model.cache import KeyValueCache
from alibi_lm.model.query_scale import QUERY_SCALES
from alibi_lm.model.streaming import open_cache
from alibi_lm.model.training_positions import RandomisedConfig
from alibi_lm.model.transformer import TransformerLM
from alibi_lm.model.window_cache import CHUNK, WindowCache
from alibi_lm.positions import POSITIONS

BACKENDS = [
    "eager",
    "sdpa",
    pytest.param("native", marks=pytest.mark.skipif(bool(why_not()), reason="no compiler")),
]


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(50, shape)


def streamed(model, tokens, cache, pieces):
    with torch.inference_mode():
        return torch.cat([model(piece, cache=cache) for piece in tokens.split(pieces, dim=1)], dim=1)


@pytest.mark.parametrize("position", ["sinusoidal", "rotary", "alibi", "cope", "fox", "path"])
def test_rows_of_different_lengths_decode_as_each_one_alone(tiny_model, position):
    model, lengths = tiny_model(position, "auto"), (3, 17, 1)
    rows, caches = [ids(1, n + 6) for n in lengths], [KeyValueCache() for _ in lengths]
    with torch.inference_mode():
        for row, cache, n in zip(rows, caches, lengths, strict=True):
            model(row[:, :n], cache=cache)
        for step in range(6):
            new = torch.cat([row[:, n + step :][:, :1] for row, n in zip(rows, lengths, strict=True)])
            found = model(new, cache=caches)
            for r, (row, n) in enumerate(zip(rows, lengths, strict=True)):
                expected = model(row[:, : n + step + 1], last=True)[0]
                torch.testing.assert_close(found[r], expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("attention", BACKENDS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_decoding_follows_a_bias_that_was_changed_in_any_way(tiny_model, attention, mode):
    with mode():  # where tensors have no version that would tell of a change
        model, tokens = tiny_model("t5", attention), ids(1, 30)
        for change in (torch.zeros(32, 3), torch.randn(32, 3)):
            model.schemes[0].table.data += change
            found = streamed(model, tokens, KeyValueCache(), [20, 1, 9])
            torch.testing.assert_close(found, model(tokens), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("attention", BACKENDS)
def test_each_head_sees_its_own_window(tiny_model, attention):
    model, tokens, windows = tiny_model("alibi", attention), ids(2, 2 * CHUNK), [3, 40, 150]
    cache = WindowCache([torch.tensor(windows), torch.tensor(windows[::-1])], model.backend.name == "native")
    found = streamed(model, tokens, cache, [300, 1, 6, 2, *[1] * 8, 2 * CHUNK - 317])
    expected = by_definition(model, tokens, [windows, windows[::-1]])
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=2e-5)
    assert cache.keys_held == sum(windows) / 3


def by_definition(model, tokens, windows, positions=None):
    """The model in float64 with a window per layer and head, written out."""
    model = model.double() if not model.vocabulary.embedding.is_cuda else model
    x = model.vocabulary.embed(tokens) * model.config.model_dim**0.5
    length = tokens.shape[1]
    distance = torch.arange(length)[:, None] - torch.arange(length)
    for block, own in zip(model.layers, windows, strict=True):
        q, k, v = block.attention.qkv(block.attention_norm(x)).unflatten(-1, (3, 3, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT * q.shape[-1] ** -0.5 - model.schemes[0].slopes.double()[:, None, None] * distance
        hidden = (distance < 0) | (distance >= torch.tensor(own)[:, None, None])
        y = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v
        x = x + block.attention.out(y.transpose(1, 2).flatten(2))
        x = x + block.ffn(block.ffn_norm(x))
    logits = model.vocabulary.logits(model.final_norm(x))
    model.float()
    return logits


@pytest.mark.parametrize("attention", BACKENDS[1:])
@pytest.mark.parametrize("policy", ["proved", "certified"])
def test_a_bounded_cache_loses_no_more_than_it_says(tiny_model, policy, attention):
    model, tokens = tiny_model("alibi", attention), ids(1, 1000)
    with torch.no_grad():
        for block in model.layers:
            block.attention.qkv.weight *= 0.3  # windows shorter than the text
            block.attention.qkv.bias.normal_()
    cache = open_cache(model, policy, lost_share=1e-6)
    pieces = [500, 1, 5, 3, *[1] * 20, 300, 171]
    found = streamed(model, tokens, cache, pieces)
    with torch.inference_mode():
        torch.testing.assert_close(found, model(tokens), rtol=1e-3, atol=1e-4)
    assert 0 < cache.lost_share <= 1.01e-6
    assert cache.keys_held < 1000


@pytest.mark.parametrize("position", POSITIONS)
def test_every_scheme_streams_through_a_policy_or_says_why_not(tiny_model, position):
    model, tokens = tiny_model(position, "auto", context_length=300), ids(1, 300)
    with torch.inference_mode():
        expected = model(tokens) if model.max_length is None else None
    for policy, settings in (("proved", {}), ("certified", {}), ("window", {"window": 299, "sinks": 1})):
        try:
            cache = open_cache(model, policy, **settings)
        except ValueError as error:
            assert str(error).startswith(f"cache = {policy} with position={position}: it")
            assert position not in ("alibi", "bam", "kerple_power"), "a bias that falls with a convergent tail"
            continue
        found = streamed(model, tokens, cache, [200, 1, 1, 5, 93])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("attention", BACKENDS)
@pytest.mark.parametrize("position", ["alibi", "rotary", "t5", "none", "pope"])
def test_a_window_with_sinks_gives_what_is_kept_positions_without_a_gap(tiny_model, position, attention):
    """One layer, so that what a token sees is the tokens kept: the full pass over those alone."""
    model, window, sinks = tiny_model(position, attention), 9, 2
    del model.blocks[1:]
    tokens = ids(2, 60)
    found = streamed(
        model, tokens, open_cache(model, "window", window=window, sinks=sinks), [5, 1, 30, *[1] * 4, 20]
    )
    for t in (0, 10, 11, 12, 59):
        kept = [*range(min(sinks, t + 1)), *range(max(sinks, t + 1 - window), t + 1)]
        with torch.inference_mode():
            expected = model(tokens[:, kept], last=True)[:, 0]
        torch.testing.assert_close(found[:, t], expected, rtol=1e-4, atol=2e-5)


def test_bfloat16_decodes_to_its_own_rounding(tiny_model):
    model, tokens = tiny_model("alibi", "sdpa").bfloat16(), ids(2, 60)
    with torch.inference_mode():
        whole = model(tokens)
    for cache in (KeyValueCache(), open_cache(model, "proved"), open_cache(model, "certified")):
        torch.testing.assert_close(streamed(model, tokens, cache, [7, 1, 40, 2, 10]), whole, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    "position, policy, settings, words",
    [
        ("none", "proved", {}, "no bias that falls"),
        ("rotary", "certified", {}, "no bias that falls with the distance. Use cache=full or window.$"),
        ("t5", "proved", {}, "grows with the distance"),
        ("cope", "proved", {}, "more than a function of the distance. Use cache=full.$"),
        ("learned", "window", {"window": 8}, "absolute"),
        ("sinusoidal", "window", {"window": 8}, "absolute"),
        ("cope", "window", {"window": 8}, "more than a function of the distance"),
        ("alibi", "window", {}, "window = None with cache=window"),
        ("alibi", "window", {"window": 0}, "window = 0"),
        ("alibi", "window", {"window": 8, "sinks": -1}, "sinks = -1"),
        ("alibi", "full", {"window": 8}, "It belongs to cache=window"),
        ("alibi", "proved", {"sinks": 4}, "sinks = 4"),
        ("alibi", "proved", {"lost_share": 0.0}, "lost_share = 0.0"),
        ("alibi", "full", {"lost_share": 0.1}, "It belongs to cache=proved or certified"),
        ("alibi", "certified", {"lost_share": 1.5}, "lost_share = 1.5"),
        ("alibi", "lru", {}, "cache = 'lru'. Allowed: full, proved, certified, window"),
    ],
)
def test_policies_that_do_not_fit_are_refused_with_the_reason(tiny_model, position, policy, settings, words):
    with pytest.raises(ValueError, match=words):
        open_cache(tiny_model(position), policy, **settings)


@pytest.mark.parametrize("policy", ["proved", "certified", "window"])
def test_no_window_serves_a_query_scale_or_drawn_positions(tiny_config, policy):
    settings = {"window": 8} if policy == "window" else {}
    composed = [{"query_scale": build()} for name, build in QUERY_SCALES.items() if name != "none"]
    for parts in (*composed, {"training_positions": RandomisedConfig()}):
        model = TransformerLM(tiny_config, POSITIONS["alibi"](), "eager", 50, 16, **parts)
        with pytest.raises(ValueError, match=f"cache = {policy} with position=alibi: its .* Use cache=full\\.$"):
            open_cache(model, policy, **settings)


@pytest.mark.parametrize(
    "scale, scale_bias", [("ssmax", True), ("ssmax", False), ("log_n", False), ("none", None)]
)
def test_ragged_rows_count_their_own_keys_and_draw_their_own_positions(tiny_config, scale, scale_bias):
    """A factor depends on how many keys its row has seen; so does a drawn position."""
    settings = {} if scale_bias is None else {"scale_bias": scale_bias}
    drawn = RandomisedConfig(num_positions=99) if scale == "none" else None
    parts = {"query_scale": QUERY_SCALES[scale](**settings), "training_positions": drawn}
    model = TransformerLM(tiny_config, POSITIONS["alibi"](), "auto", 50, 8, 40, **parts).eval()
    lengths, rows = (3, 17, 1), ids(3, 23)
    caches = [KeyValueCache() for _ in lengths]
    with torch.inference_mode():
        for row, cache, n in zip(rows, caches, lengths, strict=True):
            model(row[None, :n], cache=cache)
        for step in range(6):
            new = torch.stack([row[n + step : n + step + 1] for row, n in zip(rows, lengths, strict=True)])
            found = model(new, cache=caches)
            for r, n in enumerate(lengths):
                expected = model(rows[r : r + 1, : n + step + 1], last=True)[0]
                torch.testing.assert_close(found[r], expected, rtol=1e-4, atol=2e-5)


def test_a_scheme_that_takes_no_part_any_more_bounds_nothing(tiny_model):
    model, plain, tokens = tiny_model("alibi", "auto"), tiny_model("none", "auto"), ids(1, 60)
    model.set_strength(0.0)
    for policy in ("proved", "certified"):
        with pytest.raises(ValueError, match="position=alibi, which takes no part any more: it has no bias"):
            open_cache(model, policy)
    both = [streamed(m, tokens, open_cache(m, "window", window=9, sinks=2), [20, 1, 39]) for m in (model, plain)]
    torch.testing.assert_close(*both)
    learned = tiny_model("learned")  # of 128 positions, and no table limits what is left of it
    learned.set_strength(0.0)
    assert streamed(learned, ids(1, 200), KeyValueCache(), [150, 50]).shape == (1, 200, 50)


def test_a_faded_bias_is_bounded_at_the_strength_that_is_left(tiny_model):
    model, tokens = tiny_model("alibi", "auto"), ids(1, 700)
    small = tiny_model("alibi", "auto", scaling="linear", factor=2.0)
    model.set_strength(0.5)
    with torch.no_grad():
        for each in (*model.layers, *small.layers):
            each.attention.qkv.weight *= 0.3
    cache, other = (open_cache(m, "proved", lost_share=1e-6) for m in (model, small))
    assert all(torch.equal(a, b) for a, b in zip(cache.windows, other.windows, strict=True))
    found = streamed(model, tokens, cache, [600, 1, 99])
    assert cache.keys_held < 700
    torch.testing.assert_close(found, streamed(small, tokens, KeyValueCache(), [700]), rtol=1e-3, atol=1e-4)


def test_norms_that_ask_for_too_many_keys_end_a_certified_stream_with_the_reason(tiny_model):
    model = tiny_model("alibi")
    cache = open_cache(model, "certified")
    with torch.no_grad():
        model.layers[0].attention.qkv.weight *= 1e3
    with pytest.raises(
        ValueError, match=r"cache = certified: its bias falls too slowly.*Use cache=full or window"
    ):
        model(ids(1, 9), cache=cache)


def test_a_step_with_a_full_cache_copies_no_old_keys(tiny_model):
    model, cache, places = tiny_model("alibi", "auto"), KeyValueCache(), set()
    for _ in range(100):
        model(ids(1, 1), cache=cache)
        places.add(cache.layers[0][0].data_ptr())
    assert len(places) <= 9  # doublings


def test_a_cache_of_inference_mode_can_go_on_outside_it(tiny_model):
    model, tokens, cache = tiny_model("alibi", "eager"), ids(1, 12), KeyValueCache()
    with torch.inference_mode():
        model(tokens[:, :5], cache=cache)
    with torch.no_grad():
        rest = [model(tokens[:, t : t + 1], cache=cache) for t in range(5, 12)]
        torch.testing.assert_close(torch.cat(rest, dim=1), model(tokens)[:, 5:], rtol=1e-4, atol=1e-5)


def test_rows_of_a_window_are_not_reordered_without_a_word(tiny_model):
    with pytest.raises(NotImplementedError, match="use cache=full"):
        open_cache(tiny_model("alibi"), "proved").take_rows(torch.tensor([0]))


def test_fixed_gates_are_proved_as_alibi_is(tiny_model):
    """FoX with gates that no input changes only biases scores, so a bound holds for it too."""
    model, tokens = tiny_model("fox", "eager", gates="fixed"), ids(1, 80)
    with torch.no_grad():
        found = streamed(model, tokens, open_cache(model, "proved"), [30, 1, 49])
        torch.testing.assert_close(found, model(tokens), rtol=1e-4, atol=1e-4)
