"""The page of reported bugs names tests that exist, one at least in every row."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "field_bugs.md").read_text()


def test_every_bug_has_a_test_that_exists():
    rows = [
        line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith(("| what", "| ---"))
    ]
    assert len(rows) >= 40
    for row in rows:
        named = re.findall(r"(tests/[\w/]+\.py)::(\w+)", row)
        assert named, row
        for file, name in named:
            tree = ast.parse((ROOT / file).read_text())
            assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, (file, name)
