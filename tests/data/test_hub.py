"""The hub path through `datasets` itself, against a loopback server laid out like the hub's repository."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from .conftest import TEST, TRAIN, VALIDATION

REPOSITORY = "Salesforce/wikitext"
COMMIT = "b08601e04326c79dfdd32d625aee71d232d685c3"
DRIVER = """\
# Prepares as it is told, a line of JSON at a time, in one process: importing `datasets` takes seconds.
import json, os, sys, time
import datasets
from huggingface_hub import constants
from alibi_lm.data.prepare import prepare
from alibi_lm.data.config import DataConfig
from alibi_lm.data.tokenizers import WordConfig
for line in sys.stdin:
    task = json.loads(line)
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = task["offline"]
    if task["as_nobody"] and os.geteuid() == 0:
        os.seteuid(65534)
    started = time.perf_counter()
    try:
        corpus = prepare(DataConfig("wikitext103", cache_dir=task["cache"]), WordConfig())
        answer = {s: [v.words, v.bytes, v.text_sha256, len(v.documents)] for s, v in corpus.streams.items()}
    except ValueError as error:
        answer = str(error)
    if os.geteuid() != os.getuid():
        os.seteuid(os.getuid())
    print(json.dumps([answer, time.perf_counter() - started]), flush=True)
"""


CARD = """\
---
configs:
- config_name: {config}
  data_files:
  - split: test
    path: {config}/test-*
  - split: train
    path: {config}/train-*
  - split: validation
    path: {config}/validation-*
---
"""


def rows(text):
    """As the hub stores lines: with their line end, blank ones as nothing."""
    return ["" if not line.strip() else line + "\n" for line in text.removesuffix("\n").split("\n")]


class Hub(ThreadingHTTPServer):
    """Answers what `datasets` asks of the hub; everything else does not exist."""

    daemon_threads = True

    def __init__(self, port, config, texts, folder):
        super().__init__(("127.0.0.1", port), Handler)
        self.files: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.files["README.md"] = CARD.format(config=config).encode()
        for split, text in texts.items():
            path = folder / "part.parquet"
            pq.write_table(pa.table({"text": rows(text)}), path)
            self.files[f"{config}/{split}-00000-of-00001.parquet"] = path.read_bytes()


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        path = self.path.split("?")[0]
        self.server.requests.append(path)
        api, resolve = f"/api/datasets/{REPOSITORY}", f"/datasets/{REPOSITORY}/resolve/{COMMIT}/"
        if path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
            siblings = [{"rfilename": name} for name in self.server.files]
            self.send_json({"id": REPOSITORY, "sha": COMMIT, "private": False, "tags": [], "siblings": siblings})
        elif path.startswith(f"{api}/tree/{COMMIT}"):
            self.send_tree(path.removeprefix(f"{api}/tree/{COMMIT}").strip("/"))
        elif path.startswith(resolve) and path.removeprefix(resolve) in self.server.files:
            self.send(self.server.files[path.removeprefix(resolve)], "application/octet-stream")
        else:
            self.send(b"", "text/plain", 404)

    def send_tree(self, folder):
        if not folder:
            folders = sorted({name.split("/")[0] for name in self.server.files if "/" in name})
            self.send_json([{"type": "directory", "path": n, "oid": "0", "size": 0} for n in folders])
            return
        inside = {n: c for n, c in self.server.files.items() if n.startswith(folder + "/")}
        entries = [
            {"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
            for n, c in inside.items()
        ]
        self.send_json(entries) if entries else self.send(b"", "text/plain", 404)

    def send_json(self, content):
        self.send(json.dumps(content).encode(), "application/json")

    def send(self, body, kind, status=200):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        if status == 404:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@contextmanager
def serving(server):
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class Preparing:
    """The process that prepares, told to take `endpoint` for the hub."""

    def __init__(self, endpoint, home):
        environment = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
        environment |= {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(home),
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def __call__(self, cache, offline=False, as_nobody=False):
        """Counts of the splits, or the error's message; and the seconds that it took."""
        task = {"cache": str(cache), "offline": offline, "as_nobody": as_nobody}
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()
        return tuple(json.loads(self.process.stdout.readline()))


