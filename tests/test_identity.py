"""Files that belong to another run are refused, wherever they lie, and a run is known by what it depends on."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from alibi_lm import load_run
from alibi_lm.checkpoint import record_hash
from alibi_lm.config import TrainConfig, from_yaml, to_yaml
from alibi_lm.experiment import compose
from alibi_lm.files import read_json
from alibi_lm.runs import folder_identity, run_identity
from alibi_lm.settings import counting, identifying
from alibi_lm.train import train

TINY = [
    "experiment=smoke", "data=wikitext2", "tokenizer=word", "tracking=jsonl", "device=cpu", "threads=1",
    "train_length=8", "steps=4", "tokens_per_step=32", "log_every=2", "validate_every=2", "checkpoint_every=2",
    "model.model_dim=16", "model.ffn_dim=16",
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, write_text: Callable[[Path], Path]) -> Path:
    """Two finished runs whose weights fit each other, `alibi` and `rotary`, and `other`, on another text."""
    folder = tmp_path_factory.mktemp("identity")
    for name, position, text in (
        ("alibi", "alibi", "text"), ("rotary", "rotary", "text"), ("other", "alibi", "more"),
    ):  # fmt: skip
        if not (folder / text).exists():
            write_text(folder / text)
        if text == "more":
            file = folder / text / "wiki.train.tokens"
            file.write_text("\n".join(file.read_text().split("\n")[::-1]))
        train(config(folder, f"position={position}", f"data.path={folder / text}"), folder / name)
    return folder


def config(place: Path, *more: str) -> TrainConfig:
    return compose([*TINY, f"data.path={place / 'text'}", f"data.cache_dir={place / 'cache'}", *more])


def strip(run: Path) -> None:
    """Make a run look like one of before files carried the identity of their run."""
    for path in (run / "finished.json", run / "checkpoints" / "best.json"):
        content = read_json(path)
        path.write_text(json.dumps({k: v for k, v in content.items() if not k.startswith("run")}))
    for path in run.glob("checkpoints/step-*/state.json"):
        record = read_json(path)
        del record["sha256"], record["state"]["run"], record["state"]["run_name"], record["state"]["metrics_rows"]
        path.write_text(json.dumps(record | {"sha256": record_hash(record)}))


SWAPS = [
    (("checkpoints",), "rotary"),
    (("checkpoints/best.json",), "rotary"),
    (("finished.json",), "rotary"),
    (("config.yaml",), "rotary"),
    (("corpus.json",), "other"),
    (("corpus.json", "tokenizer.json"), "other"),
    (("checkpoints", "finished.json"), "rotary"),
]


@pytest.mark.parametrize("age", ["new", "old"])
@pytest.mark.parametrize(("files", "source"), SWAPS, ids=str)
def test_what_came_from_another_run_is_refused(
    place: Path, tmp_path: Path, files: tuple[str, ...], source: str, age: str
) -> None:
    run, theirs = (shutil.copytree(place / name, tmp_path / name) for name in ("alibi", source))
    if age == "old":
        strip(run)
        strip(theirs)
    load_run(run)
    for file in files:
        if (run / file).is_dir():
            shutil.rmtree(run / file)
            shutil.copytree(theirs / file, run / file)
        else:
            shutil.copy(theirs / file, run / file)
    with pytest.raises(ValueError, match=r"(another run).*Put the run's own file back") as caught:
        load_run(run)
    assert str(run) in str(caught.value)
    if age == "new" and source == "rotary":  # both runs are named
        assert "alibi_L8_s1" in str(caught.value) and "rotary_L8_s1" in str(caught.value)


@pytest.mark.parametrize("age", ["new", "old"])
def test_metrics_of_another_run_or_cut_ones_are_not_continued(place: Path, tmp_path: Path, age: str) -> None:
    run = shutil.copytree(place / "alibi", tmp_path / "alibi")
    if age == "old":
        strip(run)
    (run / "finished.json").unlink()
    whole = (run / "metrics.jsonl").read_text()
    for content, message in (
        ((place / "rotary" / "metrics.jsonl").read_text(), r"validation/loss = .* it is another run's"),
        ("", r"holds 0 of the \d rows that were written up to step 4"),
        (whole.splitlines(keepends=True)[0], r"holds 1 of the \d rows"),
    ):
        (run / "metrics.jsonl").write_text(content)
        with pytest.raises(ValueError, match=message):
            train(config(place, "position=alibi"), run)
        assert (run / "metrics.jsonl").read_text() == content and not (run / "finished.json").exists()
        (run / "metrics.jsonl").unlink()
        with pytest.raises(ValueError, match="holds 0 of"):
            train(config(place, "position=alibi"), run)
    (run / "metrics.jsonl").write_text(whole)
    assert train(config(place, "position=alibi"), run)["steps"] == 4
    assert (run / "metrics.jsonl").read_text() == whole


def test_a_finished_run_of_another_folder_is_not_called_finished(place: Path, tmp_path: Path) -> None:
    run = shutil.copytree(place / "alibi", tmp_path / "alibi")
    shutil.copy(place / "rotary" / "finished.json", run / "finished.json")
    with pytest.raises(ValueError, match=r"another run, rotary_L8_s1"):
        train(config(place, "position=alibi"), run)


def test_where_text_and_files_lie_is_no_part_of_a_run(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(place / "alibi", tmp_path / "moved")
    for spelling in (f"{place}/text/", f"{place}/./text", "/nowhere"):  # finished: the text is not even opened
        train(config(place, "position=alibi", f"data.path={spelling}", "data.cache_dir=/no", "keep_last=2"), run)
        assert "already finished at step 4" in capsys.readouterr().out
    (run / "finished.json").unlink()
    copy = shutil.copytree(place / "text", tmp_path / "copy")
    elsewhere = [f"data.path={copy}/", f"data.cache_dir={tmp_path / 'cache'}"]
    train(config(place, "position=alibi", *elsewhere), run)
    assert "resumes at step 4" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"other settings \(clip_norm: 1.0 there, 2.0 now"):
        train(config(place, "position=alibi", "clip_norm=2"), run)


def test_identity_is_of_what_counts(place: Path) -> None:
    manifest = read_json(place / "alibi" / "corpus.json")
    first = config(place, "position=alibi")
    same = run_identity(first, manifest)
    assert folder_identity(place / "alibi") == same == read_json(place / "alibi" / "finished.json")["run"]
    for changed in (["data.path=/other", "data.cache_dir=x"], ["device=auto", "threads=2", "tracking=wandb"],
                    ["keep_last=3", "log_every=1", "measurements=[]", "output_dir=x"]):  # fmt: skip
        assert run_identity(config(place, "position=alibi", *changed), manifest) == same, changed
    for changed in ("seed=2", "position.learned_slopes=true", "optimizer.lr=0.1", "attention=eager"):
        assert run_identity(config(place, "position=alibi", changed), manifest) != same, changed
    assert run_identity(first, read_json(place / "other" / "corpus.json")) != same


@pytest.mark.parametrize(
    "finished", sorted(Path("docs/results").glob("*/runs/*s1*/finished.json")), ids=lambda p: p.parent.name
)
def test_published_runs_are_still_known_by_what_they_were(finished: Path) -> None:
    """A setting that was added without `later` or `before` changes the identity of runs that lack it."""
    assert folder_identity(finished.parent) == read_json(finished).get("run", folder_identity(finished.parent))


def test_a_run_of_before_a_setting_is_read_as_what_it_did(place: Path, tmp_path: Path) -> None:
    manifest, now = read_json(place / "alibi" / "corpus.json"), config(place, "position=alibi")
    later = {"query_scale.name", "position.scaling", "position.factor"}
    assert later <= set(counting(now, "run")) and not later & set(identifying(now))
    for changed in ("query_scale=log_n", "query_scale=ssmax", "position.scaling=linear"):
        assert run_identity(config(place, "position=alibi", changed), manifest) != run_identity(now, manifest)
    old, new = config(place, "task=needle", "task.training_depths=11"), config(place, "task=needle")
    text = to_yaml(old)
    assert from_yaml(text.replace("  training_depths: 11\n", "")) == old != new
    assert run_identity(old, manifest) != run_identity(new, manifest)
    assert "task.training_depths" not in identifying(old)


def test_a_trained_query_scale_is_loaded_and_changed_with_its_weights(place: Path, tmp_path: Path) -> None:
    trained = config(place, "position=alibi", "query_scale=ssmax", "query_scale.start=0.7")
    train(trained, tmp_path / "run")
    model = load_run(tmp_path / "run")
    weights = [scale.detach().clone() for scale in model.query_scale.scales]
    assert all((scale != 0.7).any() for scale in weights)
    changed = load_run(tmp_path / "run", query_scale={"scale_bias": True})
    assert changed.query_scale.config.scale_bias
    for scale, weight in zip(changed.query_scale.scales, weights, strict=True):
        assert torch.equal(scale, weight)
    assert load_run(tmp_path / "run", query_scale={"name": "none"}).query_scale.factors(torch.tensor([5])) == []
    # Another start changes nothing any more, and must not stand in a row as if it did.
    with pytest.raises(ValueError, match=r"query_scale\.start = 2\.0 changes nothing in a run that is trained"):
        load_run(tmp_path / "run", query_scale={"start": 2.0})
    load_run(tmp_path / "run", query_scale={"name": "ssmax", "start": 0.7, "scale_bias": True})


# --- load_run ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inference_length": 0}, "inference_length = 0. Use a whole number >= 1"),
        ({"inference_length": -5}, "inference_length = -5"),
        ({"inference_length": 8.0}, "inference_length = 8.0"),
        ({"inference_length": True}, "inference_length = True"),
        ({"inference_length": "8"}, "inference_length = '8'"),
        ({"checkpoint": "newest"}, "checkpoint = 'newest' is not known. Use best, last or step:<number>"),
        ({"attention": "flash"}, "attention = 'flash'. Allowed: auto"),
        ({"device": "gpu"}, "device = 'gpu'. Use cpu"),
        ({"device": "cuda:77"}, r"device = cuda:77, but torch finds \d+ CUDA devices"),
        ({"precision": "half"}, "precision = 'half'. Allowed: auto, float32, bfloat16"),
        ({"position": {"theta": 2.0}}, "does not fit position=alibi"),
        ({"query_scale": {"name": "logn"}}, "Give settings as a mapping; names: none, log_n, ssmax"),
        ({"query_scale": {"name": "log_n", "start": 1.0}}, "does not fit query_scale=log_n"),
    ],
    ids=str,
)
def test_arguments_that_make_no_sense(place: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_run(place / "alibi", **arguments)


def test_cuda_where_there_is_none(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"device = cuda, but torch finds 0 CUDA devices here\."):
        load_run(place / "alibi", device="cuda")


def test_a_folder_that_is_no_run(place: Path) -> None:
    for folder in (place, place / "nowhere"):
        with pytest.raises(ValueError, match=r"is not a run folder: it has no config\.yaml"):
            load_run(folder)


def test_a_model_says_what_its_scores_depend_on(place: Path, tmp_path: Path) -> None:
    model = load_run(place / "rotary")
    assert (model.label, model.precision, model.training) == ("rotary", "float32", False)
    shutil.copytree(place / "rotary", tmp_path / "renamed")
    assert load_run(tmp_path / "renamed", 64, device="cpu").identity == model.identity
    others = [
        load_run(place / "alibi"),
        load_run(place / "rotary", precision="bfloat16"),
        load_run(place / "rotary", attention="eager"),
        load_run(place / "rotary", position={"scaling": "yarn", "factor": 2.0}),
        load_run(place / "rotary", query_scale={"name": "log_n"}),
        load_run(place / "rotary", query_scale={"name": "ssmax", "start": 0.5}),
    ]
    assert len({model.identity, *(other.identity for other in others)}) == 7
    assert all((scale == 0.5).all() for scale in others[-1].query_scale.scales)
    assert load_run(place / "rotary", precision="auto").identity == model.identity
