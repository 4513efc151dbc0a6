"""The settings of an evaluation, shared by scripts/evaluate.py and scripts/analyse.py."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from alibi_lm.attention import ATTENTION
from alibi_lm.config import MODES, SPLITS, EvaluationConfig, TrainConfig
from alibi_lm.data.config import DataConfig
from alibi_lm.evaluate import context_views, views
from alibi_lm.evaluate.safe_length import safe_length
from alibi_lm.evaluate.self_longppl import self_longppl
from alibi_lm.evaluate.windows import windows
from alibi_lm.model.streaming import POLICIES
from alibi_lm.results.curves import CACHE_SETTINGS
from alibi_lm.runs import experiment_folder
from alibi_lm.runtime import DEVICES, PRECISIONS
from alibi_lm.settings import require, require_at_least, require_one_of

STREAM = "stream"
"""The mode that reads the whole split as one window."""


class View(NamedTuple):
    """A view of scripts/analyse.py."""

    measure: Callable[..., Any]
    """Makes its points from a group, inference lengths, and its other settings by name."""
    settings: tuple[str, ...] = ()
    """The settings that it understands; without `lengths` these are only what defaults are taken from."""


VIEWS: dict[str, View] = {
    "perplexity": View(views.perplexity, ("lengths", "stride")),
    "position": View(views.position, ("lengths",)),
    "last": View(views.last, ("lengths", "last")),
    "documents": View(views.documents, ("lengths",)),
    "fixed": View(views.fixed, ("contexts", "every")),
    "decomposition": View(views.decomposition, ("lengths", "stride")),
    "offset": View(views.offset, ("offsets", "width", "every")),
    "windows": View(windows),
    "safe_length": View(safe_length, ("lengths",)),
    "effective_context": View(context_views.effective_context, ("contexts", "every")),
    "repeat": View(context_views.repeat, ("distances", "width", "every")),
    "attention": View(context_views.attention, ("lengths", "windows")),
    "self_longppl": View(self_longppl, ("lengths", "short", "key_gain", "key_loss")),
}
CURVE = ("lengths", "mode", "stride", "task", "tracking", *CACHE_SETTINGS)
"""The settings that `view=curve` understands; those of the cache belong to mode=stream."""
OF_MODELS = ("model_config", "train_length", "trust_remote_code")
"""The settings that belong to model=hf:..."""


@dataclass
class EvaluateData:
    """Which text to evaluate on, if it is not the run's own."""

    path: str | None = None
    """Folder of wiki.valid.tokens / wiki.test.tokens; null: the run's own corpus. data=text: folder, file or glob
    of text."""
    cache_dir: str | None = None
    """Folder of prepared token streams; null: as in the run's config."""
    name: str | None = None
    """data=text, data=hub, data=wikitext103, ...: another text than the run's own."""
    repo: str | None = None
    """data=hub: name of the dataset, <owner>/<name>."""
    config: str | None = None
    """data=hub: subset (configuration) of the dataset."""
    column: str | None = None
    """data=text, data=hub: the field or column that holds the text; null: text."""
    split_by: str | None = None
    """data=text, data=hub: how documents are assigned to splits; null: all of data=text is the evaluated split,
    and data=hub has its own splits."""
    max_tokens: int | None = None
    """data=text, data=hub: read at most about this many tokens, counted as 4 bytes each."""

    @property
    def another(self) -> bool:
        """Whether the text is named here, whichever the run's own was."""
        return any(value is not None for name, value in dataclasses.asdict(self).items() if name != "cache_dir")

    def apply(self, own: DataConfig | None) -> DataConfig:
        """The text to evaluate on.

        Args:
            own: the run's settings of its text; None: the model has no text.

        Raises:
            ValueError: settings that do not fit together, or no text at all.
        """
        changes = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        if self.name is None:
            if own is None:
                raise ValueError(
                    "data is not given, and this model has no text of its own. Give data=text data.path=<folder "
                    "or file>, data=hub data.repo=<name>, or data=wikitext103."
                )
            return dataclasses.replace(own, **changes)
        if own is not None:
            changes.setdefault("cache_dir", own.cache_dir)
        if self.name == "text":
            changes.setdefault("split_by", "none")
        return DataConfig(**changes)


