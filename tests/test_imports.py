"""Imports go down the floors of the house, heavy packages are imported late, and files stay readable."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = sorted((ROOT / "alibi_lm").rglob("*.py"))
FILES = [*PACKAGE, *sorted((ROOT / "benchmarks").rglob("*.py"))]
LAZY = {"wandb", "datasets", "tokenizers", "safetensors", "scipy", "matplotlib", "filelock", "transformers"}
LAZY |= {"huggingface_hub", "lm_eval"}
ADAPTERS = {"alibi_lm/interop/huggingface.py", "alibi_lm/interop/lm_eval.py"}
"""Files that extend the classes of a heavy package; nothing imports them but who asks for that package."""
FLOORS = [
    {"settings", "files"},
    {"positions", "optim", "runtime", "distributed"},
    {"attention", "data", "results", "checkpoint", "tracking"},
    {"model", "tasks"},
    {"config"},
    {"runs"},
    {"load"},
    {"evaluate", "generation", "interop", "study"},
    {"train", "benchmarks"},
    {"experiment"},
    {"cli"},
]
"""A room imports rooms of lower floors, and itself; settings and files are the ground that all stand on."""
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
NEVER = {
    "results": {"torch"},
    "study": {"torch", "alibi_lm.model", "alibi_lm.evaluate", "alibi_lm.runs"},
}
"""What reads results, and what tells of them, knows no model."""
TREES = {path: ast.parse(path.read_text()) for path in FILES}
LONG = {
    "alibi_lm/train.py": "a whole run, readable from top to bottom",
    "alibi_lm/interop/fairseq.py": "one format, from reading it to the run folder",
}
"""Files of more than 450 lines, and the reason for it."""


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return parts[0] if parts[0] != "alibi_lm" else parts[1].removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[str]:
    """Full names of all modules that are imported anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            if node.module == "alibi_lm":
                yield from (f"alibi_lm.{alias.name}" for alias in node.names)


def rooms(names: list[str]) -> set[str]:
    """Rooms of the house among module names."""
    parts = [name.split(".") for name in names]
    inside = {p[1] for p in parts if p[0] == "alibi_lm" and len(p) > 1}
    return (inside | {p[0] for p in parts if p[0] == "benchmarks"}) & set(FLOOR)


def test_every_room_has_a_floor():
    assert {room_of(f) for f in FILES} - {"__init__"} == set(FLOOR)


def test_imports_go_down():
    wrong = []
    for path in FILES:
        room, names = room_of(path), list(imports(TREES[path]))
        for other in rooms(names) - {room} if room != "__init__" else ():
            if FLOOR[other] >= FLOOR[room]:
                wrong.append(f"{path.relative_to(ROOT)} imports {other}, which is not on a floor below {room}")
        for start in NEVER.get(room, ()):
            wrong += [f"{path.relative_to(ROOT)} imports {n}" for n in names if f"{n}.".startswith(f"{start}.")]
    assert not wrong, "\n".join(wrong)


def test_heavy_packages_are_imported_where_they_are_used():
    for path, tree in TREES.items():
        if str(path.relative_to(ROOT)) in ADAPTERS:
            continue
        top = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
        assert not LAZY & {n.split(".")[0] for n in imports(ast.Module(body=list(top), type_ignores=[]))}, path


def test_files_stay_readable():
    for path in FILES:
        text = path.read_text()
        assert text.count("\n") <= 450 or str(path.relative_to(ROOT)) in LONG, f"{path}: split it, or say why not"
        assert "_target_" not in text and "cfg.get(" not in text
        assert text.isascii(), f"{path} holds characters beyond ASCII"


def test_only_an_experiment_starts_the_scripts():
    """A subprocess is an import that no floor sees: no room below `experiment` names a file of scripts/."""
    scripts = {path.name for path in (ROOT / "scripts").glob("*.py")}
    for path in PACKAGE:
        if room_of(path) in ("experiment", "cli"):
            continue
        code = TREES[path]
        calls = {
            n.func.attr for n in ast.walk(code) if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute)
        }
        strings = " ".join(_strings(code))
        if calls & {"run", "Popen", "check_call", "check_output"}:
            assert not [name for name in scripts if name in strings], path


def test_only_its_registry_knows_a_scheme():
    """No code outside positions/ names a scheme, not even within a longer string; words of messages may."""
    schemes = {p.stem for p in (ROOT / "alibi_lm" / "positions").glob("*.py")} - {"__init__", "base"}
    # Files of fairseq name schemes, the study words the paper's claims, the benchmark chooses what to measure.
    allowed = {"positions", "interop", "study", "benchmarks"}
    named = re.compile(rf"\bposition ?(?:=|==) ?({'|'.join(schemes)})\b|^({'|'.join(schemes)})$")
    for path in FILES:
        if room_of(path) in allowed:
            continue
        for text in _strings(TREES[path]):
            assert not named.search(text), f"{path.name} names a scheme: {text!r}"


def _strings(tree: ast.AST) -> list[str]:
    """All strings of a file but docstrings."""
    nodes = list(ast.walk(tree))
    docstrings = {id(n.value) for n in nodes if isinstance(n, ast.Expr)}
    constants = [n for n in nodes if isinstance(n, ast.Constant) and id(n) not in docstrings]
    return [n.value for n in constants if isinstance(n.value, str)]


@pytest.mark.parametrize(
    "code",
    [
        pytest.param(
            "import sys\n"
            f"for name in {sorted(LAZY)!r}: sys.modules[name] = None\n"
            "import torch, alibi_lm.train, alibi_lm.evaluate.sweep, alibi_lm.config, alibi_lm.experiment\n"
            "import alibi_lm.cli\n"
            "from alibi_lm.model.transformer import ModelConfig, TransformerLM\n"
            "from alibi_lm.positions import POSITIONS\n"
            "for name in POSITIONS:\n"
            "    sizes = ModelConfig(num_layers=1, model_dim=16, num_heads=2, ffn_dim=16)\n"
            "    model = TransformerLM(sizes, POSITIONS[name](), 'auto', 20, 64)\n"
            "    tokens = torch.randint(0, 20, (2, 64))\n"
            "    model.nats(tokens, tokens).sum().backward()\n"
            # Two seconds that an evaluation need not wait (an optimizer of torch loads it, whatever we do).
            "assert 'torch._dynamo' not in sys.modules\n",
            id="a training step needs torch, numpy, tqdm and Hydra only, and loads no compiler",
        ),
        pytest.param(
            "import sys; sys.modules['torch'] = None\n"
            "import alibi_lm.results.rows, alibi_lm.results.documents, alibi_lm.results.statistics\n",
            id="results are read without torch",
            marks=pytest.mark.skipif(
                "torch" in (ROOT / "alibi_lm" / "__init__.py").read_text(), reason="the package imports it"
            ),
        ),
    ],
)
def test_what_an_import_needs(code):
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
