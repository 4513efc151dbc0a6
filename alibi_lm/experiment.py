"""Experiments by name: where their runs lie, and how to run all of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from alibi_lm.config import TrainConfig, register, to_config
from alibi_lm.run_folder import run_name, short_hash
from alibi_lm.train import differing_settings

ROOT = Path(__file__).resolve().parent.parent


def compose(overrides: list[str]) -> TrainConfig:
    """The training config that these Hydra overrides describe.

    Works inside and outside a Hydra job, without touching Hydra's global state.

    Raises:
        ValueError: settings that do not fit together.
        hydra.errors.HydraException: an override that does not fit the schema.
    """
    from hydra import version
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra._internal.utils import create_config_search_path
    from hydra.types import RunMode
    from omegaconf import OmegaConf, open_dict

    version.setbase("1.3")

    register()
    loader = ConfigLoaderImpl(create_config_search_path(str(ROOT / "configs")))
    cfg = loader.load_configuration("train", overrides=overrides, run_mode=RunMode.RUN)
    with open_dict(cfg):
        del cfg["hydra"]
    OmegaConf.resolve(cfg)
    return to_config(cfg)


def run_folder(config: TrainConfig) -> Path:
    """The run's folder: `output_dir`, or its name below outputs/<experiment>/runs.

    The name carries a short hash of the settings that differ from the experiment's own, if any do.
    """
    if config.output_dir is not None:
        return Path(config.output_dir)
    baseline = compose(
        [
            f"experiment={config.experiment}",
            f"position={config.position.name}",
            f"train_length={config.train_length}",
            f"seed={config.seed}",
        ]
    )
    differences = differing_settings(config, baseline)
    name = run_name(
        config.position.name,
        config.train_length,
        config.seed,
        short_hash(differences) if differences else None,
    )
    return Path("outputs") / config.experiment / "runs" / name


def reproduce(experiment: str, overrides: list[str]) -> int:
    """Train every run of an experiment's `study`, skipping what is finished; returns the exit status."""
    config = compose([f"experiment={experiment}", *overrides])
    if not config.study:
        raise ValueError(f"experiment={experiment} has no `study`: it names no runs. Use make train instead.")
    status = 0
    for sweep in config.study:
        command = [sys.executable, str(ROOT / "scripts" / "train.py"), "-m", f"experiment={experiment}"]
        status |= subprocess.run([*command, *sweep.split(), *overrides], check=False).returncode
    return status