@pytest.fixture(scope="module")
def port():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return unused.getsockname()[1]


@pytest.fixture(scope="module")
def preparing(port, tmp_path_factory):
    running = Preparing(f"http://127.0.0.1:{port}", tmp_path_factory.mktemp("home"))
    with running.process:
        yield running
        running.process.kill()


TEXTS = {"train": TRAIN, "validation": VALIDATION, "test": TEST}
# Line for line and byte for byte what the original files hold, blank lines included.
EXPECTED = {
    split: [
        len(text.split()) + text.count("\n"),
        len(text.encode()),
        hashlib.sha256(text.encode()).hexdigest(),
        2 if split == "train" else 1,
    ]
    for split, text in TEXTS.items()
}


def assert_helpful(message, *causes):
    for part in (*causes, "data.path=<folder>", "data=python_stdlib", "wikitext-103-v1"):
        assert part in message


@pytest.mark.parametrize("offline", [False, True])
def test_without_a_network_the_error_is_quick_and_names_the_ways_out(offline, preparing, tmp_path):
    message, seconds = preparing(tmp_path / "streams", offline=offline)
    assert_helpful(message, "HF_HUB_OFFLINE is set" if offline else "does not answer")
    assert seconds < 15, "left to itself, datasets tries again for 24 s"


def test_a_server_that_never_answers_is_given_up_soon(port, preparing, tmp_path):
    with socket.socket() as silent:
        silent.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        silent.bind(("127.0.0.1", port))
        silent.listen(8)
        message, seconds = preparing(tmp_path / "streams")
    assert_helpful(message, "does not answer")
    assert seconds < 15


def test_a_hub_without_the_text_is_reported(port, preparing, tmp_path):
    with serving(Hub(port, "another-config", {"train": TRAIN}, tmp_path)):
        message, _ = preparing(tmp_path / "streams")
    assert_helpful(message, "could not be loaded from the hub")


@pytest.fixture
def open_folder():
    """A temporary folder that other users may enter, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def test_text_comes_from_the_hub_then_from_its_cache(port, open_folder):
    home = open_folder / "home"
    preparing = Preparing(f"http://127.0.0.1:{port}", home)
    with preparing.process:
        with serving(Hub(port, "wikitext-103-v1", {**TEXTS, "train": "\ufeff" + TRAIN}, open_folder)) as hub:
            assert preparing(open_folder / "streams")[0] == EXPECTED
            assert any(path.endswith(".parquet") for path in hub.requests)
            asked = len(hub.requests)
            assert preparing(open_folder / "streams")[0] == EXPECTED and len(hub.requests) == asked
        # The hub is gone; other streams are prepared from the cache of `datasets`, at once.
        found, seconds = preparing(open_folder / "other")
        assert found == EXPECTED and seconds < 15
        a_cache_of_others(preparing, home, open_folder)
        preparing.process.kill()


def a_cache_of_others(preparing, home, folder):
    """A cache that can be read but not written is used as it is; where it lacks the text, the error names it."""
    streams = [folder / f"streams{k}" for k in range(1, 4)]
    for path in streams:
        path.mkdir()
        path.chmod(0o777)
    if os.geteuid() == 0 and not all(path.stat().st_mode & 1 for path in folder.parents):
        pytest.skip(
            "NOT tested with a cache that cannot be written: other users cannot enter the temporary folder"
        )
    for path in [home, *home.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        for offline in (True, False):
            assert preparing(streams[offline], offline=offline, as_nobody=True)[0] == EXPECTED
        for path in home.rglob("*.arrow"):
            path.unlink()
        message, _ = preparing(folder / "streams3", offline=True, as_nobody=True)
        assert_helpful(message, f"its cache {home}", "Permission denied", "HF_DATASETS_CACHE")
    finally:
        for path in [home, *home.rglob("*")]:
            path.chmod(0o755)
