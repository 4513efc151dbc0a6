"""Gradients and optimizer steps of the authors' trainer, from their weights, with dropout off."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from alibi_lm import load_run
from alibi_lm.attention import ATTENTION
from alibi_lm.data.tokenizers import Tokenizer
from alibi_lm.model.transformer import TransformerLM
from alibi_lm.optim import FairseqCosineConfig, NAGConfig, build_optimizer

SCHEDULE = FairseqCosineConfig(warmup_steps=4, period_steps=8, t_mult=2.0, shrink=0.75)
RELATIVE, ABSOLUTE = 1e-5, 1e-7


def gradients_by_their_names(model: TransformerLM) -> dict[str, torch.Tensor]:
    """Our gradients under fairseq's parameter names."""
    vocabulary = model.vocabulary
    named = {"decoder.adaptive_softmax.head.class_proj.weight": vocabulary.clusters.grad}
    for band, (table, projection) in enumerate(zip(vocabulary.embeddings, vocabulary.projections, strict=True)):
        named[f"decoder.embed_tokens.embeddings.{band}.0.weight"] = table.grad
        named[f"decoder.embed_tokens.embeddings.{band}.1.weight"] = projection.grad
    for index, block in enumerate(model.blocks):
        for kind in ("weight", "bias"):
            attention = f"decoder.layers.{index}.self_attn"
            parts = getattr(block.attention.qkv, kind).grad.chunk(3)
            for letter, part in zip("qkv", parts, strict=True):
                named[f"{attention}.{letter}_proj.{kind}"] = part
            for theirs, ours in (
                (f"{attention}.out_proj", block.attention.out),
                (f"{attention}_layer_norm", block.attention_norm),
                (f"decoder.layers.{index}.fc1", block.ffn.up),
                (f"decoder.layers.{index}.fc2", block.ffn.down),
                (f"decoder.layers.{index}.final_layer_norm", block.ffn_norm),
            ):
                named[f"{theirs}.{kind}"] = getattr(ours, kind).grad
    return named


# FlexAttention has no backward pass on a CPU.
@pytest.mark.parametrize("attention", sorted(ATTENTION.keys() - {"flex"}))
def test_gradients_of_the_first_batch(golden_run: Path, train_golden: dict[str, Any], attention: str) -> None:
    model = load_run(golden_run, attention=attention)
    batch = {kind: torch.tensor(train_golden["batch0"][f"{kind}_ids"]) for kind in ("input", "target")}
    nats = model.nats(batch["input"], batch["target"])
    assert nats.sum().item() == pytest.approx(train_golden["batch0_loss_sum_nats"], rel=1e-6)
    (nats.sum() / nats.numel()).backward()
    ours = {name: gradient.double().norm().item() for name, gradient in gradients_by_their_names(model).items()}
    expected = train_golden["batch0_grad_l2_of_mean_nats"]
    assert ours.keys() == expected.keys()
    for name, norm in expected.items():
        assert ours[name] == pytest.approx(norm, rel=RELATIVE, abs=ABSOLUTE), name
    total = math.sqrt(sum(norm**2 for norm in ours.values()))
    assert total == pytest.approx(train_golden["batch0_grad_l2_total"], rel=RELATIVE)
    padding = model.vocabulary.embeddings[0].grad[1].norm().item()
    assert padding == pytest.approx(train_golden["grad_pad_row_band0_l2"], rel=RELATIVE)


def test_sixteen_steps(golden_run: Path, train_golden: dict[str, Any], text_dir: Path) -> None:
    """The test split plays the training text; batch k is its blocks 4k .. 4k+3 of 64 tokens."""
    tokenizer = Tokenizer.load(golden_run / "tokenizer.json")
    text = (text_dir / "wiki.test.tokens").read_text(encoding="utf-8")
    stream = tokenizer.encode(text).astype("int64")
    assert len(stream) == 245_569
    model = load_run(golden_run)  # evaluation mode: no dropout
    optimizer = build_optimizer(NAGConfig(lr=1.0, momentum=0.99), model)
    inputs, targets = torch.from_numpy(stream).roll(1), torch.from_numpy(stream)
    inputs[0] = tokenizer.start_id
    for index, expected in enumerate(train_golden["steps"]):
        span = slice(256 * index, 256 * (index + 1))
        optimizer.zero_grad()
        nats = model.nats(inputs[span].view(4, 64), targets[span].view(4, 64))
        (nats.sum() / nats.numel()).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        (group,) = optimizer.param_groups
        group["lr"] = SCHEDULE.lr(index, 16, 1.0)
        optimizer.step()

        parameters = torch.cat([p.detach().double().flatten() for p in model.parameters()])
        measured = {
            "lr_used": group["lr"],
            "loss_nats_per_token_before_update": nats.mean(dtype=torch.float64).item(),
            "grad_norm_before_clip": norm.item(),
            "param_l2_after": parameters.norm().item(),
            "param_sum_after": parameters.sum().item(),
            "q_proj_layer0_l2_after": model.blocks[0].attention.qkv.weight[:64].double().norm().item(),
            "emb_band1_l2_after": model.vocabulary.embeddings[1].double().norm().item(),
        }
        for name, value in measured.items():
            assert value == pytest.approx(expected[name], rel=RELATIVE), (index, name)
        if expected["class_proj_after"] is not None:
            ours = model.vocabulary.clusters[0, :8].tolist()
            assert ours == pytest.approx(expected["class_proj_after"], rel=RELATIVE, abs=ABSOLUTE)
