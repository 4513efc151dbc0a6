"""Imports go one way, heavy packages are imported where they are used, and files stay small."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "alibi_lm").rglob("*.py"))
LAZY = {"wandb", "datasets", "tokenizers", "safetensors", "scipy", "matplotlib", "filelock", "transformers"}
# The floors of the house: a room may import from its own floor and from lower ones.
LEVELS = [
    {"settings", "files", "runtime", "distributed", "optim", "positions"},
    {"attention", "data", "results", "checkpoint", "tracking"},
    {"model", "tasks"},
    {"config"},
    {"identity", "runs"},
    {"evaluate", "interop", "study"},
    {"trainer", "train", "bench"},
    {"experiment"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}


def module_of(path: Path) -> str:
    return path.relative_to(ROOT / "alibi_lm").parts[0].removesuffix(".py")


def imports(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "alibi_lm":
                yield from (f"alibi_lm.{alias.name}" for alias in node.names)
            else:
                yield node.module


def test_every_module_has_a_level():
    assert {module_of(f) for f in FILES} - {"__init__"} == set(LEVEL) & {module_of(f) for f in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    if module_of(path) == "__init__":
        return
    level = LEVEL[module_of(path)]
    for name in imports(ast.parse(path.read_text())):
        if name.startswith("alibi_lm."):
            imported = name.split(".")[1]
            assert LEVEL[imported] <= level, (
                f"{path.name} (level {level}) imports {name} (level {LEVEL[imported]})"
            )


def test_the_study_reads_files_and_never_models():
    for path in FILES:
        if module_of(path) == "study":
            names = set(imports(ast.parse(path.read_text())))
            assert not {n for n in names if n.split(".")[0] == "torch" or n.startswith("alibi_lm.model")}, path


def test_only_its_registry_knows_a_scheme():
    """Nothing outside positions/ (and the importer, whose files name schemes) mentions a scheme in code."""
    schemes = {p.stem for p in (ROOT / "alibi_lm" / "positions").glob("*.py")} - {"__init__", "base"}
    allowed = {"positions", "interop", "study", "bench"}
    for path in FILES:
        if module_of(path) in allowed:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert node.value not in schemes, f"{path.name} names the scheme {node.value!r}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_heavy_packages_are_imported_lazily(path):
    top = ast.Module(
        body=[n for n in ast.parse(path.read_text()).body if isinstance(n, ast.Import | ast.ImportFrom)],
        type_ignores=[],
    )
    assert not LAZY & {name.split(".")[0] for name in imports(top)}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_readable(path):
    text = path.read_text()
    assert text.count("\n") <= 420, f"{path} has grown: split it"
    assert "_target_" not in text and "cfg.get(" not in text
    assert text.isascii(), f"{path} holds characters beyond ASCII"


def test_a_training_step_loads_no_compiler():
    """Two seconds that an evaluation need not wait (an optimizer of torch loads it, whatever we do)."""
    code = (
        "import sys, torch, alibi_lm.train\n"
        "from alibi_lm.model.transformer import ModelConfig, TransformerLM\n"
        "from alibi_lm.positions import POSITIONS\n"
        "for name in POSITIONS:\n"
        "    sizes = ModelConfig(num_layers=1, model_dim=16, num_heads=2, ffn_dim=16)\n"
        "    model = TransformerLM(sizes, POSITIONS[name](), 'auto', 20, 64)\n"
        "    tokens = torch.randint(0, 20, (2, 64))\n"
        "    model.nats(tokens, tokens).sum().backward()\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_package_imports_without_the_lazy_packages():
    """A machine with only torch, numpy, tqdm and Hydra can import all that training needs."""
    code = (
        "import sys\n"
        f"for name in {sorted(LAZY)!r}: sys.modules[name] = None\n"
        "import alibi_lm.train, alibi_lm.evaluate.sweep, alibi_lm.config, alibi_lm.experiment\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
