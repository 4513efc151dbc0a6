"""From a run folder to a model ready to score."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from alibi_lm.checkpoint import CheckpointStore
from alibi_lm.config import TrainConfig, load_config
from alibi_lm.model.transformer import TransformerLM
from alibi_lm.settings import require


def build_model(
    config: TrainConfig, vocab_size: int, attention: str | None = None, context_length: int | None = None
) -> TransformerLM:
    """The model of a config, freshly initialised from torch's global generator.

    Args:
        config: of the run.
        vocab_size: of its tokenizer.
        attention: backend, where it is not the config's own.
        context_length: longest sequence to be served; None: train_length.
    """
    return TransformerLM(
        config.model,
        config.position,
        attention or config.attention.name,
        vocab_size,
        config.train_length,
        context_length,
    )


def load_run(
    folder: str | Path,
    inference_length: int | None = None,
    checkpoint: str = "best",
    attention: str = "auto",
    device: str | torch.device = "cpu",
    position: dict[str, Any] | None = None,
) -> TransformerLM:
    """Load a trained model in evaluation mode.

    Args:
        folder: the run folder.
        inference_length: longest sequence it will be given; schemes with automatic scaling depend on it.
            None: the training length.
        checkpoint: `best` (lowest validation loss) or `last`.
        attention: backend; they differ by float32 rounding.
        device: where to put the model.
        position: settings of the scheme to change for this test, e.g. {"scaling": "yarn"}.

    Raises:
        ValueError: not a run folder, no whole checkpoint, or weights that do not fit the config.
    """
    folder = Path(folder)
    config = load_config(folder)
    if position:
        try:
            changed = OmegaConf.merge(OmegaConf.structured(config.position), position)
            config = dataclasses.replace(config, position=OmegaConf.to_object(changed))
        except OmegaConfBaseException as error:
            raise ValueError(
                f"position = {position} does not fit position={config.position.name}: {error}"
            ) from error
    store = CheckpointStore(folder / "checkpoints")
    found = store.get(checkpoint)
    require(found is not None, f"{folder} holds no whole {checkpoint} checkpoint. Train it first.")
    assert found is not None
    vocab_size = int(found.state["vocab_size"])
    model = build_model(config, vocab_size, attention, inference_length)
    found.load_into(model)
    return model.to(device).eval()
