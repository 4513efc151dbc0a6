"""Drawn positions, and a position scheme that takes part up to some step: in the model, in a run, and resumed."""

import dataclasses
from pathlib import Path

import pytest
import torch

import alibi_lm.train
from alibi_lm import load_run
from alibi_lm.checkpoint import CheckpointStore
from alibi_lm.experiment import compose, run_folder
from alibi_lm.files import read_json
from alibi_lm.load import build_model
from alibi_lm.model.changed_bias import only_a_bias
from alibi_lm.model.training_positions import PlainConfig, RandomisedConfig
from alibi_lm.model.transformer import KeyValueCache, TransformerLM
from alibi_lm.positions import POSITIONS, PositionShape
from alibi_lm.tracking import read_metrics
from alibi_lm.train import train

DRAWN = ["training_positions=randomised", "training_positions.num_positions=64"]


def ids(batch, length):
    return torch.randint(0, 50, (batch, length))


def build(tiny_config, position="alibi", num_positions=100, length=32, **settings):
    torch.manual_seed(1)
    scheme, drawn = POSITIONS[position](**settings), RandomisedConfig(num_positions=num_positions)
    model = TransformerLM(tiny_config, scheme, "sdpa", 50, length, training_positions=drawn)
    return model.eval()


# --- drawn positions -----------------------------------------------------------------------------


def test_a_draw_is_a_sorted_sample_without_replacement():
    config, counts = RandomisedConfig(num_positions=40), torch.zeros(40)
    for seed in range(800):
        draw = config.draw(10, seed)
        assert draw.dtype == torch.int64 and len(draw) == 10 and bool((draw.diff() > 0).all())
        counts[draw] += 1
    assert torch.equal(config.draw(10, 7), config.draw(10, 7))
    assert counts.sum() == 8_000 and (counts - 200).abs().max() < 50, "each position is as likely as any other"
    assert torch.equal(config.draw(40, 0), torch.arange(40))
    assert PlainConfig().draw(10, 0) is None
    with pytest.raises(ValueError, match=r"num_positions = 40 is less than a sequence of 41 tokens"):
        config.draw(41, 0)


@pytest.mark.parametrize("position", ["none", "sinusoidal", "learned", "rotary", "alibi", "t5"])
def test_evaluation_draws_once_for_each_length(tiny_config, position):
    """Two positions are as far apart as the draw says, and shorter sequences have its first positions."""
    model, tokens = build(tiny_config, position), ids(2, 32)
    places = RandomisedConfig(num_positions=100).draw(32, seed=32)
    assert torch.equal(model(tokens), model(tokens, positions=places))
    assert torch.equal(model(tokens[:, :20]), model(tokens[:, :20], positions=places[:20]))
    cache = KeyValueCache()
    pieces = torch.cat([model(piece, cache=cache) for piece in tokens.split([9, 1, 22], dim=1)], dim=1)
    torch.testing.assert_close(pieces, model(tokens), rtol=0, atol=3e-4)
    if position != "none":
        assert not torch.allclose(model(tokens), model(tokens, positions=torch.arange(32)), atol=1e-3)
    with pytest.raises(ValueError, match=r"33 tokens, and positions were drawn for 32"):
        model(ids(1, 33))
    model.serve(100)
    assert torch.equal(model(ids(1, 100) * 0), model(ids(1, 100) * 0, positions=torch.arange(100)))
    assert model.max_length == 100
    with pytest.raises(ValueError, match="num_positions = 100 is less than a sequence of 101"):
        model.serve(101)
    assert "draws its positions" in model.refuses("positions") and model.refuses("window") == ""


def test_a_table_has_as_many_rows_as_there_are_positions(tiny_config):
    assert build(tiny_config, "learned").schemes[0].table.shape == (100, 24)


# --- a scheme up to some step --------------------------------------------------------------------


