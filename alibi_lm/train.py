"""One training run, from a config to a finished run folder.

Everything random in step n is a function of (seed, n), and the schedule and the data order are functions of n,
so a run that is killed and started again does exactly what it would have done.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from alibi_lm import distributed, runtime
from alibi_lm.attention import chosen_backend
from alibi_lm.config import TrainConfig, load_config, to_dict
from alibi_lm.data.corpus import Corpus, prepare
from alibi_lm.distributed import World
from alibi_lm.evaluate.score import mean_nats, score_tokens
from alibi_lm.files import read_json, write_json, write_text
from alibi_lm.optim import build_optimizer
from alibi_lm.runs import RunLock, build_model, clear_failed, finished, load_run, mark_failed, mark_finished
from alibi_lm.settings import require
from alibi_lm.tracking import open_tracker
from alibi_lm.trainer import Interrupted, Trainer

NOT_THE_RUN = (
    "device", "tracking", "threads", "output_dir", "overwrite", "keep_last", "keep_every", "study", "measurements",
)  # fmt: skip
"""Settings that may change between the parts of a run, because no result depends on them."""
SELF_CHECK_TOLERANCE = 1e-3
"""Nats by which the evaluator may differ from the trainer's validation loss (bfloat16 training: more)."""


def train(config: TrainConfig, folder: Path) -> dict[str, Any]:
    """Train one run, or finish what an earlier process began.

    Args:
        config: checked settings.
        folder: the run folder.

    Returns:
        The payload of finished.json: steps, tokens_seen, final and best validation loss.

    Raises:
        ValueError: bad settings, a folder that holds another run, unusable data, a loss that is no number.
        Interrupted: SIGTERM or SIGINT; the state is saved.
    """
    world = distributed.start(config.device)
    try:
        device = runtime.start(config.device, world.local_rank, config.threads)
        if not world.is_main:
            done = distributed.gather_objects(None, world)[0]
            return _train_locked(config, folder, world, device) if done is None else done
        if config.overwrite:
            _delete_run(folder)
        with RunLock(folder):
            done = finished(folder)
            if done is not None:
                _require_same_run(config, folder)
                print(f"{folder}: already finished at step {done.get('steps')}. Use overwrite=true to start over.")
            distributed.gather_objects(done, world)  # the other processes do as this one does
            if done is not None:
                return done
            if (folder / "config.yaml").exists():
                _require_same_run(config, folder)  # before any mark is touched: this may be someone else's run
            clear_failed(folder)
            try:
                return _train_locked(config, folder, world, device)
            except Interrupted:
                raise
            except Exception as error:
                mark_failed(folder, f"{type(error).__name__}: {error}")
                raise
    finally:
        distributed.stop()


def _train_locked(config: TrainConfig, folder: Path, world: World, device: torch.device) -> dict[str, Any]:
    corpus = _prepare(config, world)
    _check_length(config, corpus)
    if world.is_main:
        _require_same_text(folder, corpus)
        _write_records(config, folder, corpus, device)

    torch.manual_seed(config.seed)
    model = build_model(config, corpus.vocab_size).to(device)
    optimizer = build_optimizer(config.optimizer, model)
    trainer = Trainer(config, folder, world, device, corpus, model, optimizer)
    step = trainer.restore()
    if world.is_main:
        verb = f"resumes at step {step}" if step else "starts"
        print(
            f"{folder.name}: {verb} of {config.steps}; {model.num_parameters():,} parameters, "
            f"{config.rows_per_step * config.train_length:,} tokens a step, {corpus.name}, "
            f"attention={model.backend.name}",
            flush=True,
        )
    tracked = dict(to_dict(config), num_parameters=model.num_parameters(), corpus=corpus.hash)
    with open_tracker(config.tracking, folder, folder.name, config.experiment, tracked, step, world) as tracker:
        result = trainer.run(step, tracker)
    if world.is_main:
        _self_check(config, folder, corpus, device, result)
        mark_finished(folder, result)
    return result


def _prepare(config: TrainConfig, world: World) -> Corpus:
    """Prepare the corpus once per machine group: the main process first, the others find it done."""
    if world.is_main:
        corpus = prepare(config.data, config.tokenizer)
    distributed.barrier(world)
    return corpus if world.is_main else prepare(config.data, config.tokenizer, progress=False)


def _check_length(config: TrainConfig, corpus: Corpus) -> None:
    available = corpus.split("train").num_tokens
    require(
        config.train_length <= available,
        f"train_length = {config.train_length} is longer than the training text: {available} tokens.",
    )


