"""The two root configs, the registries behind each config group, and the way from YAML to dataclasses.

A dataclass owns names, types, defaults and meaning; the YAML files under configs/ only choose values.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from alibi_lm.attention import ATTENTION
from alibi_lm.data.config import NAMES, DataConfig
from alibi_lm.data.tokenizers import TOKENIZERS
from alibi_lm.model.query_scale import QUERY_SCALES, QueryScaleConfig
from alibi_lm.model.training_positions import TRAINING_POSITIONS, PlainConfig
from alibi_lm.model.transformer import ModelConfig
from alibi_lm.optim import OPTIMIZERS, SCHEDULES
from alibi_lm.positions import POSITIONS
from alibi_lm.runtime import DEVICES, PRECISIONS
from alibi_lm.settings import before, check_values, require, require_at_least, require_one_of, setting
from alibi_lm.tasks import TASKS
from alibi_lm.tasks.base import TaskConfig
from alibi_lm.tracking import TRACKING

CONFIG_FILE = "config.yaml"
MODES = ("nonoverlapping", "sliding")
SPLITS = ("validation", "test")


@dataclass
class EvaluationConfig:
    """What `make eval-extrapolation` measures of an experiment's runs."""

    lengths: list[int] = field(default_factory=list)
    """Inference lengths in tokens."""
    mode: str = "nonoverlapping"
    """nonoverlapping or sliding."""
    stride: int | None = None
    """Sliding mode: targets scored per window, at most the shortest length."""
    split: str = "validation"
    """validation or test."""
    tokens_per_forward: int = 8192
    """Tokens per forward pass, at every length."""

    def __post_init__(self) -> None:
        require_one_of("mode", self.mode, MODES)
        require_one_of("split", self.split, SPLITS)
        for length in self.lengths:
            require(length >= 1, f"lengths = {self.lengths}. Inference lengths are whole numbers >= 1.")
        require(
            (self.stride is not None) == (self.mode == "sliding"),
            f"mode = {self.mode} with stride = {self.stride}. Sliding windows need a stride, nonoverlapping "
            "ones have none.",
        )
        if self.stride is not None:
            for length in self.lengths:
                require(
                    1 <= self.stride <= length,
                    f"stride = {self.stride} at inference length {length}. Allowed: 1 to {length}.",
                )
        require(self.tokens_per_forward >= 1, f"tokens_per_forward = {self.tokens_per_forward}. Use >= 1.")


