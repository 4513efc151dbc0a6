"""The model of a run: built from its config, or loaded from its folder as it was trained."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from alibi_lm import runtime
from alibi_lm.attention import ATTENTION
from alibi_lm.checkpoint import CheckpointStore
from alibi_lm.config import CONFIG_FILE, TrainConfig, load_config
from alibi_lm.data.corpus import Corpus
from alibi_lm.data.tokenizers import Tokenizer
from alibi_lm.files import read_json
from alibi_lm.model.query_scale import QUERY_SCALES
from alibi_lm.model.transformer import TransformerLM
from alibi_lm.runs import CHECKPOINTS, CORPUS_FILE, require_own_files, short_hash
from alibi_lm.settings import COMBINED, identifying, require, require_one_of


def build_model(
    config: TrainConfig, vocab_size: int, attention: str | None = None, context_length: int | None = None
) -> TransformerLM:
    """Build the model of a config, freshly initialised from torch's global generator.

    Args:
        config: the run's.
        vocab_size: words of its tokenizer.
        attention: backend to use instead of the config's.
        context_length: longest sequence to be served; None: train_length.
    """
    backend, train_length = attention or config.attention.name, config.task.width(config.train_length)
    model = TransformerLM(
        config.model, config.position, backend, vocab_size, train_length, context_length,
        config.query_scale, config.training_positions,
    )  # fmt: skip
    if config.positions_fade:
        model.set_strength(0.5)  # refused where the scheme cannot fade
    model.set_strength(config.position_strength(0))
    return model


def run_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that a run was trained with.

    Raises:
        ValueError: it is missing, or another one is in its place.
    """
    path = folder / "tokenizer.json"
    tokenizer = Tokenizer.load(path)
    record = folder / CORPUS_FILE
    if record.is_file():
        trained_with = (read_json(record).get("tokenizer") or {}).get("sha256")
        require(
            tokenizer.hash == trained_with,
            f"{path} is not the tokenizer that the run was trained with ({str(trained_with)[:12]} by corpus.json, "
            f"{tokenizer.hash[:12]} now). Put the right one back, or train the run again.",
        )
    return tokenizer


def load_run(
    folder: str | Path,
    inference_length: int | None = None,
    checkpoint: str = "best",
    attention: str = "auto",
    device: str | torch.device = "cpu",
    position: dict[str, Any] | None = None,
    precision: str = "float32",
    query_scale: dict[str, Any] | None = None,
) -> TransformerLM:
    """Load a trained model in evaluation mode.

    The checkpoint is read and checked once; `model.serve(length)` prepares the model for other lengths.

    Args:
        folder: the run folder.
        inference_length: longest sequence it will be given, >= 1; schemes with automatic scaling depend on it.
            None: the training length.
        checkpoint: `best` (lowest validation loss), `last` or `step:<number>`.
        attention: name of a backend; backends differ only by float32 rounding.
        device: where to put the model: cpu, cuda or cuda:<index>.
        position: settings of the scheme to change for this test, e.g. {"scaling": "yarn"}.
        precision: dtype of scoring: float32, bfloat16, or auto (bfloat16 on GPUs that have it).
        query_scale: settings of the query scale to change for this test; a `name` replaces the scale by another,
            e.g. {"name": "log_n"}, whose parameters then have their initial values.

    Returns:
        The model, with `label` (the folder's name), `identity` (what its scores depend on) and `precision`.

    Raises:
        ValueError: an argument out of range, not a run folder, no whole checkpoint, files of another run, or
            weights that do not fit the config.
    """
    require(isinstance(folder, str | Path), f"folder = {folder!r}. Give the path of a run folder.")
    require(isinstance(checkpoint, str), f"checkpoint = {checkpoint!r}. Use best, last or step:<number>.")
    folder = Path(folder)
    whole = isinstance(inference_length, numbers.Integral) and not isinstance(inference_length, bool)
    require(
        inference_length is None or (whole and inference_length >= 1),
        f"inference_length = {inference_length!r}. Use a whole number >= 1.",
    )
    require_one_of("attention", attention, ATTENTION)
    where = runtime.existing_device(device)
    precision = runtime.resolve_precision(where, precision)
    trained = load_config(folder)
    config = _changed(trained, position or {}, query_scale or {})
    found = CheckpointStore(folder / CHECKPOINTS).get(checkpoint)
    require_own_files(folder, found)
    scaled_as_trained = dataclasses.replace(config, query_scale=trained.query_scale)
    model = build_model(scaled_as_trained, int(found.state["vocab_size"]), attention, inference_length)
    found.load_into(model)
    model.set_strength(config.position_strength(found.step))
    if query_scale:
        weights = model.query_scale.state_dict()
        model.set_query_scale(config.query_scale)
        if config.query_scale.name == trained.query_scale.name:
            model.query_scale.load_state_dict(weights)
    settings = {
        "weights": found.weights_sha256,
        "model": dataclasses.asdict(config.model),
        "position": identifying(config.position),
        "train_length": config.train_length,
        "backend": model.backend.name,
        "precision": precision,
    }
    later = {name: value for name, value in identifying(config).items() if name.startswith(COMBINED)}
    if later:
        settings |= later | {"strength": model.strength}
    model.label, model.identity = folder.resolve().name, short_hash(settings, digits=12)
    model.precision = precision
    return model.to(where).eval()


