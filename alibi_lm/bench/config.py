"""What a benchmark measures."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from alibi_lm.attention import ATTENTION
from alibi_lm.model.transformer import ModelConfig
from alibi_lm.positions import POSITIONS
from alibi_lm.runtime import DEVICES, PRECISIONS
from alibi_lm.settings import require

MODELS = Path(__file__).resolve().parents[2] / "configs" / "model"


@dataclass
class BenchConfig:
    """Settings of `scripts/bench.py`, given as name=value."""

    model: str = "auto"
    """`small` (4 layers, width 256, 8 heads, FFN 1024, vocabulary 8192), a name of configs/model, or `auto`:
    wiki103_base on a GPU, else small."""
    vocab_size: int | None = None
    """Words; null: 8192, with an adaptive vocabulary WikiText-103's 267744."""
    dropout: bool = False
    """Keep the dropouts of a named model, as the paper's Table 1 did; else they are 0, to compare kernels."""
    positions: list[str] = field(default_factory=lambda: ["none", "alibi", "sinusoidal", "rotary", "t5"])
    """Our schemes. `none` is always measured: the ratios refer to it."""
    backends: list[str] = field(default_factory=lambda: ["auto"])
    """Attention backends of the schemes."""
    compile: bool = False
    """Measure our schemes compiled as well."""
    peers: bool = True
    """Measure other libraries where they are installed (pip install 'alibi_lm[bench]')."""
    flush_peers: bool = False
    """Flush denormal floats to zero for other libraries too, which their users would have to ask torch for."""
    lengths: list[int] = field(default_factory=list)
    """Training and evaluation; empty: 256, 1024, 4096 on a CPU and the paper's 512, 1024, 3072 on a GPU."""
    eval_lengths: list[int] | None = None
    """Evaluation of our schemes alone; null: 16384."""
    tokens: int | None = None
    """Tokens of a step, at least one sequence; null: 2048 on a CPU and the paper's 9216 on a GPU."""
    seconds: float = 270.0
    """Rounds are repeated until this much time is used; each length gets one round of all at least."""
    show: str | None = None
    """A file of results: print its table, and measure nothing."""
    profile: bool = False
    """Instead of the speed: where the time of our training steps goes, at each length."""
    device: str = "auto"
    precision: str = "auto"
    """Of training. auto: bfloat16 on a GPU, else float32. Evaluation is float32 always."""
    threads: int | None = None
    """CPU threads; null: torch's choice."""
    clock: str = "wall"
    """`wall`, or `cpu`: CPU time of this process, whatever else runs beside it; with threads=1, on a CPU."""
    output_dir: str = "outputs/bench"
    """The folder of results.jsonl."""

    def __post_init__(self) -> None:
        names = ["auto", "small", *sorted(path.stem for path in MODELS.glob("*.yaml"))]
        require(self.model in names, f"model = {self.model!r}. Allowed: {', '.join(names)}.")
        for setting, allowed in (("positions", POSITIONS), ("backends", ATTENTION)):
            for name in getattr(self, setting):
                require(name in allowed, f"{setting} = {getattr(self, setting)}. Allowed: {', '.join(allowed)}.")
        require(bool(self.backends), "backends = []. Name at least one, like backends=[auto].")
        for length in [*self.lengths, *(self.eval_lengths or [])]:
            require(length >= 2, f"lengths hold {length}. Use whole numbers >= 2.")
        require(self.device in DEVICES, f"device = {self.device!r}. Allowed: {', '.join(DEVICES)}.")
        require(self.precision in PRECISIONS, f"precision = {self.precision!r}. Allowed: {', '.join(PRECISIONS)}.")
        require(self.clock in ("wall", "cpu"), f"clock = {self.clock!r}. Allowed: wall, cpu.")
        require(
            self.clock == "wall" or (self.threads == 1 and self.device != "cuda"),
            f"clock = cpu with threads = {self.threads}. CPU time tells the speed of one thread: use threads=1.",
        )
        require(self.seconds > 0, f"seconds = {self.seconds}. Use a number > 0.")

    def model_config(self, device_type: str) -> ModelConfig:
        """Sizes of the measured model."""
        from omegaconf import OmegaConf

        name = self.model
        if name == "auto":
            name = "small" if device_type == "cpu" else "wiki103_base"
        if name == "small":
            return ModelConfig(num_layers=4, model_dim=256, num_heads=8, ffn_dim=1024)
        settings = OmegaConf.to_container(OmegaConf.load(MODELS / f"{name}.yaml"))
        assert isinstance(settings, dict)
        settings.pop("defaults", None)
        if not self.dropout:
            settings |= {k: 0.0 for k in settings if str(k).endswith("dropout")}
        return ModelConfig(**{str(k): v for k, v in settings.items()})