@dataclass
class TrainConfig:
    """One training run."""

    model: ModelConfig = setting(default_factory=ModelConfig, counts="run")
    position: Any = setting(None, counts="run")
    attention: Any = setting(None, counts="rounding")
    data: DataConfig = setting(default_factory=DataConfig, counts="run")
    tokenizer: Any = setting(None, counts="run")
    optimizer: Any = setting(None, counts="run")
    schedule: Any = setting(None, counts="run")
    tracking: Any = setting(None, counts="no")
    task: Any = setting(default_factory=TaskConfig, counts="run", later=True)
    query_scale: Any = setting(default_factory=QueryScaleConfig, counts="run", later=True)
    training_positions: Any = setting(default_factory=PlainConfig, counts="run", later=True)
    positions_until: int | None = setting(None, counts="run", later=True)
    """Optimizer steps with the position scheme; the rest are trained without positions (DroPE, arXiv 2512.12167).
    null: all steps. The best checkpoint is then chosen from the steps without positions."""
    positions_fade: int = setting(0, counts="run", later=True)
    """Steps before positions_until over which a score bias fades linearly to 0. 0: it stops at once."""
    evaluation: EvaluationConfig = setting(default_factory=EvaluationConfig, counts="no")
    experiment: str = setting("quick", counts="label")
    """Name of the experiment; its runs are in outputs/<experiment>/runs."""
    study: list[str] = setting(default_factory=list, counts="no")
    """The experiment's runs, as multirun overrides: each entry is one sweep of `make reproduce`."""
    measurements: list[str] = setting(default_factory=list, counts="no")
    """What `make study` measures besides the curve, in this order: scripts and their settings."""
    train_length: int = setting(64, counts="run")
    """Tokens per training sequence (the paper's L); of a task, the longest length, in the task's own measure."""
    seed: int = setting(1, counts="run")
    """Random seed of initialisation, data order and dropout, >= 0."""
    steps: int = setting(1000, counts="run")
    """Optimizer steps."""
    tokens_per_step: int = setting(4096, counts="run")
    """Targets per optimizer step, rounded down to whole sequences."""
    batch_multiple: int = setting(1, counts="run")
    """Sequences per step are rounded down to a multiple of this (the paper: 8, the number of its GPUs)."""
    micro_batch_tokens: int | None = setting(None, counts="rounding")
    """Tokens per forward and backward pass of one process; null: the whole step."""
    clip_norm: float = setting(1.0, counts="run")
    """The global gradient norm is clipped to this value; 0: no clipping."""
    log_every: int = setting(20, counts="no")
    """Steps between rows of training metrics."""
    validate_every: int = setting(500, counts="run")
    """Steps between validations; there is always one after the last step."""
    checkpoint_every: int = setting(500, counts="no")
    """Steps between checkpoints; there is always one after the last step."""
    keep_last: int = setting(1, counts="no")
    """How many of the newest checkpoints are kept."""
    keep_every: int = setting(0, counts="no")
    """Checkpoints at multiples of this many steps are kept for good; 0: none."""
    device: str = setting("auto", counts="no")
    """auto, cpu or cuda."""
    precision: str = setting("auto", counts="run")
    """auto, float32 or bfloat16 (autocast)."""
    compile: bool = setting(False, counts="rounding")
    """Compile the training step with torch.compile."""
    threads: int | None = setting(None, counts="no")
    """CPU threads; null: torch's choice."""
    runs_at_once: int | None = setting(None, counts="no")
    """How many runs `make reproduce` trains in parallel; null: as many as the available cores allow."""
    output_dir: str | None = setting(None, counts="label")
    """The run folder; null: outputs/<experiment>/runs/<name>."""
    overwrite: bool = setting(False, counts="no")
    """Delete what the run folder holds and start over."""

    def __post_init__(self) -> None:
        for name in (
            "train_length", "steps", "tokens_per_step", "batch_multiple", "log_every", "validate_every",
            "checkpoint_every", "keep_last",
        ):  # fmt: skip
            require_at_least(name, getattr(self, name), 1)
        for name in ("seed", "clip_norm", "keep_every", "positions_fade"):
            require(getattr(self, name) >= 0, f"{name} = {getattr(self, name)}. Use a number >= 0.")
        for name, allowed in (("device", DEVICES), ("precision", PRECISIONS)):
            value = getattr(self, name)
            require_one_of(name, value, allowed)
        require(
            self.rows_per_step >= 1,
            f"tokens_per_step = {self.tokens_per_step} holds no {self.batch_multiple} sequences of "
            f"train_length = {self.train_length}. Use at least {self.batch_multiple * self.train_length}.",
        )
        require(
            self.micro_batch_tokens is None or self.micro_batch_tokens >= self.train_length,
            f"micro_batch_tokens = {self.micro_batch_tokens} is less than train_length = {self.train_length}: "
            "one sequence does not fit. Raise it, or use null.",
        )
        until, fade = self.positions_until, self.positions_fade
        require(
            until is None or 1 <= until < self.steps,
            f"positions_until = {until}. Use 1 to steps - 1 = {self.steps - 1}, or null for all steps.",
        )
        require(
            fade == 0 or (until is not None and fade <= until and not self.compile),
            f"positions_fade = {fade} with positions_until = {until}, compile = {self.compile}. A fade needs "
            "positions_until, at most as many steps, and compile=false.",
        )
        for name, otherwise in (("threads", "torch's choice"), ("runs_at_once", "what the cores allow")):
            value = getattr(self, name)
            require(
                value is None or value >= 1,
                f"{name} = {value}. Use a whole number >= 1, or null for {otherwise}.",
            )

    @property
    def rows_per_step(self) -> int:
        """Sequences of an optimizer step, by the authors' floor rule."""
        rows = self.tokens_per_step // self.train_length
        return rows - rows % self.batch_multiple

    def position_strength(self, step: int) -> float:
        """Strength of the position scheme after `step` optimizer steps, from 0 (none) to 1 (full)."""
        left = math.inf if self.positions_until is None else max(0, self.positions_until - step)
        return min(1.0, left / max(1, self.positions_fade))