def _changed(config: TrainConfig, position: dict[str, Any], query_scale: dict[str, Any]) -> TrainConfig:
    """The config of a run with some settings of its scheme and of its query scale changed."""
    if position:
        own = config.position
        name = position.get("name", own.name) if isinstance(position, Mapping) else None
        require(
            name == own.name,
            f"position = {position}. The run was trained with position={own.name}; another scheme is another "
            'model. Give settings of its own scheme as a mapping, such as {"scaling": "yarn"} for rotary.',
        )
        _refuse_starts("position", own, position)
        config = dataclasses.replace(config, position=_merged("position", own, position))
    if query_scale:
        scale = config.query_scale
        name = query_scale.get("name", scale.name) if isinstance(query_scale, Mapping) else None
        require(
            name in QUERY_SCALES,
            f"query_scale = {query_scale}. Give settings as a mapping; names: {', '.join(QUERY_SCALES)}.",
        )
        if name == scale.name:
            _refuse_starts("query_scale", scale, query_scale)
        else:
            scale = QUERY_SCALES[str(name)]()
        config = dataclasses.replace(config, query_scale=_merged("query_scale", scale, query_scale))
    return config


def _refuse_starts(group: str, own: Any, changes: Mapping[str, Any]) -> None:
    """Refuse changes of what a trained model no longer depends on: the config's `starts`, if it names any."""
    for name in getattr(own, "starts", ()):
        require(
            name not in changes or changes[name] == getattr(own, name),
            f"{group}.{name} = {changes.get(name)} changes nothing in a run that is trained: {group}={own.name} "
            "uses it in training only. Leave it out.",
        )


def _merged(group: str, own: Any, changes: Mapping[str, Any]) -> Any:
    """The config of a group with some settings changed."""
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(own), changes))
    except OmegaConfBaseException as error:
        raise ValueError(f"{group} = {changes} does not fit {group}={own.name}: {error}") from error


def require_own_text(folder: Path, corpus: Corpus, split: str) -> None:
    """Refuse a text that is not the run's own, as behind a relative data.path in another working folder.

    Args:
        folder: the run folder.
        corpus: what its data.path leads to.
        split: train, validation or test.

    Raises:
        ValueError: corpus.json has another digest for this split.
    """
    record = folder / CORPUS_FILE
    own = (read_json(record).get("splits", {}).get(split) or {}).get("text_sha256") if record.is_file() else None
    here = corpus.split(split).text_sha256
    require(
        own in (None, here),
        f"data.path = {load_config(folder).data.path} in {folder / CONFIG_FILE} leads from here to another "
        f"{split} text (sha256 {here[:12]}) than the run's own ({str(own)[:12]}). Start where it was trained; "
        "scripts/evaluate.py also scores a text that is named, data.path=<folder>, whatever it holds.",
    )
