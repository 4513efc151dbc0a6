"""The two root configs, the registries behind each config group, and the way from YAML to dataclasses.

A dataclass owns names, types, defaults and meaning; the YAML files under configs/ only choose values.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from alibi_lm.attention import ATTENTION, chosen_backend
from alibi_lm.data.text import DataConfig
from alibi_lm.data.tokenizers import TOKENIZERS
from alibi_lm.model.transformer import ModelConfig
from alibi_lm.optim import OPTIMIZERS, SCHEDULES
from alibi_lm.positions import POSITIONS
from alibi_lm.runtime import DEVICES, PRECISIONS
from alibi_lm.settings import require, setting
from alibi_lm.tracking import TRACKING

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
    """Targets scored per window in sliding mode, at most the shortest length."""
    split: str = "validation"
    """validation or test."""
    tokens_per_forward: int = 8192
    """Tokens of a forward pass, whatever the length."""

    def __post_init__(self) -> None:
        require(self.mode in MODES, f"mode = {self.mode!r}. Allowed: {', '.join(MODES)}.")
        require(self.split in SPLITS, f"split = {self.split!r}. Allowed: {', '.join(SPLITS)}.")
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
    evaluation: EvaluationConfig = setting(default_factory=EvaluationConfig, counts="no")
    experiment: str = setting("quick", counts="label")
    """Name of the experiment; its runs lie in outputs/<experiment>/runs."""
    study: list[str] = setting(default_factory=list, counts="no")
    """The experiment's runs, as multirun overrides: each entry is one sweep of `make reproduce`."""
    measurements: list[str] = setting(default_factory=list, counts="no")
    """What `make study` measures of the runs beside the curve, in this order: scripts and their settings."""
    train_length: int = setting(64, counts="run")
    """Tokens of a training sequence (the paper's L)."""
    seed: int = setting(1, counts="run")
    """Of initialisation, data order and dropout; >= 0."""
    steps: int = setting(1000, counts="run")
    """Optimizer steps."""
    tokens_per_step: int = setting(4096, counts="run")
    """Targets of an optimizer step, rounded down to whole sequences."""
    batch_multiple: int = setting(1, counts="run")
    """Sequences of a step are rounded down to a multiple of this (the paper: 8, one share per GPU)."""
    micro_batch_tokens: int | None = setting(None, counts="rounding")
    """Tokens of one forward and backward pass on one process; null: the whole step."""
    clip_norm: float = setting(1.0, counts="run")
    """Global gradient norm is clipped to this; 0 never clips."""
    log_every: int = setting(20, counts="no")
    """Steps between rows of training metrics."""
    validate_every: int = setting(500, counts="run")
    """Steps between validations; the last step always validates."""
    checkpoint_every: int = setting(500, counts="no")
    """Steps between checkpoints; the last step always writes one."""
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
    output_dir: str | None = setting(None, counts="label")
    """The run folder; null: outputs/<experiment>/runs/<name>."""
    overwrite: bool = setting(False, counts="no")
    """Delete what the run folder holds and start over."""

    def __post_init__(self) -> None:
        for name in (
            "train_length", "steps", "tokens_per_step", "batch_multiple", "log_every", "validate_every",
            "checkpoint_every", "keep_last",
        ):  # fmt: skip
            require(getattr(self, name) >= 1, f"{name} = {getattr(self, name)}. Use a whole number >= 1.")
        for name in ("seed", "clip_norm", "keep_every"):
            require(getattr(self, name) >= 0, f"{name} = {getattr(self, name)}. Use a number >= 0.")
        require(self.device in DEVICES, f"device = {self.device!r}. Allowed: {', '.join(DEVICES)}.")
        require(
            self.precision in PRECISIONS,
            f"precision = {self.precision!r}. Allowed: {', '.join(PRECISIONS)}.",
        )
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
        _check_threads(self.threads)
        require(
            self.output_dir is None or bool(self.output_dir.strip()),
            "output_dir is empty. Name a run folder, or leave it out for outputs/<experiment>/runs/<name>.",
        )

    @property
    def rows_per_step(self) -> int:
        """Sequences of an optimizer step, by the authors' floor rule."""
        rows = self.tokens_per_step // self.train_length
        return rows - rows % self.batch_multiple


@dataclass
class EvaluateData:
    """Which text to evaluate on, where it is not the run's own."""

    path: str | None = None
    """Folder of wiki.valid.tokens / wiki.test.tokens; null: the run's own corpus."""
    cache_dir: str | None = None
    """Where prepared streams go; null: as in the run's config."""


