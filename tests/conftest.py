"""Fixtures shared by all tests: tiny models, a fixed seed, one thread."""

from __future__ import annotations

import gc
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# No test may reach the network, whatever the user's environment says.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")
os.environ.setdefault("WANDB_MODE", "offline")
# The suite fills the cores with processes; more threads in each would only wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

if (
    TYPE_CHECKING
):  # torch is imported below, where it is used: the process that only hands tests out needs none of it
    from alibi_lm.model.transformer import ModelConfig, TransformerLM

ROOT = Path(__file__).resolve().parent.parent
Command = Callable[..., subprocess.CompletedProcess[str]]
WORDS = "the cat sat on a mat while dogs ran past old trees in deep green woods near home today".split()


def pytest_collection_finish() -> None:
    """Compute as the commands do, and spare the garbage collector the 800,000 objects of the imported modules."""
    import torch

    torch.set_flush_denormal(True)
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    seed(0)


def seed(number: int) -> None:
    """Like torch.manual_seed, which takes longer than a test without a GPU: it notes the call stack thrice."""
    import torch

    if torch.cuda.is_available():
        torch.manual_seed(number)
    else:
        torch.default_generator.manual_seed(number)


@pytest.fixture
def tiny_config() -> ModelConfig:
    from alibi_lm.model.transformer import ModelConfig

    return ModelConfig(num_layers=2, model_dim=24, num_heads=3, ffn_dim=48)


@pytest.fixture
def tiny_model(tiny_config: ModelConfig):
    """Build a tiny model: tiny_model("alibi", attention="eager", train_length=128, **position settings)."""
    from alibi_lm.model.transformer import TransformerLM
    from alibi_lm.positions import POSITIONS

    def build(
        position: str,
        attention: str = "eager",
        train_length: int = 128,
        context_length: int | None = None,
        vocab_size: int = 50,
        **settings: object,
    ) -> TransformerLM:
        seed(1)
        scheme = POSITIONS[position](**settings)
        model = TransformerLM(tiny_config, scheme, attention, vocab_size, train_length, context_length)
        return model.eval()

    return build


@pytest.fixture
def logged() -> Iterator[list[logging.LogRecord]]:
    """What the package logs during the test, from INFO on; pytest's own fixture for it slows every test down."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logger = logging.getLogger("alibi_lm")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel("INFO")
    yield records
    logger.removeHandler(handler)
    logger.setLevel(level)


def _write_text(folder: Path) -> Path:
    """A small WikiText-like corpus: a few articles of repeating word order, different in each split."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, (split, lines) in enumerate((("train", 300), ("valid", 40), ("test", 40))):
        text = []
        for line in range(lines):
            if line % 20 == 0:
                text += ["", f" = {WORDS[line // 20 % 18]} = ", ""]
            start = (line * 7 + index) % 18
            text.append(" " + " ".join(WORDS[(start + i * (1 + line % 3)) % 18] for i in range(12)) + " ")
        (folder / f"wiki.{split}.tokens").write_text("\n".join(text) + "\n")
    return folder


@pytest.fixture(scope="session")
def write_text() -> Callable[[Path], Path]:
    """Write a small WikiText-like corpus into a folder: write_text(folder) -> folder."""
    return _write_text


@pytest.fixture(scope="session")
def command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    """Run a script as a user does: command(folder, "train.py", *arguments, **environment) -> CompletedProcess.

    The process is a fork of one that has all modules loaded (command_server.py); nothing else differs.
    """
    output = tmp_path_factory.mktemp("commands") / "printed"
    server = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "command_server.py")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert server.stdin is not None and server.stdout is not None

    def run(folder: Path, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        request = {"script": str(ROOT / "scripts" / script), "arguments": arguments, "folder": str(folder)}
        request |= {"environment": environment, "output": str(output)}
        print(json.dumps(request), file=server.stdin, flush=True)
        status = int(server.stdout.readline())
        printed = (Path(f"{output}.{name}").read_text() for name in ("out", "err"))
        return subprocess.CompletedProcess([script, *arguments], status, *printed)

    yield run
    server.communicate(timeout=60)