@pytest.mark.parametrize("position", ["none", "sinusoidal", "learned", "rotary", "alibi", "t5", "cope"])
def test_without_its_scheme_a_model_is_one_without_positions(tiny_model, position):
    model, plain, tokens = tiny_model(position), tiny_model("none"), ids(2, 20)
    model.set_strength(0.0)
    assert torch.equal(model(tokens), plain(tokens))
    assert model.max_length is None
    model.set_strength(1.0)
    if position not in ("none", "cope"):  # a gate's table starts at 0
        assert not torch.allclose(model(tokens), plain(tokens), atol=1e-3)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "auto"])
def test_a_fading_bias_is_that_of_smaller_slopes(tiny_model, attention):
    fading, tokens = tiny_model("alibi", attention, learned_slopes=True), ids(2, 300)
    small = tiny_model("alibi", attention, scaling="linear", factor=4.0)
    small.load_state_dict(fading.state_dict(), strict=False)
    fading.set_strength(0.25)
    torch.testing.assert_close(fading(tokens), small(tokens), rtol=1e-5, atol=1e-5)
    fading.nats(tokens, tokens).sum().backward()
    assert fading.schemes[0].log_slopes.grad.abs().max() > 0
    with pytest.raises(ValueError, match="positions_fade with position=rotary: only a score bias fades"):
        tiny_model("rotary").set_strength(0.25)


BIASES = [n for n in sorted(POSITIONS) if only_a_bias(POSITIONS[n]().build(PositionShape(24, 8, 3, 2, 64, 64)))]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("position", BIASES)
@torch.no_grad()
def test_a_faded_scheme_adds_that_much_of_its_bias(tiny_model, position, attention):
    model, tokens = tiny_model(position, attention), ids(1, 300)
    for parameter in model.positions.parameters():
        parameter.add_(torch.randn(parameter.shape) * 0.3)
    model.set_strength(0.5)
    faded = model(tokens)
    model.set_strength(1.0)
    for scheme in model.schemes:
        for hook in ("bias", "distance_bias", "key_bias", "content_bias", "content_key_bias"):
            if scheme.defines(hook):
                setattr(scheme, hook, half_of(getattr(scheme, hook)))
    torch.testing.assert_close(faded, model(tokens), rtol=1e-4, atol=1e-4)


def half_of(hook):
    return lambda *args: None if (bias := hook(*args)) is None else bias * 0.5


@pytest.mark.parametrize("position", ["shaw", "path", "rotary", "pope"])
def test_what_is_more_than_a_bias_does_not_fade(tiny_model, position):
    settings = {"values": True} if position == "shaw" else {}
    with pytest.raises(ValueError, match="only a score bias fades"):
        tiny_model(position, "eager", **settings).set_strength(0.5)


def test_the_strength_follows_the_steps():
    config = compose(["experiment=smoke", "steps=20", "positions_until=10", "positions_fade=4"])
    expected = {0: 1, 6: 1, 7: 0.75, 8: 0.5, 9: 0.25, 10: 0, 11: 0, 20: 0}
    assert {step: config.position_strength(step) for step in expected} == expected
    at_once = compose(["experiment=smoke", "steps=20", "positions_until=10"])
    assert [at_once.position_strength(step) for step in (9, 10)] == [1, 0]
    assert compose(["experiment=smoke"]).position_strength(10**6) == 1
    for wrong, message in (
        (["positions_until=20"], "positions_until = 20. Use 1 to steps - 1 = 19"),
        (["positions_until=0"], "positions_until = 0"),
        (["positions_fade=2"], "positions_fade = 2 with positions_until = None"),
        (["positions_until=5", "positions_fade=6"], "at most as many steps"),
        (["positions_until=5", "positions_fade=5", "compile=true"], "compile=false"),
    ):
        with pytest.raises(ValueError, match=message):
            compose(["experiment=smoke", "steps=20", *wrong])
    fades = compose(["experiment=smoke", "position=rotary", "steps=20", "positions_until=9", "positions_fade=1"])
    with pytest.raises(ValueError, match="only a score bias fades"):
        build_model(fades, 20)


