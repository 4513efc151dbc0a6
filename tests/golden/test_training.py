"""Gradients and optimizer steps of the authors' trainer, from their weights, with dropout off."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from alibi_lm import load_run
from alibi_lm.attention import ATTENTION
from alibi_lm.data.tokenizers import Tokenizer
from alibi_lm.model.transformer import TransformerLM
from alibi_lm.optim import FairseqCosineConfig, NAGConfig, build_optimizer

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


def recipe(train_golden: dict[str, Any]) -> dict[str, float]:
    """Settings of the authors' optimizer, from the words of the file."""
    number = r"([\d.e+-]+)"
    pattern = (
        rf"clip-norm {number}, nag momentum {number}, cosine lr: lr {number} warmup {number} from {number} "
        rf"period {number} t_mult {number} shrink {number} min_lr {number}"
    )
    names = ("clip", "momentum", "lr", "warmup", "first_lr", "period", "t_mult", "shrink", "min_lr")
    found = re.search(pattern, train_golden["what"])
    assert found, f"no settings of the optimizer in {train_golden['what']!r}"
    return dict(zip(names, map(float, found.groups()), strict=True))


def training_text(text_dir: Path, tokenizer: Tokenizer, start: list[int]) -> torch.Tensor:
    """The tokens of the split that played the training text: the one with this start."""
    for split in ("test", "valid"):
        stream = tokenizer.encode((text_dir / f"wiki.{split}.tokens").read_text(encoding="utf-8")).astype("int64")
        if stream[: len(start)].tolist() == start:
            return torch.from_numpy(stream)
    raise AssertionError(f"no split in {text_dir} starts with the targets of batch 0")


def test_steps(golden_run: Path, train_golden: dict[str, Any], text_dir: Path) -> None:
    """Batch k has the rows that follow those of batch k - 1 in the training text."""
    tokenizer = Tokenizer.load(golden_run / "tokenizer.json")
    first = torch.tensor(train_golden["batch0"]["target_ids"])
    targets = training_text(text_dir, tokenizer, first.flatten().tolist())
    inputs = targets.roll(1)
    inputs[0] = tokenizer.start_id
    settings, steps = recipe(train_golden), train_golden["steps"]
    schedule = FairseqCosineConfig(
        warmup_steps=int(settings["warmup"]),
        warmup_init_lr=settings["first_lr"],
        period_steps=int(settings["period"]),
        t_mult=settings["t_mult"],
        shrink=settings["shrink"],
        min_lr=settings["min_lr"],
    )
    model = load_run(golden_run)  # evaluation mode: no dropout
    optimizer = build_optimizer(NAGConfig(lr=settings["lr"], momentum=settings["momentum"]), model)
    width = model.blocks[0].attention.out.weight.shape[0]
    for index, expected in enumerate(steps):
        span = slice(first.numel() * index, first.numel() * (index + 1))
        optimizer.zero_grad()
        nats = model.nats(inputs[span].view_as(first), targets[span].view_as(first))
        (nats.sum() / nats.numel()).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings["clip"])
        (group,) = optimizer.param_groups
        group["lr"] = schedule.lr(index, len(steps), settings["lr"])
        optimizer.step()

        parameters = torch.cat([p.detach().double().flatten() for p in model.parameters()])
        measured = {
            "lr_used": group["lr"],
            "loss_nats_per_token_before_update": nats.mean(dtype=torch.float64).item(),
            "grad_norm_before_clip": norm.item(),
            "param_l2_after": parameters.norm().item(),
            "param_sum_after": parameters.sum().item(),
            "q_proj_layer0_l2_after": model.blocks[0].attention.qkv.weight[:width].double().norm().item(),
            "emb_band1_l2_after": model.vocabulary.embeddings[1].double().norm().item(),
        }
        for name, value in measured.items():
            assert value == pytest.approx(expected[name], rel=RELATIVE), (index, name)
        if (theirs := expected["class_proj_after"]) is not None:
            ours = model.vocabulary.clusters[0, : len(theirs)].tolist()
            assert ours == pytest.approx(theirs, rel=RELATIVE, abs=ABSOLUTE)
