"""The dashboard names what runs really log, needs no network to be built, and is sent as it was built."""

import ast
import glob
import importlib.util
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("wandb_workspaces", reason="needs pip install alibi_lm[dashboard]")

from study_rows import curve

from alibi_lm.evaluate.config import EvaluateConfig
from alibi_lm.evaluate.sweep import log_curve
from alibi_lm.experiment import compose
from alibi_lm.results.rows import write_rows
from alibi_lm.study.dashboard import GROUPING, build, specification
from alibi_lm.tracking import WandbConfig, read_metrics
from alibi_lm.train import train

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "wandb_dashboard.py"
WANDB = str(Path(sys.executable).with_name("wandb"))
QUIET = {"WANDB_ERROR_REPORTING": "false"}


def load_script() -> Any:
    spec = importlib.util.spec_from_file_location("wandb_dashboard", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def panels(settings: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    spec = specification(build("p", **settings or {}))["spec"]
    return [panel for part in spec["section"]["panelBankConfig"]["sections"] for panel in part["panels"]]


def metrics_of_panels() -> set[str]:
    names = set()
    for panel in panels():
        config = panel["config"]
        names |= set(config.get("metrics", [])) | {config.get("xAxis", "_step")}
    return names - {"_step"}


# --- without a network ---------------------------------------------------------------------------


def test_dry_run_prints_the_specification_and_opens_no_socket(monkeypatch, capsys):
    def refuse(*arguments: object, **settings: object) -> None:
        raise AssertionError(f"network or another process: {arguments}")

    for name in ("connect", "connect_ex", "sendto", "bind"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(subprocess, "Popen", refuse)  # wandb's service process would connect in our stead
    load_script().task(["project=p", "entity=team", "experiment=quick", "dry_run=true"])
    printed = json.loads(capsys.readouterr().out)
    assert {k: printed[k] for k in ("entity", "project", "displayName")} == {
        "entity": "team",
        "project": "p",
        "displayName": "alibi_lm quick",
    }
    sections = printed["spec"]["section"]["panelBankConfig"]["sections"]
    assert [(s["name"], len(s["panels"])) for s in sections] == [
        ("Extrapolation", 2),
        ("Training loss by scheme", 4),
        ("Validation loss by scheme", 4),
        ("Throughput and memory", 4),
    ]
    assert all(s["isOpen"] for s in sections)


def test_runs_are_grouped_by_experiment_scheme_and_training_length():
    section = specification(build("p", experiment="quick"))["spec"]["section"]
    (runs,) = section["runSets"]
    assert [(key["section"], key["name"]) for key in runs["grouping"]] == [
        ("run", "group"),
        ("config", "position.value.name"),  # the app keeps every setting of the first level under `value`
        ("config", "train_length.value"),
    ]
    (chosen,) = runs["filters"]["filters"]
    assert (chosen["key"], chosen["op"], chosen["value"]) == ({"section": "run", "name": "group"}, "=", "quick")
    assert section["settings"]["useRunsTableGroupingInPanels"] is True
    everything = specification(build("p"))["spec"]["section"]["runSets"][0]
    assert everything["filters"]["filters"] == [] and everything["grouping"] == runs["grouping"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["project="], "project = ''"),
        (["project=a/b"], "project = 'a/b'"),
        (["entity=my team"], "entity = 'my team'"),
        (["experiment=x') or ('"], "experiment = "),
        (["experiment="], "experiment = ''"),
        (["dry_run=maybe"], "dry_run = maybe; it must be true or false"),
        (["name=x"], "Allowed: project=, entity=, experiment=, dry_run="),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_script().task(["dry_run=true", *arguments])


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    for name in [n for n in sys.modules if n.startswith("wandb_workspaces.")]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        ValueError, match=r"needs the package wandb-workspaces .*pip install alibi_lm\[dashboard\]"
    ):
        build("p")


# --- the names are those of real runs ------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder where one tiny run was trained and a curve was logged, both offline."""
    place = tmp_path_factory.mktemp("place")
    for name, lines in (("train", 40), ("valid", 6), ("test", 1)):
        line = " the cat sat on a mat while dogs ran past \n"
        (place / f"wiki.{name}.tokens").write_text(" = Title = \n" + line * lines)
    config = compose([
        "experiment=smoke", "tracking=wandb", "tokenizer=word", "data=wikitext2", f"data.path={place}",
        f"data.cache_dir={place / 'cache'}", "device=cpu", "threads=1", "position=alibi", "train_length=8",
        "steps=2", "tokens_per_step=16", "log_every=1", "validate_every=1", "model.num_layers=1",
        "model.model_dim=16", "model.num_heads=2", "model.ffn_dim=16",
    ])  # fmt: skip
    train(config, place / "outputs/smoke/runs/alibi_L8_s1")
    results = place / "outputs/smoke/extrapolation"
    results.mkdir()
    rows = curve("alibi", {64: 20.0, 128: 20.5}) + curve("alibi", {64: 19.0}, mode="sliding", stride=1)
    write_rows(results / "results.jsonl", rows)
    log_curve(EvaluateConfig(experiment="smoke", output_dir=str(results), tracking=WandbConfig()))
    return place


def records(folder: Path) -> list[dict[str, Any]]:
    """What wandb's own reader finds in the one offline run below a folder."""
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    command = [WANDB, "leet", "inspect", "--json", str(file)]
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | QUIET).stdout
    return [json.loads(line) for line in output.splitlines()]


def run_and_config(found: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    (run,) = [record["run"] for record in found if record["type"] == "run"]
    config = dict(run["config"]["update"])
    for record in found:
        if record["type"] == "config":
            config |= record["config"]["update"]
    return run, config


def test_metrics_are_those_of_a_training_run(place):
    rows = read_metrics(place / "outputs/smoke/runs/alibi_L8_s1/metrics.jsonl")
    logged = {name for row in rows for name in row} - {"step"}
    # Every metric is drawn, and nothing else: a renamed one fails here from both sides.
    assert metrics_of_panels() == logged
    with_tokens = [row for row in rows if "tokens_seen" in row]
    (panel,) = [p for p in panels() if p["config"].get("xAxis") == "tokens_seen"]
    assert with_tokens and all(set(panel["config"]["metrics"]) <= set(row) for row in with_tokens)


def test_metrics_are_those_in_the_trainers_source():
    tree = ast.parse((ROOT / "alibi_lm" / "trainer.py").read_text())
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "tracker.log"]
    logged = {key.value for call in calls for key in call.args[1].keys}
    assert "validation/loss" in logged and metrics_of_panels() == logged


def test_grouping_is_by_what_a_training_run_has(place, capsys):
    run, config = run_and_config(records(place / "outputs/smoke/runs/alibi_L8_s1"))
    assert run["run_group"] == "smoke"
    assert GROUPING == ("position.name", "train_length")
    assert config["position"]["name"] == "alibi" and config["train_length"] == 8
    load_script().task(["dry_run=true"])
    assert run["project"] == json.loads(capsys.readouterr().out)["project"]


def test_the_curve_is_the_table_that_an_evaluation_logs(place):
    found = records(place / "outputs/smoke/extrapolation")
    run, config = run_and_config(found)
    assert run["run_group"] == "smoke"
    chart, table, speed, memory = [p for p in panels() if p["viewType"] in ("Vega2", "Weave")]
    (query,) = chart["config"]["userQuery"]["queryFields"]
    (wanted,) = [field for field in query["fields"] if field["name"] == "summaryTable"]
    (key,) = [argument["value"] for argument in wanted["args"] if argument["name"] == "tableKey"]
    assert json.dumps({"val": key})[1:-1] in json.dumps(table["config"])

    summary = {}  # where `summaryTable` and the table panel look
    for record in found:
        if record["type"] == "summary":
            summary |= record["summary"]["update"]
    assert summary[f"{key}._type"] == "table-file"
    (file,) = (place / "outputs/smoke/extrapolation").glob(f"wandb/offline-run-*/files/media/table/{key}_0*.json")
    logged = json.loads(file.read_text())
    columns = set(logged["columns"])
    at = [logged["columns"].index(name) for name in ("curve", "inference_length", "perplexity")]
    name = "alibi_L64_s1"
    points = [[row[i] for i in at] for row in logged["data"]]
    assert sorted(points) == [[name, 64, 20.0], [name, 128, 20.5], [f"{name} stride 1", 64, 19.0]]
    assert summary[f"extrapolation/{name} stride 1@64"] == 19
    for panel in (chart, speed, memory):
        assert set(panel["config"]["fieldSettings"].values()) <= columns
        assert panel["config"]["userQuery"] == chart["config"]["userQuery"]
    own = config[f"_wandb.visualize.{key}_plot"]["panel_config"]
    assert own["fieldSettings"] == chart["config"]["fieldSettings"]
    assert own["panelDefId"] == chart["config"]["panelDefId"]


# --- the page ------------------------------------------------------------------------------------

PAGE = (ROOT / "docs" / "dashboard.md").read_text()


def test_the_documented_paths_are_the_offline_runs(place):
    patterns = re.findall(r"^wandb sync (\S+)$", PAGE, flags=re.MULTILINE)
    assert len(patterns) == 2
    matched = [
        Path(p) for pattern in patterns for p in glob.glob(pattern.replace("/quick/", "/smoke/"), root_dir=place)
    ]
    existing = [p.relative_to(place).parent for p in place.rglob("run-*.wandb") if "latest-run" not in p.parts]
    assert len(matched) == 2 and sorted(matched) == sorted(existing)
    command = " ".join(shlex.quote(str(p)) for p in matched)
    done = subprocess.run(
        f"{shlex.quote(WANDB)} sync --dry-run {command}",
        shell=True, cwd=place, env=os.environ | QUIET, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "Would sync 2 run(s)" in done.stderr
    assert all(str(path) in done.stderr for path in matched)


def test_options_on_the_page_exist():
    done = subprocess.run([WANDB, "sync", "--help"], capture_output=True, text=True, check=True)
    options = re.findall(r"`(--?[a-z][a-z-]*)`", PAGE)
    assert {"--dry-run", "--include-synced", "-p", "-e"} == set(options)
    assert all(option in done.stdout for option in options)


def test_the_page_names_every_metric():
    named = set(re.findall(r"`([\w/]+)`", PAGE[PAGE.index("## What it shows") :]))
    assert metrics_of_panels() <= named


# --- publishing ----------------------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    """Answers like the part of the service that publishing needs; keeps what it was sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.status = 200
        self.views: list[dict[str, Any]] = []
        self.address = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if "upsertView(" in request["query"]:
            self.server.views.append(request["variables"])
        viewer = {"id": "u1", "entity": "me", "username": "me", "email": "", "flags": "{}", "teams": {"edges": []}}
        answer = {"viewer": viewer, "upsertView": {"view": {"id": "v1", "name": "nw-abc-v"}, "inserted": True}}
        body = json.dumps({"data": answer} if self.server.status == 200 else {"errors": []}).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def publishing(folder: Path, address: str, key: str | None, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not (k.startswith("WANDB_") or "proxy" in k.lower())}
    environment |= QUIET | {"HOME": str(folder), "NETRC": str(folder / "none"), "WANDB_BASE_URL": address}
    if key is not None:
        environment["WANDB_API_KEY"] = key
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        env=environment, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def short_error(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 1 and done.stdout == "" and "Traceback" not in done.stderr, done.stderr
    (message,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "It needs a network and an API key" in message and "dry_run=true" in message
    return message


@pytest.mark.parametrize("entity", [None, pytest.param("team", marks=pytest.mark.slow)])
def test_what_is_published_is_what_the_dry_run_shows(tmp_path, server, entity):
    arguments = [] if entity is None else [f"entity={entity}"]
    done = publishing(tmp_path, server.address, "a" * 40, "project=p", "experiment=quick", *arguments)
    assert done.returncode == 0, done.stderr
    owner = entity or "me"
    assert done.stdout == f"{server.address}/{owner}/p?nw=abc\n"
    (view,) = server.views
    assert (view["entityName"], view["projectName"], view["displayName"]) == (owner, "p", "alibi_lm quick")
    assert "id" not in view  # a new view: nobody's is overwritten

    def without_ids(spec: Any) -> str:
        return re.sub(r'"__id__": "\w+"', "", json.dumps(spec, sort_keys=True))

    assert without_ids(json.loads(view["spec"])) == without_ids(specification(build("p", owner, "quick"))["spec"])


def test_no_key_ends_in_a_short_message(tmp_path, server):
    assert "no API key" in short_error(publishing(tmp_path, server.address, None, "project=p"))


def test_a_refusal_ends_in_a_short_message(tmp_path, server):
    server.status = 401
    short_error(publishing(tmp_path, server.address, "a" * 40, "project=p"))
    assert server.views == []


@pytest.mark.slow  # wandb tries for half a minute
def test_no_network_ends_in_a_short_message(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
    short_error(publishing(tmp_path, address, "a" * 40, "project=p"))