@dataclass
class EvaluateConfig:
    """What is measured of one or more run folders."""

    view: str = "curve"
    """curve (scripts/evaluate.py) or a view of scripts/analyse.py: perplexity, position, last, documents, fixed,
    decomposition, offset, windows, safe_length, effective_context, repeat, attention, self_longppl, all."""
    experiment: str = "quick"
    """Gives the default run folders, outputs/<experiment>/runs/*, and the default output_dir."""
    runs: str | None = None
    """A run folder or a glob of them."""
    model: str | None = None
    """A model of Hugging Face's transformers instead of runs: hf:<folder or hub name>. `+model.<key>=<value>`
    changes a key of its config for the test, and rows say so."""
    model_config: dict[str, Any] = field(default_factory=dict)
    """model: keys of its config that are changed, set by `+model.<key>=<value>`."""
    train_length: int | None = None
    """model: tokens of its training sequences, if its config does not say or is wrong."""
    trust_remote_code: bool = False
    """model: whether Python code that comes with the model may run."""
    lengths: list[int] | None = None
    """Inference lengths; null: those in the config.yaml of each run, from its experiment when it was trained."""
    task: str | None = None
    """curve: text, needle, passkey or the task of the runs; null: everything that a run was trained on."""
    mode: str | None = None
    """curve: nonoverlapping, sliding, or stream (the whole split as one window, instead of the lengths); null:
    the experiment's own."""
    cache: str | None = None
    """stream: full, proved, certified or window, see alibi_lm/model/streaming.py; null: full."""
    lost_share: float | None = None
    """stream with cache=proved or certified: share of its attention that a head may lose; null: 2^-25."""
    window: int | None = None
    """stream with cache=window: how many of the last tokens are kept."""
    sinks: int | None = None
    """stream with cache=window: how many of the first tokens are kept too."""
    stride: int | None = None
    """curve, perplexity: targets scored per sliding window. decomposition: targets that share a reset pass; null:
    train_length / 8."""
    contexts: list[int] | None = None
    """fixed, effective_context: tokens of context; null: the experiment's lengths, or powers of 2."""
    every: int | None = None
    """fixed, effective_context: score every n-th target; offset, repeat: every n-th window or segment. Null: about
    1,000 targets, 256 windows and 128 segments."""
    last: int = 16
    """last: how many targets at the end of each window."""
    offsets: list[int] | None = None
    """offset: positions of a window's first token; null: 0 to the experiment's longest length."""
    distances: list[int] | None = None
    """repeat: tokens from one reading to the next; null: `width`, doubling up to the longest length."""
    windows: int = 16
    """attention: how many windows of the text to use."""
    short: int | None = None
    """self_longppl: tokens of the short context; null: half of train_length."""
    key_gain: float = 2.0
    """self_longppl: nats that the long context must save on a token to make it a key token."""
    key_loss: float = 2.0
    """self_longppl: highest loss of a key token with the long context, in nats."""
    width: int | None = None
    """offset, repeat: tokens per window or segment; null: half of train_length, for repeat a quarter."""
    split: str | None = None
    """validation or test; null: the experiment's own."""
    tokens_per_forward: int | None = None
    """Tokens per forward pass; null: the experiment's own."""
    checkpoint: str = "best"
    """best (lowest validation loss), last, or step:<number> of a kept checkpoint."""
    attention: str = "auto"
    """Attention backend; result rows record the one that auto stands for."""
    position: dict[str, Any] = field(default_factory=dict)
    """Test-time changes of the scheme's settings, such as +position.scaling=yarn."""
    query_scale: dict[str, Any] = field(default_factory=dict)
    """Test-time changes of the query scale, such as +query_scale.name=log_n."""
    data: EvaluateData = field(default_factory=EvaluateData)
    tracking: Any = None
    device: str = "auto"
    """auto, cpu or cuda."""
    precision: str = "float32"
    """float32 (the default, also after training in bfloat16), bfloat16 or auto."""
    threads: int | None = None
    """CPU threads; null: torch's choice."""
    draw: bool = True
    """Draw figure and table afterwards."""
    output_dir: str | None = None
    """Where results go; null: outputs/<experiment>/extrapolation (curve) or outputs/<experiment>/analysis."""

    def __post_init__(self) -> None:
        choices: dict[str, Collection[str]] = {
            "view": ("curve", *VIEWS, "all"),
            "attention": ATTENTION,
            "device": DEVICES,
            "precision": PRECISIONS,
            "split": SPLITS,
            "mode": (*MODES, STREAM),
            "cache": POLICIES,
        }
        for name, value in vars(self).items():
            least = 0 if name in ("offsets", "sinks") else 1
            if value is not None and name in choices:
                require_one_of(name, value, choices[name])
            elif isinstance(value, str):
                require(
                    bool(value.strip()), f"{name} is empty. Give a value, or leave {name} out for the default."
                )
            elif isinstance(value, int) and not isinstance(value, bool):
                require_at_least(name, value, least)
            elif isinstance(value, list):
                require(bool(value), f"{name} = []. Name some, quoted: '{name}=[64,128]'.")
                require(min(value) >= least, f"{name} = {value}. Use whole numbers >= {least}.")
        require(
            re.fullmatch(r"best|last|step:\d+", self.checkpoint) is not None,
            f"checkpoint = {self.checkpoint!r}. Allowed: best, last, step:<number> of a kept checkpoint.",
        )
        require(
            self.model is None or (self.runs is None and not self.position and not self.query_scale),
            "model = ... with runs, position or query_scale: those are of our own runs. Give one or the other.",
        )
        known = {"curve": CURVE} | {name: view.settings for name, view in VIEWS.items()}
        own = {name for view in (VIEWS if self.view == "all" else [self.view]) for name in known[view]}
        defaults = {field.name: field.default for field in dataclasses.fields(self)} | {
            "model_config": {},
            "tracking": "jsonl",
        }
        for name, value in (vars(self) | {"tracking": getattr(self.tracking, "name", "jsonl")}).items():
            users = [view for view, names in known.items() if name in names]
            if value == defaults[name]:
                continue
            if name in OF_MODELS and self.model is None:
                why = "has no effect without model=hf:<folder or hub name>."
            elif users and name not in own:
                why = f"has no effect with view={self.view}. It belongs to view={', '.join(users)}."
            elif name in CACHE_SETTINGS and self.mode != STREAM:
                why = f"with mode={self.mode}. It belongs to mode={STREAM}."
            elif name in ("lengths", "stride") and self.mode == STREAM:
                why = f"with mode={STREAM}, which has one window: the whole split. Leave {name} out."
            else:
                continue
            raise ValueError(f"{'+model.<key>' if name == 'model_config' else name} = {value} {why}")

    @property
    def output(self) -> Path:
        """Folder of the results."""
        kind = "extrapolation" if self.view == "curve" else "analysis"
        return Path(self.output_dir) if self.output_dir else self._home / kind

    @property
    def _home(self) -> Path:
        """Folder of the experiment, or of the model's results."""
        model = (self.model or "").removeprefix("hf:").rstrip("/").split("/")[-1]
        return experiment_folder(model or self.experiment)

    @property
    def tokens(self) -> Path:
        """Folder of per-token results, which evaluation and analysis share."""
        curves = self.output if self.view == "curve" else self._home / "extrapolation"
        return curves / "tokens"

    def settings(self, run: TrainConfig) -> EvaluationConfig:
        """How to evaluate a run: what is not set here comes from its experiment.

        Raises:
            ValueError: settings that do not fit together, or no lengths anywhere.
        """
        own = run.evaluation
        mode, stride = "nonoverlapping", None
        if self.view == "curve":
            chosen = None if self.mode == STREAM else self.mode
            mode = chosen or ("sliding" if self.stride is not None else own.mode)
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
            "lengths are not given, and the run has none of its own. Give them, quoted: 'lengths=[64,128,256]'.",
        )
        return settings