GROUPS: dict[str, dict[str, type]] = {
    "position": POSITIONS,
    "attention": ATTENTION,
    "tokenizer": TOKENIZERS,
    "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES,
    "tracking": TRACKING,
    "task": TASKS,
    "query_scale": QUERY_SCALES,
    "training_positions": TRAINING_POSITIONS,
}
"""Config groups in which each entry has its own class; `name` in a saved config says which."""


# --- configs from Hydra --------------------------------------------------------------------------

_registered: list[str] = []
"""The root that Hydra's store is made for."""


def register(root: str = "train", config: type = TrainConfig) -> None:
    """Store in Hydra the dataclass that configs/<root>.yaml is based on; call before Hydra composes it.

    Each field that is a config group gets the group's entries, under their own names; a file in configs/<group>/
    is needed only for an entry with other values.
    """
    store = ConfigStore.instance()
    known = store.repo.get(f"base_{root}.yaml")
    if known is not None and OmegaConf.get_type(known.node) is config and _registered == [root]:
        return
    _registered[:] = [root]
    store.store(name=f"base_{root}", node=config)
    fields = {field.name: field.type for field in dataclasses.fields(config)}
    for group, registry in GROUPS.items():
        # Where such a setting is not a group (evaluate.py: attention=eager), Hydra must not take it for one.
        store.repo.pop(group, None)
        if fields.get(group) in (Any, "Any"):
            for name, node in registry.items():
                store.store(group=group, name=name, node=node)
    for name in NAMES:
        store.store(group="data", name=name, node={"name": name})


def spelled(overrides: Sequence[str], config: type) -> list[str]:
    """Overrides in a form for Hydra.

    Its grammar has no letters beyond ASCII, and none of `~ # & = (` in a plain value: values with these, such as
    the path of a run folder, are quoted here. It also cannot have `model=hf:...` and `+model.<key>=...` under one
    name.
    """
    overrides = [_quoted(override) for override in overrides]
    if "model_config" not in {field.name for field in dataclasses.fields(config)}:
        return overrides
    return [re.sub(r"^(\+*)model\.", r"\1model_config.", override) for override in overrides]


@functools.lru_cache(maxsize=1 << 10)  # the runs of a study share most of their settings
def _quoted(override: str) -> str:
    """`name=value` with the value in quotes if it is plain text that Hydra cannot read otherwise."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    name, equals, value = override.partition("=")
    if not equals or name.startswith("-") or value[:1] in ("", "[", "{", "'", '"'):
        return override
    try:
        OverridesParser.create().parse_override(override)
    except HydraException:
        escaped = value.replace("'", r"\'")
        return f"{name}='{escaped}'"
    return override


def to_config(cfg: DictConfig) -> Any:
    """Typed dataclasses from a composed Hydra config; all checks of settings run here.

    Raises:
        ValueError: a setting out of range, or settings that do not fit together.
    """
    config = OmegaConf.to_object(cfg)
    _refuse_additions(config, "")
    _check_groups(config)
    check_values(config)
    return config


def _refuse_additions(config: Any, path: str) -> None:
    """Refuse unknown settings that were added with `+`: they would have no effect."""
    known = {f.name for f in dataclasses.fields(config)}
    for name, value in vars(config).items():
        require(
            name in known,
            f"+{path}{name}: {type(config).__name__} has no such setting. Allowed: {', '.join(sorted(known))}.",
        )
        if dataclasses.is_dataclass(value):
            _refuse_additions(value, f"{path}{name}.")


def _check_groups(config: Any) -> None:
    """Refuse a group's `name` that does not fit its class: otherwise only reading it back would show that."""
    for group, registry in GROUPS.items():
        chosen = getattr(config, group, None)
        if chosen is None or isinstance(chosen, str):
            continue
        name = chosen.get("name") if isinstance(chosen, dict) else chosen.name
        if isinstance(chosen, dict):  # the evaluator's changes for a test, or a YAML file not based on an entry
            at_test = not hasattr(config, "steps")
            require(
                at_test and (name is None or group == "query_scale"),
                f"{group}.name = {name}. A {group} is chosen by {group}=<name>, not by its settings; a file in "
                f"configs/{group}/ begins with `defaults: [<name>, _self_]`. Names: {', '.join(registry)}.",
            )
            continue
        own = next((known for known, kind in registry.items() if type(chosen) is kind), None)
        require(
            name == own,
            f"{group}.name = {name}, in settings of {group}={own}. "
            f"Use {group}={name if name in registry else '<name>'} instead. Allowed: {', '.join(registry)}.",
        )


