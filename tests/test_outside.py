"""What a demanding user tried from outside, and what must come of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from alibi_lm.files import read_json, write_json
from alibi_lm.load import load_run
from alibi_lm.model.transformer import TransformerLM
from tests.conftest import Command

Build = Callable[..., TransformerLM]


@pytest.fixture(scope="module")
def trained(
    command: Command, write_text: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Callable[[Path], list[str]]]:
    """A finished run in `run` on the text in `text`, and the command that trains it on a text."""
    folder = tmp_path_factory.mktemp("outside")
    write_text(folder / "text")

    def training(text: Path) -> list[str]:
        settings = ["position=none", "data=wikitext103", "tokenizer=word", "tracking=jsonl", "steps=2"]
        return ["experiment=smoke", *settings, f"data.path={text}", f"output_dir={folder / 'run'}"]

    done = command(folder, "train.py", *training(folder / "text"))
    assert done.returncode == 0, done.stderr
    return folder, training


def test_a_finished_run_is_not_taken_for_one_on_another_text(
    trained: tuple[Path, Callable[[Path], list[str]]], command: Command
) -> None:
    folder, training = trained
    moved, other = folder / "moved", folder / "other"
    for place in (moved, other):
        shutil.copytree(folder / "text", place)
    with (other / "wiki.train.tokens").open("a") as file:
        file.write(" one more line \n")
    again = command(folder, "train.py", *training(moved))
    assert again.returncode == 0 and "already finished" in again.stdout
    refused = command(folder, "train.py", *training(other))
    assert refused.returncode == 1 and "holds a run with another tokenizer" in refused.stderr
    assert "already finished" not in refused.stdout


def test_a_test_time_change_cannot_name_another_scheme(
    trained: tuple[Path, Callable[[Path], list[str]]],
) -> None:
    for change in ({"name": "alibi"}, "alibi"):
        with pytest.raises(ValueError, match="trained with position=none"):
            load_run(trained[0] / "run", position=change)  # type: ignore[arg-type]


@pytest.mark.parametrize("device", ["meta", "mps", "xla"])
def test_a_device_that_is_not_supported_is_refused(
    trained: tuple[Path, Callable[[Path], list[str]]], device: str
) -> None:
    with pytest.raises(ValueError, match=f"device = {device}"):
        load_run(trained[0] / "run", device=device)


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
    for targets in (ids[:1], ids[:, :5]):
        with pytest.raises(ValueError, match="target_ids of shape"):
            model.nats(ids, targets)
    for call in (model, model.hidden):
        with pytest.raises(ValueError, match="input_ids = a tensor of shape"):
            call(ids.float())


def test_arguments_of_another_kind_are_refused(trained: tuple[Path, Callable[[Path], list[str]]]) -> None:
    for folder in (None, 5):
        with pytest.raises(ValueError, match=f"folder = {folder}"):
            load_run(folder)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="checkpoint = None"):
        load_run(trained[0] / "run", checkpoint=None)  # type: ignore[arg-type]


def test_a_name_that_an_ascii_locale_could_not_decode_is_written_as_it_is(tmp_path: Path) -> None:
    name = "\u00fcmlaut"
    write_json(tmp_path / "record.json", {"folder": name.encode().decode("ascii", "surrogateescape")})
    assert read_json(tmp_path / "record.json") == {"folder": name}
