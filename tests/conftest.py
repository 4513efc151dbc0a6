"""Fixtures shared by all tests: tiny models, a fixed seed, one thread."""

from __future__ import annotations

import os

# No test may reach the network, whatever the user's environment says.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")
os.environ.setdefault("WANDB_MODE", "offline")

import pytest
import torch

from alibi_lm.model.transformer import ModelConfig, TransformerLM
from alibi_lm.positions import POSITIONS

torch.set_flush_denormal(True)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def tiny_config() -> ModelConfig:
    return ModelConfig(num_layers=2, model_dim=24, num_heads=3, ffn_dim=48)


@pytest.fixture
def tiny_model(tiny_config: ModelConfig):
    """Build a tiny model: tiny_model("alibi", attention="eager", train_length=128, **position settings)."""

    def build(
        position: str,
        attention: str = "eager",
        train_length: int = 128,
        context_length: int | None = None,
        vocab_size: int = 50,
        **settings: object,
    ) -> TransformerLM:
        torch.manual_seed(1)
        scheme = POSITIONS[position](**settings)
        model = TransformerLM(tiny_config, scheme, attention, vocab_size, train_length, context_length)
        return model.eval()

    return build
