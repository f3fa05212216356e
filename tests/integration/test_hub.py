"""A model from a hub: a small server in this process speaks the routes that the hub's client asks.

The client reads its environment when it is imported, so each download runs in a process of its own,
as a worker's would.
"""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest

from tests.models.small import write_small_model

REPOSITORY = "someone/small-model"
COMMIT = hashlib.sha1(b"commit").hexdigest()
REVISIONS = ("main", "v2", COMMIT)
LOCATE = """
import sys
from pdserve.config import ModelConfig
from pdserve.errors import ConfigError
from pdserve.model.source import locate
try:
    files = locate(ModelConfig(source=sys.argv[1], revision=sys.argv[2] or None))
except ConfigError as error:
    sys.exit(f"ConfigError: {error}")
print(files.name, files.format, files.path)
"""


@dataclass
class Hub:
    address: str
    files: dict[str, bytes]
    home: Path
    requests: list[str] = field(default_factory=list)

    def locate(
        self, source: str, revision: str = "", **environment: str
    ) -> subprocess.CompletedProcess[str]:
        kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
        return subprocess.run(
            [sys.executable, "-c", LOCATE, source, revision],
            env={
                "PYTHONPATH": str(Path.cwd()),
                **kept,
                "HOME": str(self.home),
                "HF_HOME": str(self.home / "hub"),
                "HF_ENDPOINT": self.address,
                "HF_HUB_DISABLE_PROGRESS_BARS": "1",
                "HF_HUB_DISABLE_XET": "1",
                **environment,
            },
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    directory = write_small_model(tmp_path / "served", layers=1)
    contents = {path.name: path.read_bytes() for path in directory.iterdir()}
    contents |= {"pytorch_model.bin": b"not ours", "small.gguf": b"GGUF..."}
    hub = Hub("", contents, tmp_path / "home")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(body=True)

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def log_message(self, *_: object) -> None:
            pass

        def _answer(self, *, body: bool) -> None:
            path = unquote(self.path.partition("?")[0])
            hub.requests.append(f"{self.command} {path}")
            status, headers, content = self._content(path)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                self.wfile.write(content)

        def _content(self, path: str) -> tuple[int, dict[str, str], bytes]:
            for revision in REVISIONS:
                if path == f"/api/models/{REPOSITORY}/revision/{revision}":
                    siblings = [{"rfilename": name} for name in sorted(hub.files)]
                    info = {"id": REPOSITORY, "sha": COMMIT, "siblings": siblings}
                    return 200, {"Content-Type": "application/json"}, json.dumps(info).encode()
                if path == f"/api/models/{REPOSITORY}/tree/{revision}":
                    tree = [
                        {"type": "file", "path": name, "size": len(content), "oid": COMMIT}
                        for name, content in sorted(hub.files.items())
                    ]
                    return 200, {"Content-Type": "application/json"}, json.dumps(tree).encode()
                name = path.removeprefix(f"/{REPOSITORY}/resolve/{revision}/")
                if name in hub.files:
                    content = hub.files[name]
                    etag = hashlib.sha256(content).hexdigest()
                    return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, content
            kind = "RevisionNotFound" if REPOSITORY in path else "RepoNotFound"
            return 404, {"X-Error-Code": kind, "X-Error-Message": "not here"}, b"{}"

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    yield hub
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("revision", ["", "v2"])
def test_a_hub_id_is_downloaded_once_and_only_what_is_needed(hub: Hub, revision: str) -> None:
    first = hub.locate(REPOSITORY, revision)
    assert first.returncode == 0, first.stderr
    name, kind, directory = first.stdout.split(maxsplit=2)
    assert (name, kind) == ("small-model", "safetensors")
    present = {path.name for path in Path(directory.strip()).iterdir()}
    assert present == {"config.json", "model.safetensors"}
    weights = Path(directory.strip()) / "model.safetensors"
    assert weights.read_bytes() == hub.files["model.safetensors"]

    hub.requests.clear()
    second = hub.locate(REPOSITORY, revision)
    assert second.stdout == first.stdout
    assert not [request for request in hub.requests if request.startswith("GET /someone")]


def test_a_single_gguf_file_can_be_named(hub: Hub) -> None:
    found = hub.locate(f"{REPOSITORY}:small.gguf")
    assert found.returncode == 0, found.stderr
    name, kind, path = found.stdout.split(maxsplit=2)
    assert (name, kind) == ("small-model", "gguf")
    assert Path(path.strip()).read_bytes() == hub.files["small.gguf"]


def test_what_was_downloaded_is_found_offline(hub: Hub) -> None:
    online = hub.locate(REPOSITORY)
    hub.requests.clear()
    offline = hub.locate(REPOSITORY, HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    assert offline.stdout == online.stdout
    assert not hub.requests


@pytest.mark.parametrize(
    ("source", "revision", "environment", "says"),
    [
        ("someone/other", "", {}, "the hub has no model someone/other"),
        (REPOSITORY, "v9", {}, "there is no someone/small-model at v9"),
        (f"{REPOSITORY}:none.gguf", "", {}, "has no file 'none.gguf'"),
        (REPOSITORY, "", {"HF_HUB_OFFLINE": "1"}, "unset HF_HUB_OFFLINE"),
        (REPOSITORY, "", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "the hub cannot be reached"),
    ],
)
def test_every_failure_says_what_to_do(
    hub: Hub, source: str, revision: str, environment: dict[str, str], says: str
) -> None:
    failed = hub.locate(source, revision, **environment)
    assert failed.returncode == 1
    assert "ConfigError: " in failed.stderr
    assert says in failed.stderr
    assert "Traceback" not in failed.stderr