@dataclass
class EvaluateConfig:
    """One evaluation of one or more run folders."""

    experiment: str = "quick"
    """Names the default run folders, outputs/<experiment>/runs/*, and the default output_dir."""
    runs: str | None = None
    """A run folder or a glob of them."""
    lengths: list[int] = field(default_factory=list)
    """Inference lengths; empty: those in the config.yaml of each run, which are its experiment's at that time."""
    mode: str | None = None
    """nonoverlapping or sliding; null: the experiment's own."""
    stride: int | None = None
    """Targets scored per window in sliding mode."""
    split: str | None = None
    """validation or test; null: the experiment's own."""
    tokens_per_forward: int | None = None
    """Tokens of a forward pass; null: the experiment's own."""
    checkpoint: str = "best"
    """best (lowest validation loss) or last."""
    attention: str = "auto"
    """Attention backend; auto becomes the one it stands for here, which is what result rows record."""
    position: dict[str, Any] = field(default_factory=dict)
    """Test-time changes of the scheme's settings, such as +position.scaling=yarn."""
    data: EvaluateData = field(default_factory=EvaluateData)
    tracking: Any = None
    device: str = "auto"
    """auto, cpu or cuda."""
    precision: str = "float32"
    """float32 by default, also where training ran in bfloat16."""
    threads: int | None = None
    """CPU threads; null: torch's choice."""
    draw: bool = True
    """Draw figure and table afterwards, of all that results.jsonl holds."""
    output_dir: str | None = None
    """The folder of results.jsonl; null: outputs/<experiment>/extrapolation."""

    def __post_init__(self) -> None:
        require(self.checkpoint in ("best", "last"), f"checkpoint = {self.checkpoint!r}. Allowed: best, last.")
        require(self.attention in ATTENTION, f"attention = {self.attention!r}. Allowed: {', '.join(ATTENTION)}.")
        self.attention = chosen_backend(self.attention)
        require(self.device in DEVICES, f"device = {self.device!r}. Allowed: {', '.join(DEVICES)}.")
        require(
            self.precision in PRECISIONS,
            f"precision = {self.precision!r}. Allowed: {', '.join(PRECISIONS)}.",
        )
        _check_threads(self.threads)


def _check_threads(threads: int | None) -> None:
    require(
        threads is None or threads >= 1,
        f"threads = {threads}. Use a whole number >= 1, or null for torch's choice.",
    )


GROUPS: dict[str, dict[str, type]] = {
    "position": POSITIONS,
    "attention": ATTENTION,
    "tokenizer": TOKENIZERS,
    "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES,
    "tracking": TRACKING,
}
"""Config groups whose entries are classes of their own; `name` in a saved config tells which."""


def register(plain: str | None = None) -> None:
    """Store every dataclass with Hydra as `<group>/base_<name>`; call before `hydra.main`.

    Args:
        plain: a group whose entries are stored under their own names as well, for a root that lies outside
            configs/ and does not see the group's files.
    """
    store = ConfigStore.instance()
    store.store(name="base_train", node=TrainConfig)
    store.store(name="base_evaluate", node=EvaluateConfig)
    store.store(group="model", name="base_model", node=ModelConfig)
    store.store(group="data", name="base_data", node=DataConfig)
    for group, registry in GROUPS.items():
        for name, node in registry.items():
            store.store(group=group, name=f"base_{name}", node=node)
            if group == plain:
                store.store(group=group, name=name, node=node)


def to_config(cfg: DictConfig) -> Any:
    """Typed dataclasses from a composed Hydra config; all checks of settings run here.

    Raises:
        ValueError: a setting out of range, or settings that do not fit together.
    """
    config = OmegaConf.to_object(cfg)
    _refuse_additions(config, "")
    return config


def _refuse_additions(config: Any, path: str) -> None:
    """A setting forced in with `+` would be carried along and change nothing."""
    known = {f.name for f in dataclasses.fields(config)}
    for name, value in vars(config).items():
        require(
            name in known,
            f"+{path}{name}: {type(config).__name__} has no such setting. Allowed: {', '.join(sorted(known))}.",
        )
        if dataclasses.is_dataclass(value):
            _refuse_additions(value, f"{path}{name}.")


def from_dict(settings: dict[str, Any]) -> TrainConfig:
    """The TrainConfig of a saved config.yaml.

    Raises:
        ValueError: unknown keys, wrong types or an unknown scheme, naming the key.
    """
    from omegaconf.errors import OmegaConfBaseException

    known = {f.name for f in dataclasses.fields(TrainConfig)}
    unknown = sorted(map(str, set(settings) - known))
    require(not unknown, f"config.yaml has unknown settings {unknown}. Was it written by another version?")
    for group in ("model", "data", "evaluation", *GROUPS):
        chosen = settings.get(group)
        require(
            isinstance(chosen, dict) or (chosen is None and group not in GROUPS),
            f"config.yaml: {group} = {chosen!r}. It must hold settings.",
        )
    try:
        root = OmegaConf.structured(TrainConfig)
        for group, registry in GROUPS.items():
            name = str(settings[group].get("name"))
            require(name in registry, f"config.yaml: {group}.name = {name!r}. Allowed: {', '.join(registry)}.")
            root[group] = OmegaConf.structured(registry[name])
        return OmegaConf.to_object(OmegaConf.merge(root, settings))  # type: ignore[return-value]
    except (OmegaConfBaseException, AttributeError, TypeError) as error:
        raise ValueError(f"config.yaml cannot be read: {error}") from error


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Plain nested settings, as saved in config.yaml."""
    return dataclasses.asdict(config)


def load_config(run_folder: Path) -> TrainConfig:
    """Read a run folder's config.yaml.

    Raises:
        ValueError: missing or unreadable file.
    """
    path = run_folder / "config.yaml"
    if not path.is_file():
        raise ValueError(f"{run_folder} is no run folder: it has no config.yaml.")
    try:
        settings = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:
        raise ValueError(f"{path} is not readable YAML: {error}") from error
    require(isinstance(settings, dict), f"{path} holds no settings.")
    # A saved config is resolved; resolving it again would let a foreign file read the user's environment.
    require("${" not in str(settings), f"{path} holds an interpolation, ${{...}}. Write the value itself there.")
    try:
        return from_dict(settings)  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
