"""What a demanding user tried from outside, and what must come of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from alibi_lm.experiment import compose
from alibi_lm.files import read_json, write_json
from alibi_lm.load import load_run
from alibi_lm.model.transformer import TransformerLM
from alibi_lm.train import train

Build = Callable[..., TransformerLM]


def train_on(text: Path) -> Path:
    """Train a run on a text; returns its folder, which lies beside the text."""
    settings = ["position=none", "data=wikitext103", "tokenizer=word", "tracking=jsonl", "steps=2", "device=cpu"]
    train(compose(["experiment=smoke", *settings, "threads=1", f"data.path={text}"]), text.parent / "run")
    return text.parent / "run"


@pytest.fixture(scope="module")
def trained(write_text: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run, trained on the text in `text` beside it."""
    return train_on(write_text(tmp_path_factory.mktemp("outside") / "text"))


def test_a_finished_run_is_not_taken_for_one_on_another_text(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved, other = (shutil.copytree(trained.parent / "text", trained.parent / name) for name in ("moved", "other"))
    with (other / "wiki.train.tokens").open("a") as file:
        file.write(" one more line \n")
    train_on(moved)
    assert "already finished" in capsys.readouterr().out
    with pytest.raises(ValueError, match="holds a run with another tokenizer"):
        train_on(other)
    assert "already finished" not in capsys.readouterr().out


def test_a_test_time_change_cannot_name_another_scheme(trained: Path) -> None:
    for change in ({"name": "alibi"}, "alibi"):
        with pytest.raises(ValueError, match="trained with position=none"):
            load_run(trained, position=change)  # type: ignore[arg-type]


@pytest.mark.parametrize("device", ["meta", "mps", "xla"])
def test_a_device_that_is_not_supported_is_refused(trained: Path, device: str) -> None:
    with pytest.raises(ValueError, match=f"device = {device}"):
        load_run(trained, device=device)


def test_arguments_out_of_range_are_refused(tiny_model: Build) -> None:
    model, ids = tiny_model("alibi"), torch.zeros(2, 6, dtype=torch.int64)
    for window in (0, -3, 2.5):
        with pytest.raises(ValueError, match=f"window = {window}"):
            model(ids, window=window)
    for score_from in (-1, 6, 7):
        with pytest.raises(ValueError, match=f"score_from = {score_from}"):
            model.score(ids, ids, score_from=score_from)
    for length in (0, -5, 2.5):
        with pytest.raises(ValueError, match=f"inference length = {length}"):
            model.serve(length)
    for call in (model, model.hidden):
        with pytest.raises(ValueError, match="input_ids = a tensor of shape"):
            call(ids.float())


def test_arguments_of_another_kind_are_refused(trained: Path) -> None:
    for folder in (None, 5):
        with pytest.raises(ValueError, match=f"folder = {folder}"):
            load_run(folder)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="checkpoint = None"):
        load_run(trained, checkpoint=None)  # type: ignore[arg-type]


def test_a_name_that_an_ascii_locale_could_not_decode_is_written_as_it_is(tmp_path: Path) -> None:
    name = "\u00fcmlaut"
    write_json(tmp_path / "record.json", {"folder": name.encode().decode("ascii", "surrogateescape")})
    assert read_json(tmp_path / "record.json") == {"folder": name}