def _write_records(config: TrainConfig, folder: Path, corpus: Corpus, device: torch.device) -> None:
    """config.yaml, environment.json, corpus.json and the tokenizer: all that explains the run, first of all."""
    if not (folder / "config.yaml").exists():
        write_text(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(to_dict(config))))
    write_json(
        folder / "environment.json",
        runtime.environment(device) | {"attention": chosen_backend(config.attention.name)},
    )
    write_json(folder / "corpus.json", corpus.manifest)
    corpus.tokenizer.save(folder / "tokenizer.json")


def _require_same_run(config: TrainConfig, folder: Path) -> None:
    """Refuse to continue a run with other settings."""
    old, new = to_dict(load_config(folder)), to_dict(config)
    differences = [
        f"{key}: {old_value!r} there, {new_value!r} now"
        for key, old_value, new_value in _flat_differences(old, new)
        if key.split(".")[0] not in NOT_THE_RUN and key != "data.cache_dir" and not key.startswith("evaluation.")
    ]
    require(
        not differences,
        f"output_dir = {folder} holds a run with other settings ({'; '.join(differences)}). "
        "Use overwrite=true to start over, or another output_dir.",
    )


def _require_same_text(folder: Path, corpus: Corpus) -> None:
    """Refuse to continue a run on another text, or with another tokenizer."""
    record = folder / "corpus.json"
    if not record.is_file() or not any((folder / "checkpoints").glob("*")):
        return
    old, new = read_json(record), corpus.manifest
    for what, path in (
        ("tokenizer", ("tokenizer",)),
        ("training text", ("splits", "train")),
        ("validation text", ("splits", "validation")),
    ):
        there, here = (_digest(manifest, path) for manifest in (old, new))
        require(
            there == here,
            f"output_dir = {folder} holds a run with another {what} (sha256 {there[:12]} there, {here[:12]} now). "
            "Give it the text it was begun with, or use overwrite=true to start over.",
        )


def _digest(manifest: dict[str, Any], path: tuple[str, ...]) -> str:
    """The sha256 of a part of a corpus's manifest."""
    part: Any = manifest
    for key in path:
        part = part.get(key) or {}
    return str(part.get("sha256"))


def _flat_differences(old: Any, new: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            difference
            for key in sorted(old.keys() | new.keys())
            for difference in _flat_differences(old.get(key), new.get(key), f"{prefix}{key}.")
        ]
    return [] if old == new else [(prefix.rstrip("."), old, new)]


def _delete_run(folder: Path) -> None:
    """Delete a run folder, but nothing that is not one."""
    if not folder.exists():
        return
    require(
        (folder / "config.yaml").is_file() or not any(p for p in folder.iterdir() if p.name != ".lock"),
        f"overwrite = true, but {folder} is no run folder (it has no config.yaml). Nothing was deleted.",
    )
    with RunLock(folder):
        for entry in folder.iterdir():
            if entry.name == ".lock":
                continue
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def _self_check(
    config: TrainConfig, folder: Path, corpus: Corpus, device: torch.device, result: dict[str, Any]
) -> None:
    """The saved run, loaded as a user would load it, gives the trainer's validation loss."""
    model = load_run(folder, config.train_length, "last", config.attention.name, device)
    nats = score_tokens(
        model,
        corpus.split("validation").tokens,
        corpus.start_id,
        config.train_length,
        tokens_per_forward=config.evaluation.tokens_per_forward,
        autocast=runtime.autocast(device, config.precision),
        progress="self-check",
    )
    difference = abs(mean_nats(nats) - result["validation_loss"])
    require(
        difference <= SELF_CHECK_TOLERANCE,
        f"self-check: the evaluator gives {mean_nats(nats):.6f} nats per token at train_length = "
        f"{config.train_length}, the trainer's validation {result['validation_loss']:.6f}. "
        "The saved run is not the trained model; do not use it.",
    )
    result["self_check_difference"] = difference


def differing_settings(config: TrainConfig, baseline: TrainConfig) -> dict[str, Any]:
    """Settings in which a run differs from its experiment's own; they give its folder a suffix."""
    return {
        key: new
        for key, _, new in _flat_differences(to_dict(baseline), to_dict(config))
        if key.split(".")[0] not in NOT_THE_RUN and key not in ("data.cache_dir", "data.path")
    }
