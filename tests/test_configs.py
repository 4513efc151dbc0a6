"""Every YAML composes, fits its schema and builds; every setting is described; mistakes are refused clearly."""

import dataclasses
import inspect
from pathlib import Path

import pytest
import torch
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from alibi_lm.config import GROUPS, EvaluateConfig, EvaluationConfig, TrainConfig, from_dict, to_dict
from alibi_lm.experiment import compose, planned_runs, run_folder
from alibi_lm.model.transformer import ModelConfig
from alibi_lm.runs import build_model

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
EXPERIMENTS = sorted(p.stem for p in (CONFIGS / "experiment").glob("*.yaml") if not p.stem.endswith("_base"))


@pytest.mark.parametrize("group", sorted(GROUPS))
def test_yaml_files_are_the_registry(group):
    """Each entry has its file; a further file is an entry with other values."""
    stems = {p.stem for p in (CONFIGS / group).glob("*.yaml")}
    assert set(GROUPS[group]) <= stems
    for stem in stems:
        text = (CONFIGS / group / f"{stem}.yaml").read_text()
        base = text.split("- base_")[1].split()[0]
        assert base in GROUPS[group] and stem.startswith(base)
    for name, config in GROUPS[group].items():
        assert config().name == name


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiments_compose_and_build(experiment):
    config = compose([f"experiment={experiment}"])
    assert config.experiment == experiment, "the experiment's name is its file's"
    assert config.evaluation.lengths and config.study
    first_line = (CONFIGS / "experiment" / f"{experiment}.yaml").read_text().splitlines()[1]
    assert first_line.startswith("# "), "the second line says what the experiment shows"
    with torch.device("meta"):
        model = build_model(config, vocab_size=100_000)
    assert model.num_parameters() > 0
    for sweep in config.study:
        for scheme in next(s for s in sweep.split() if s.startswith("position=")).split("=")[1].split(","):
            assert scheme in GROUPS["position"]


@pytest.mark.parametrize("position", sorted(GROUPS["position"]))
def test_a_saved_config_is_the_config(position):
    config = compose(["experiment=quick", f"position={position}"])
    assert from_dict(to_dict(config)) == config


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig,
        EvaluateConfig,
        EvaluationConfig,
        ModelConfig,
        *(c for g in GROUPS.values() for c in g.values()),
    ],
    ids=lambda c: c.__name__,
)
def test_every_setting_is_described(config):
    assert config.__doc__ and not config.__doc__.startswith(config.__name__ + "("), "class docstring"
    source = inspect.getsource(config)
    groups = {*GROUPS, "name", "model", "data", "evaluation", "tracking"}
    for f in dataclasses.fields(config):
        if f.name in groups:
            continue
        after = source.split(f"\n    {f.name}:", 1)[1].split("\n", 1)[1].lstrip()
        assert after.startswith('"""'), f"{config.__name__}.{f.name} has no description"


def test_run_folders_are_named_by_what_was_asked():
    name = lambda *overrides: str(run_folder(compose(["experiment=smoke", *overrides])))  # noqa: E731
    assert name("position=alibi", "seed=3") == "outputs/smoke/runs/alibi_L16_s3"
    assert name("position=alibi", "train_length=32") == "outputs/smoke/runs/alibi_L32_s1"
    # What changes no result changes no name; what does, does.
    assert name("device=cpu", "tracking=wandb", "threads=1", "data.cache_dir=x") == name()
    changed = name("optimizer.lr=0.5")
    assert changed.startswith(name() + "_") and changed != name("optimizer.lr=0.25")
    assert name("position.learned_slopes=true") != name()
    # A setting given the value that it has anyway is no difference.
    assert name(f"optimizer.lr={compose(['experiment=smoke']).optimizer.lr}") == name()
    assert name("output_dir=elsewhere") == "elsewhere"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.num_heads=5", ["model.num_heads = 5", "does not divide"]),
        ("model.num_layers=0", ["model.num_layers = 0"]),
        ("model.dropout=1.0", ["model.dropout = 1.0"]),
        ("model.activation=swish", ["model.activation", "relu"]),
        ("model.adaptive_cutoffs=[30,20]", ["adaptive_cutoffs = [30, 20]"]),
        ("train_length=0", ["train_length = 0"]),
        ("train_length=-4", ["train_length = -4"]),
        ("steps=0", ["steps = 0"]),
        ("seed=-1", ["seed = -1"]),
        ("tokens_per_step=3", ["tokens_per_step = 3", "train_length"]),
        ("micro_batch_tokens=2", ["micro_batch_tokens = 2"]),
        ("device=gpu", ["device = 'gpu'", "cuda"]),
        ("precision=float16", ["precision = 'float16'"]),
        ("evaluation.lengths=[0]", ["lengths = [0]"]),
        ("evaluation.mode=window", ["mode = 'window'"]),
        ("evaluation.stride=4", ["stride = 4"]),
        ("evaluation.split=train", ["split = 'train'"]),
    ],
)
def test_settings_out_of_range_are_refused(override, words):
    with pytest.raises(ValueError) as error:
        compose(["experiment=smoke", override])
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "override",
    ["position.slop=1", "stepz=3", "steps=many", "position=albi", "model.num_heads=two", "+position.x=1",
     "experiment=nothing", "seed=1.5", "optimizer.lr=fast"],
)  # fmt: skip
def test_typos_and_wrong_types_are_refused(override):
    with pytest.raises((HydraException, OmegaConfBaseException, ValueError)) as error:
        compose(["experiment=smoke", override])
    name = override.lstrip("+").split("=")[0]
    assert any(part in str(error.value) for part in (name, name.split(".")[-1], override.split("=")[1]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": "red"}, "colour"),
        ({"position": {"name": "albi"}}, "albi"),
        ({"position": {"name": "alibi", "slop": 1}}, "slop"),
        ({"position": None}, "position = None"),
        ({"steps": "many"}, "many"),
        ({"steps": -1}, "steps = -1"),
    ],
)
def test_saved_configs_are_checked(change, message):
    settings = to_dict(compose(["experiment=smoke"])) | change
    with pytest.raises(ValueError, match=message):
        from_dict(settings)


def test_the_runs_of_an_experiment_do_not_share_a_folder(tmp_path):
    """`make reproduce ARGS=output_dir=...` would have trained one run of seven."""
    assert len(planned_runs("quick", [])) == 7
    with pytest.raises(ValueError, match=r"output_dir=\S+: the runs of an experiment have a folder each"):
        planned_runs("quick", [f"output_dir={tmp_path}"])