# --- a run's config.yaml -------------------------------------------------------------------------


def from_dict(settings: dict[str, Any]) -> TrainConfig:
    """The TrainConfig of the settings in a config.yaml; settings added since then do what was done before.

    Raises:
        ValueError: unknown keys, wrong types or an unknown scheme, naming the key.
    """
    unknown = sorted(map(str, set(settings) - {f.name for f in dataclasses.fields(TrainConfig)}))
    require(not unknown, f"unknown settings {unknown}. Was it written by another version?")
    entries = []
    for group in ("model", "data", "evaluation", *GROUPS):
        chosen = settings.get(group, None if group in GROUPS else {})
        if chosen is None and _schema()[group] is not None:
            continue  # a group added since then, with its default
        require(isinstance(chosen, dict), f"{group} = {chosen!r}. It must hold settings.")
        if registry := GROUPS.get(group):
            name = str(chosen.get("name"))  # type: ignore[union-attr]
            require_one_of(f"{group}.name", name, registry)
            entries.append((group, registry[name]))
    try:
        merged = OmegaConf.merge(_schema(*entries), settings)
        config: TrainConfig = OmegaConf.to_object(merged)  # type: ignore[assignment]
    except (OmegaConfBaseException, AttributeError, TypeError) as error:
        raise ValueError(f"its settings do not fit: {error}") from error
    check_values(config)
    return config


@functools.lru_cache(maxsize=64)
def _schema(*entries: tuple[str, type]) -> Any:
    """The types of all settings, with these classes as entries of their groups. Cached: not to be changed."""
    schema = OmegaConf.structured(TrainConfig)
    for group, settings_class in entries:
        schema[group] = OmegaConf.structured(settings_class)
        for item in dataclasses.fields(settings_class):
            if item.metadata.get("later"):  # its default may be newer than the run
                schema[group][item.name] = before(item)
    return schema


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Plain nested settings."""
    return dataclasses.asdict(config)


def to_yaml(config: TrainConfig) -> str:
    """The text of a config.yaml."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


@functools.lru_cache(maxsize=64)
def saved_settings(text: str) -> dict[str, Any]:
    """The settings in the text of a config.yaml, as they stand there; cached, and so not to be changed.

    Raises:
        ValueError: what is wrong with it, as the end of a sentence that begins with the file's name.
    """
    try:
        settings = OmegaConf.to_container(OmegaConf.create(text))
    except Exception as error:
        raise ValueError(f"is not readable YAML: {error}") from error
    require(isinstance(settings, dict) and bool(settings), "holds no settings.")
    # A saved config is resolved; resolving it again would let a foreign file read the user's environment.
    require("${" not in str(settings), "holds an interpolation, ${...}. Write the value itself there.")
    return settings  # type: ignore[return-value]


@functools.lru_cache(maxsize=64)
def from_yaml(text: str) -> TrainConfig:
    """The config in the text of a config.yaml; cached, because it is read again at each look at a run folder.

    Raises:
        ValueError: what is wrong with it, as the end of a sentence that begins with the file's name.
    """
    settings = saved_settings(text)
    try:
        return from_dict(settings)
    except ValueError as error:
        raise ValueError(f"cannot be used: {error}") from error


def load_config(run_folder: Path) -> TrainConfig:
    """Read a run folder's config.yaml.

    Raises:
        ValueError: missing or unreadable file.
    """
    path = run_folder / CONFIG_FILE
    require(path.is_file(), f"{run_folder} is not a run folder: it has no {CONFIG_FILE}.")
    try:
        return copy.deepcopy(from_yaml(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not readable YAML: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error
