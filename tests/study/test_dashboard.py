"""The example dashboard builds without a network and names what runs log."""

import json
import re
from pathlib import Path

import pytest
from study_rows import ROOT, run_script

pytest.importorskip("wandb_workspaces", reason="needs pip install alibi_lm[dashboard]")


def test_the_dashboard_builds_and_names_what_training_logs():
    done = run_script("../examples/wandb_dashboard.py", "project=p", "experiment=quick", "dry_run=true")
    assert done.returncode == 0, done.stderr
    spec = json.loads(done.stdout)["spec"]["section"]
    sections = spec["panelBankConfig"]["sections"]
    assert [len(part["panels"]) for part in sections] == [2, 4, 4, 4]
    named = set()
    for panel in (panel for part in sections for panel in part["panels"]):
        named |= set(panel["config"].get("metrics", [])) | {panel["config"].get("xAxis", "_step")}
    logged = set()
    for path in (Path(ROOT) / "docs/results/quick/runs").glob("*/metrics.jsonl"):
        logged |= {key for text in path.read_text().splitlines() for key in json.loads(text)}
    assert named - {"_step"} <= logged and len(named) > 6
    (runs,) = spec["runSets"]
    assert [key["name"] for key in runs["grouping"]] == ["group", "position.value.name", "train_length.value"]
    assert re.search(r"'value': 'quick'", str(runs["filters"]))
