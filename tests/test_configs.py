"""Every YAML composes, fits its schema and builds; every setting is described and counts as something."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from alibi_lm import experiment
from alibi_lm.config import GROUPS, EvaluationConfig, TrainConfig, from_dict, load_config, to_dict
from alibi_lm.data.config import DataConfig
from alibi_lm.evaluate.config import EvaluateConfig, EvaluateData
from alibi_lm.experiment import compose, planned_runs, run_folder
from alibi_lm.load import build_model
from alibi_lm.model.transformer import ModelConfig
from alibi_lm.settings import counting, described

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
EXPERIMENTS = sorted(p.stem for p in (CONFIGS / "experiment").glob("*.yaml") if not p.stem.endswith("_base"))
ENTRIES = [(group, name) for group, registry in GROUPS.items() for name in registry]
CLASSES = {TrainConfig, EvaluateConfig, EvaluationConfig, EvaluateData, ModelConfig, DataConfig}
CLASSES |= {GROUPS[group][name] for group, name in ENTRIES}


@pytest.mark.parametrize("index", range(max(map(len, GROUPS.values()))))
def test_an_entry_of_a_registry_is_chosen_by_its_name_and_read_back(index):
    """No YAML file is needed, and none hides an entry of its name; one entry of each group at a time."""
    names = {group: list(registry)[index % len(registry)] for group, registry in GROUPS.items()}
    config = compose([f"{group}={name}" for group, name in names.items()])
    for group, name in names.items():
        chosen = getattr(config, group)
        assert type(chosen) is GROUPS[group][name] and chosen.name == name
        assert not (CONFIGS / group / f"{name}.yaml").exists()
    assert from_dict(to_dict(config)) == config


def test_files_beside_a_registry_choose_other_values():
    for group, registry in GROUPS.items():
        for path in (CONFIGS / group).glob("*.yaml"):
            assert getattr(compose([f"{group}={path.stem}"]), group) not in [kind() for kind in registry.values()]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_compose_and_build(name):
    config = compose([f"experiment={name}"])
    assert config.experiment == name, "the experiment's name is its file's"
    assert config.evaluation.lengths and config.study
    first_line = (CONFIGS / "experiment" / f"{name}.yaml").read_text().splitlines()[1]
    assert first_line.startswith("# "), "the second line says what the experiment shows"
    with torch.device("meta"):
        model = build_model(config, vocab_size=100_000)
    assert model.num_parameters() > 0
    for sweep in config.study:
        for scheme in next(s for s in sweep.split() if s.startswith("position=")).split("=")[1].split(","):
            assert scheme in (*GROUPS["position"], "glob(*)")


@pytest.mark.parametrize("config", sorted(CLASSES, key=lambda c: c.__name__), ids=lambda c: c.__name__)
def test_every_setting_is_described(config):
    assert config.__doc__ and not config.__doc__.startswith(config.__name__ + "("), "class docstring"
    # A group, and a config within a config, is described by its own class; `name` by the registry.
    nested = {*GROUPS, "name", "model", "data", "evaluation"}
    missing = [name for name, _, text in described(config) if not text and name not in nested]
    assert not missing, f"{config.__name__} does not describe {missing}"


def test_every_setting_counts_as_something():
    """Each in every entry of every group; `counting` fails where a field of TrainConfig says nothing."""
    composed, words = compose([]), ("run", "rounding", "label", "no")
    for group, name in ENTRIES:
        config = dataclasses.replace(composed, **{group: GROUPS[group][name]()})
        kinds = {name: word for word in words for name in counting(config, word)}
        assert len(kinds) == len(counting(config, *words)) and set(kinds.values()) == set(words)
        expected = {"position": "run", "optimizer": "run", "schedule": "run", "tokenizer": "run"}
        expected |= {"attention": "rounding", "tracking": "no", "task": "run", "query_scale": "run"}
        expected["training_positions"] = "run"
        own = {kind for setting, kind in kinds.items() if setting.startswith(f"{group}.")}
        assert own - ({"no"} if group == "task" else set()) == {expected[group]}  # items of a test change no run
    fixed = {"seed": "run", "train_length": "run", "precision": "run", "compile": "rounding", "data.name": "run"}
    fixed |= {"micro_batch_tokens": "rounding", "experiment": "label", "output_dir": "label", "measurements": "no"}
    fixed |= {"data.path": "no", "data.cache_dir": "no", "device": "no", "runs_at_once": "no", "study": "no"}
    assert {name: kinds[name] for name in fixed} == fixed


def test_run_folders_are_named_by_what_was_asked():
    name = lambda *overrides: str(run_folder(compose(["experiment=smoke", *overrides])))  # noqa: E731
    assert name("position=alibi", "seed=3") == "outputs/smoke/runs/alibi_L16_s3"
    assert name("position=alibi", "train_length=32") == "outputs/smoke/runs/alibi_L32_s1"
    # What changes no result changes no name; what does, does.
    assert name("device=cpu", "tracking=wandb", "threads=1", "data.cache_dir=x", "measurements=[]") == name()
    changed = name("optimizer.lr=0.5")
    assert changed.startswith(name() + "_") and changed != name("optimizer.lr=0.25")
    assert name("position.learned_slopes=true") != name()
    # A setting given the value that it has anyway is no difference.
    assert name(f"optimizer.lr={compose(['experiment=smoke']).optimizer.lr}") == name()
    assert name("output_dir=elsewhere") == "elsewhere"


def test_a_config_saved_by_an_earlier_version_is_read(tmp_path):
    """Without the settings that came later, their defaults hold."""
    settings = to_dict(compose(["experiment=smoke"]))
    for later in ("runs_at_once", "measurements"):
        del settings[later]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    assert load_config(tmp_path) == dataclasses.replace(compose(["experiment=smoke"]), measurements=[])


def test_a_file_of_the_users_own_is_an_entry(tmp_path, monkeypatch):
    """configs/position/mine.yaml stands on `rotary`; one that names another entry, or none, is refused."""
    shutil.copytree(CONFIGS, tmp_path / "configs")
    monkeypatch.setattr(experiment, "ROOT", tmp_path)
    folder = tmp_path / "configs" / "position"
    folder.mkdir()
    (folder / "mine.yaml").write_text("defaults: [rotary, _self_]\nscaling: yarn\n")
    config = compose(["position=mine"])
    assert (config.position.name, config.position.scaling) == ("rotary", "yarn")
    assert from_dict(to_dict(config)) == config
    for text, words in (
        ("defaults: [rotary, _self_]\nname: mine\n", "position.name = mine"),
        ("name: mine\n", "position.name = mine"),
        ("name: rotary\ntheta: 5\n", "defaults: "),
    ):
        (folder / "mine.yaml").write_text(text)
        with pytest.raises(ValueError, match=words):
            compose(["position=mine"])


@pytest.mark.slow
def test_the_atlas_has_every_scheme_with_three_seeds():
    runs = planned_runs("atlas", [])
    assert len(runs) == 3 * len(GROUPS["position"])
    assert {config.position.name for _, config in runs.values()} == set(GROUPS["position"])


def test_the_runs_of_an_experiment_do_not_share_a_folder(tmp_path):
    """`make reproduce ARGS=output_dir=...` would have trained one run of seven."""
    assert len(planned_runs("quick", [])) == 7
    with pytest.raises(ValueError, match=r"output_dir=\S+: the runs of an experiment have a folder each"):
        planned_runs("quick", [f"output_dir={tmp_path}"])