# --- runs ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory, write_text) -> Path:
    return write_text(tmp_path_factory.mktemp("drawn") / "text")


def settings(text: Path, *more: str):
    return compose([
        "experiment=smoke", "data=wikitext2", f"data.path={text}", f"data.cache_dir={text / 'cache'}",
        "tokenizer=word", "tracking=jsonl", "device=cpu", "threads=1", "train_length=8", "steps=6",
        "tokens_per_step=32", "log_every=1", "validate_every=2", "checkpoint_every=2", "keep_every=2",
        "evaluation.lengths=[8,16]", "model.model_dim=16", "model.ffn_dim=16", "model.dropout=0.1", *more,
    ])  # fmt: skip


def weights(folder: Path, which: str = "last"):
    return CheckpointStore(folder / "checkpoints").get(which).load_weights()


def test_a_run_that_is_interrupted_ends_as_if_it_had_not_been(text, tmp_path, monkeypatch):
    config = settings(text, *DRAWN, "position=alibi", "positions_until=4", "positions_fade=3", "query_scale=ssmax")
    train(config, tmp_path / "whole")
    real, calls = alibi_lm.train.step, []

    def step(run, number):
        calls.append(number)
        if len(calls) in (2, 6):  # once before the scheme ends, once after
            raise OSError("the machine went down")
        return real(run, number)

    monkeypatch.setattr(alibi_lm.train, "step", step)
    for _ in range(2):
        with pytest.raises(OSError, match="went down"):
            train(config, tmp_path / "resumed")
    train(config, tmp_path / "resumed")
    assert calls == [0, 1, 0, 1, 2, 3, 2, 3, 4, 5]
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "resumed")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    losses = [
        [row["train/loss"] for row in read_metrics(tmp_path / name / "metrics.jsonl") if "train/loss" in row]
        for name in ("whole", "resumed")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_all_micro_batches_of_a_step_share_a_draw(text, tmp_path):
    losses = []
    for micro in ("null", "8"):
        config = settings(text, *DRAWN, f"micro_batch_tokens={micro}", "model.dropout=0", "steps=2")
        train(config, tmp_path / micro)
        losses += [
            row["train/loss"] for row in read_metrics(tmp_path / micro / "metrics.jsonl") if "train/loss" in row
        ]
    assert losses[2:] == pytest.approx(losses[:2], rel=2e-6)


def test_positions_end_at_their_step_and_the_best_model_is_one_after_it(text, tmp_path, monkeypatch):
    """Each checkpoint is evaluated as it was trained; the final self-check of `train` holds as well."""
    real = alibi_lm.train._validation
    # With its positions the model is far better, and all the same it is not the one to keep.
    monkeypatch.setattr(
        alibi_lm.train,
        "_validation",
        lambda run, model, *rest: (real(run, model, *rest)[0] - model.strength, None),
    )
    config = settings(text, "position=alibi", "positions_until=3", "optimizer.lr=1e-30")
    assert run_folder(config).name.startswith("alibi_L8_s1_")
    train(config, tmp_path / "run")
    assert read_json(tmp_path / "run" / "checkpoints" / "best.json")["step"] == 4
    early, late = (load_run(tmp_path / "run", checkpoint=f"step:{step}") for step in (2, 4))
    assert (early.strength, late.strength) == (1.0, 0.0) and early.identity != late.identity
    tokens = ids(1, 8) % early.vocab_size
    plain = build_model(dataclasses.replace(config, position=POSITIONS["none"]()), early.vocab_size).eval()
    plain.load_state_dict(late.state_dict(), strict=False)
    assert torch.equal(late(tokens), plain(tokens))
    assert not torch.allclose(early(tokens), late(tokens), atol=1e-3), "nothing was learned: the scheme is all"
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "validation/loss" in row]
    assert rows[0]["validation/loss"] != rows[1]["validation/loss"] == rows[2]["validation/loss"]
