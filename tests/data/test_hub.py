"""The hub path through `datasets` itself, against a loopback server laid out like the hub's repository."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from .conftest import TEST, TRAIN, VALIDATION

REPOSITORY = "Salesforce/wikitext"
COMMIT = "b08601e04326c79dfdd32d625aee71d232d685c3"
PREPARE = """\
import json
import sys
import time
import datasets
from alibi_lm.data.corpus import prepare
from alibi_lm.data.sources import DataConfig
from alibi_lm.data.tokenizers import WordConfig
started = time.perf_counter()
try:
    corpus = prepare(DataConfig(sys.argv[1], cache_dir=sys.argv[2]), WordConfig())
except ValueError as error:
    sys.exit(f"ValueError: {error}")
finally:
    print("seconds", time.perf_counter() - started, file=sys.stderr)
print(json.dumps({s: [v.words, v.bytes, v.text_sha256, len(v.documents)] for s, v in corpus.streams.items()}))
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


def rows(text: str) -> list[str]:
    """As the hub stores lines: with their line end, blank ones as nothing."""
    return ["" if not line.strip() else line + "\n" for line in text.removesuffix("\n").split("\n")]


class Hub(ThreadingHTTPServer):
    """Answers what `datasets` asks of the hub; everything else does not exist."""

    daemon_threads = True

    def __init__(self, config: str, texts: dict[str, str], folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.files["README.md"] = CARD.format(config=config).encode()
        for split, text in texts.items():
            path = folder / "part.parquet"
            pq.write_table(pa.table({"text": rows(text)}), path)
            self.files[f"{config}/{split}-00000-of-00001.parquet"] = path.read_bytes()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
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

    def send_tree(self, folder: str) -> None:
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

    def send_json(self, content: object) -> None:
        self.send(json.dumps(content).encode(), "application/json")

    def send(self, body: bytes, kind: str, status: int = 200) -> None:
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
def serving(server: Hub) -> Iterator[Hub]:
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def run(
    name: str, cache: Path, home: Path, endpoint: str, offline: bool = False
) -> tuple[subprocess.CompletedProcess[str], float]:
    """Prepare in a process of its own (the libraries read the environment at import); and its seconds."""
    environment = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
    environment |= {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "1" if offline else "0",
    }
    done = subprocess.run(
        [sys.executable, "-c", PREPARE, name, str(cache)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    seconds = [float(line.split()[1]) for line in done.stderr.splitlines() if line.startswith("seconds ")]
    assert len(seconds) == 1, done.stderr
    return done, seconds[0]


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("wikitext103", "wikitext-103-v1"),
        pytest.param("wikitext2", "wikitext-2-v1", marks=pytest.mark.slow),
    ],
)
def test_text_comes_from_the_hub_then_from_its_cache(name: str, config: str, tmp_path: Path):
    texts = {"train": TRAIN, "validation": VALIDATION, "test": TEST}
    with serving(Hub(config, texts, tmp_path)) as hub:
        done, _ = run(name, tmp_path / "streams", tmp_path / "home", hub.url)
        assert done.returncode == 0, done.stderr
        assert any(path.endswith(".parquet") for path in hub.requests)
        asked = len(hub.requests)
        # Line for line and byte for byte what the original files hold, blank lines included.
        expected = {
            split: [
                len(text.split()) + text.count("\n"),
                len(text.encode()),
                hashlib.sha256(text.encode()).hexdigest(),
                2 if split == "train" else 1,
            ]
            for split, text in texts.items()
        }
        assert json.loads(done.stdout) == expected
        again, _ = run(name, tmp_path / "streams", tmp_path / "home", hub.url)
        assert json.loads(again.stdout) == expected and len(hub.requests) == asked
    # The hub is gone; other streams are prepared from the cache of `datasets`, at once.
    cached, seconds = run(name, tmp_path / "other", tmp_path / "home", hub.url)
    assert cached.returncode == 0, cached.stderr
    assert json.loads(cached.stdout) == expected and seconds < 15


def assert_helpful(done: subprocess.CompletedProcess[str], cause: str) -> None:
    assert done.returncode == 1 and "Traceback" not in done.stderr
    for part in (cause, "data.path=<folder>", "data=python_stdlib", "wikitext-103-v1"):
        assert part in done.stderr


@pytest.mark.parametrize("offline", [False, True])
def test_without_a_network_the_error_is_quick_and_names_the_ways_out(offline: bool, tmp_path: Path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
        done, seconds = run("wikitext103", tmp_path / "streams", tmp_path / "home", endpoint, offline)
    assert_helpful(done, "HF_HUB_OFFLINE is set" if offline else "does not answer")
    assert seconds < 15, "left to itself, datasets tries again for 24 s"


def test_a_server_that_never_answers_is_given_up_soon(tmp_path: Path):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(8)
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        done, seconds = run("wikitext103", tmp_path / "streams", tmp_path / "home", endpoint)
    assert_helpful(done, "does not answer")
    assert seconds < 15


def test_a_hub_without_the_text_is_reported(tmp_path: Path):
    with serving(Hub("another-config", {"train": TRAIN}, tmp_path)) as hub:
        done, _ = run("wikitext103", tmp_path / "streams", tmp_path / "home", hub.url)
    assert_helpful(done, "could not be had from the hub")
