"""The settings of an evaluation: one config for scripts/evaluate.py and scripts/analyse.py."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alibi_lm.attention import ATTENTION
from alibi_lm.config import MODES, SPLITS, EvaluationConfig, TrainConfig
from alibi_lm.runs import experiment_folder
from alibi_lm.runtime import DEVICES, PRECISIONS
from alibi_lm.settings import require

VIEWS: dict[str, tuple[str, ...]] = {
    "perplexity": ("lengths", "stride"),
    "position": ("lengths",),
    "last": ("lengths", "last"),
    "documents": ("lengths",),
    "fixed": ("contexts", "every"),
    "decomposition": ("lengths", "stride"),
    "offset": ("offsets", "width", "every"),
    "effective_context": ("contexts", "every"),
    "repeat": ("distances", "width", "every"),
    "attention": ("lengths", "windows"),
}
"""The views and the settings that each understands."""
CURVE = ("lengths", "mode", "stride", "task", "tracking")
"""The settings that `view=curve` understands."""


@dataclass
class EvaluateData:
    """Which text to evaluate on, where it is not the run's own."""

    path: str | None = None
    """Folder of wiki.valid.tokens / wiki.test.tokens; null: the run's own corpus."""
    cache_dir: str | None = None
    """Where prepared streams go; null: as in the run's config."""


@dataclass
class EvaluateConfig:
    """What is measured of one or more run folders."""

    view: str = "curve"
    """curve (scripts/evaluate.py), or one of scripts/analyse.py: perplexity, position, last, documents, fixed,
    decomposition, offset, effective_context, repeat, attention, all."""
    experiment: str = "quick"
    """Names the default run folders, outputs/<experiment>/runs/*, and the default output_dir."""
    runs: str | None = None
    """A run folder or a glob of them."""
    lengths: list[int] | None = None
    """Inference lengths; null: those in the config.yaml of each run, which are its experiment's at that time."""
    task: str | None = None
    """curve: what is asked: text, needle, passkey or the task of the runs; null: all that a run was trained on."""
    mode: str | None = None
    """curve: nonoverlapping or sliding; null: the experiment's own."""
    stride: int | None = None
    """curve, perplexity: targets scored per window in sliding mode. decomposition: of the reset; null:
    train_length / 8."""
    contexts: list[int] | None = None
    """fixed, effective_context: tokens of context; null: the experiment's lengths, or powers of 2."""
    every: int | None = None
    """fixed, effective_context: every how many targets one is scored; offset, repeat: the same for windows. Null:
    about 1,000 targets, 256 windows and 128 segments."""
    last: int = 16
    """last: how many targets at the end of each window."""
    offsets: list[int] | None = None
    """offset: positions of a window's first token; null: 0 to the experiment's longest length."""
    distances: list[int] | None = None
    """repeat: tokens between two readings; null: from `width` on, doubling, to the longest length."""
    windows: int = 16
    """attention: windows of the text that are looked at."""
    width: int | None = None
    """offset, repeat: tokens of a window or segment; null: half of train_length; repeat: a quarter."""
    split: str | None = None
    """validation or test; null: the experiment's own."""
    tokens_per_forward: int | None = None
    """Tokens of a forward pass; null: the experiment's own."""
    checkpoint: str = "best"
    """best (lowest validation loss), last, or step:<number> of one that was kept."""
    attention: str = "auto"
    """Attention backend; result rows record the one that auto stands for."""
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
    """Draw figure and table afterwards."""
    tokens_dir: str | None = None
    """Where per-token results are kept; null: the folder `tokens` of the experiment's curves."""
    output_dir: str | None = None
    """Where results go; null: outputs/<experiment>/extrapolation (curve) or outputs/<experiment>/analysis."""

    def __post_init__(self) -> None:
        choices: dict[str, Iterable[str]] = {
            "view": ("curve", *VIEWS, "all"),
            "attention": ATTENTION,
            "device": DEVICES,
            "precision": PRECISIONS,
            "split": SPLITS,
            "mode": MODES,
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            unset = value is None and name in ("split", "mode")
            require(unset or value in allowed, f"{name} = {value!r}. Allowed: {', '.join(allowed)}.")
        require(
            re.fullmatch(r"best|last|step:\d+", self.checkpoint) is not None,
            f"checkpoint = {self.checkpoint!r}. Allowed: best, last, step:<number> of one that was kept.",
        )
        for name in ("experiment", "runs", "tokens_dir", "output_dir"):
            value = getattr(self, name)
            require(
                value is None or bool(value.strip()),
                f"{name} is empty. Give a value, or leave {name} out for the default.",
            )
        for name in ("stride", "every", "last", "width", "windows", "tokens_per_forward", "threads"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} = {value}. Use a whole number >= 1.")
        for name, least in (("lengths", 1), ("contexts", 1), ("offsets", 0), ("distances", 1)):
            values = getattr(self, name)
            require(values is None or bool(values), f"{name} = []. Name some, quoted: '{name}=[64,128]'.")
            require(all(v >= least for v in values or ()), f"{name} = {values}. Use whole numbers >= {least}.")
        self._refuse_settings_of_other_views()

    def _refuse_settings_of_other_views(self) -> None:
        known = {"curve": CURVE, **VIEWS}
        own = set().union(*VIEWS.values()) if self.view == "all" else set(known[self.view])
        for setting in sorted(set().union(*known.values()) - own):
            value = getattr(self, setting)
            if setting == "tracking":
                value = getattr(value, "name", "jsonl")
            default = {"last": 16, "windows": 16, "tracking": "jsonl"}.get(setting)
            users = ", ".join(view for view, names in known.items() if setting in names)
            require(
                value == default,
                f"{setting} = {value} has no effect with view={self.view}. It belongs to view={users}.",
            )

    @property
    def output(self) -> Path:
        """Folder of the results."""
        kind = "extrapolation" if self.view == "curve" else "analysis"
        return Path(self.output_dir) if self.output_dir else experiment_folder(self.experiment) / kind

    @property
    def tokens(self) -> Path:
        """Folder of per-token results: evaluation and analysis have one and the same."""
        if self.tokens_dir:
            return Path(self.tokens_dir)
        curves = self.output if self.view == "curve" else experiment_folder(self.experiment) / "extrapolation"
        return curves / "tokens"

    def settings(self, run: TrainConfig) -> EvaluationConfig:
        """How to evaluate a run: what is not set here is as its experiment says.

        Raises:
            ValueError: settings that do not fit together, or no lengths anywhere.
        """
        own = run.evaluation
        mode, stride = "nonoverlapping", None
        if self.view == "curve":
            mode = self.mode or ("sliding" if self.stride is not None else own.mode)
            stride = self.stride if self.stride is not None else (own.stride if mode == own.mode else None)
        settings = dataclasses.replace(
            own,
            lengths=list(self.lengths or own.lengths),
            mode=mode,
            stride=stride,
            split=self.split or own.split,
            tokens_per_forward=self.tokens_per_forward or own.tokens_per_forward,
        )
        require(
            bool(settings.lengths),
            "lengths are not given, and the run names none of its own. Give them, quoted: 'lengths=[64,128,256]'.",
        )
        return settings
