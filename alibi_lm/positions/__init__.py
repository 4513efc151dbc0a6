"""Position schemes: one published method per file, all behind the hooks of `PositionScheme`.

To add one, write its file with its config class, and add that class to POSITIONS. The model, the attention
backends, cached decoding, the evaluator and the contract tests then support it without changes.
"""

from __future__ import annotations

from typing import Protocol

from alibi_lm.positions.alibi import AlibiConfig
from alibi_lm.positions.bam import BamConfig
from alibi_lm.positions.base import NoneConfig, PositionScheme, PositionShape
from alibi_lm.positions.cope import CopeConfig
from alibi_lm.positions.dape import DapeConfig
from alibi_lm.positions.fire import FireConfig
from alibi_lm.positions.fox import FoxConfig
from alibi_lm.positions.grape_ap import GrapeApConfig
from alibi_lm.positions.kerple import KerpleLogConfig, KerplePowerConfig
from alibi_lm.positions.learned import LearnedConfig
from alibi_lm.positions.path_attention import PathConfig
from alibi_lm.positions.pope import PopeConfig
from alibi_lm.positions.rotary import RotaryConfig
from alibi_lm.positions.sandwich import SandwichConfig
from alibi_lm.positions.shaw import ShawConfig
from alibi_lm.positions.sinusoidal import SinusoidalConfig
from alibi_lm.positions.t5 import T5Config
from alibi_lm.positions.transformer_xl import TransformerXLConfig
from alibi_lm.positions.wall import WallConfig
from alibi_lm.positions.xpos import XposConfig


class PositionConfig(Protocol):
    """What the registry needs of a scheme's config."""

    name: str

    def build(self, shape: PositionShape) -> PositionScheme:
        """Build the scheme for a model of this shape."""
        ...


POSITIONS: dict[str, type] = {
    "none": NoneConfig,
    "sinusoidal": SinusoidalConfig,
    "learned": LearnedConfig,
    "rotary": RotaryConfig,
    "alibi": AlibiConfig,
    "t5": T5Config,
    "cope": CopeConfig,
    "kerple_log": KerpleLogConfig,
    "kerple_power": KerplePowerConfig,
    "bam": BamConfig,
    "fox": FoxConfig,
    "fire": FireConfig,
    "sandwich": SandwichConfig,
    "xpos": XposConfig,
    "transformer_xl": TransformerXLConfig,
    "shaw": ShawConfig,
    "pope": PopeConfig,
    "path": PathConfig,
    "wall": WallConfig,
    "grape_ap": GrapeApConfig,
    "dape": DapeConfig,
}

__all__ = ["POSITIONS", "PositionConfig", "PositionScheme", "PositionShape"]
