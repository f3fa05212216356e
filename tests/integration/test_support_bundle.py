"""``pdserve support-bundle`` as an operator runs it: beside a cluster, and beside a dead one."""

import json
import os
import socket
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.integration.certificates import make_certificates
from tests.integration.harness import TestCluster

ROOT = Path(__file__).parents[2]
KEY = "pd-" + "5ec2e7" * 10
PROMPT = "xylophone quartz nebula"


def bundle(out: Path, *words: str, environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The files of a new bundle, and as "" what the command printed."""
    ran = subprocess.run(
        [sys.executable, "-m", "pdserve.cluster.cli", "support-bundle", "--out", str(out), *words],
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    files = {"": ran.stdout}
    with tarfile.open(out) as tar:
        for member in tar.getmembers():
            file = tar.extractfile(member)
            assert file is not None
            files[member.name.removeprefix("pdserve-bundle/")] = file.read().decode()
    return files


def test_beside_a_cluster_it_has_everything_and_no_prompt(
    cluster: TestCluster, tmp_path: Path
) -> None:
    cluster.complete(PROMPT, max_tokens=4, user="somebody")
    logs = tmp_path / "logs"
    logs.mkdir()
    why = {"call": "c", "choice": 0, "tenant": "t", "decisions": []}
    lines = [
        f"started with {KEY}",
        json.dumps({"event": "refused", "prompt": PROMPT}),
        f"INFO pdserve.why {json.dumps(why)}",
    ]
    (logs / "gateway.log").write_text("\n".join(lines) + "\n")
    words = ["--url", cluster.url, "--logs", str(logs), "--logs", str(ray_logs())]
    for attempt in range(3):  # on a busy machine a source may need longer than it is given
        out = tmp_path / f"{attempt}.tar.gz"
        files = bundle(out, "--no-doctor", *words, environment={"PDSERVE_API_KEY": KEY})
        missing = json.loads(files["manifest.json"])["missing"]
        if set(missing) == {"doctor.txt"}:
            break
    assert missing == {"doctor.txt": "left out by --no-doctor"}
    assert json.loads(files["status.json"])["workers"]
    assert "pdserve_requests_total" in files["metrics.txt"]
    assert json.loads(files["kv.json"])[0]["store"]
    assert json.loads(files["versions.json"])["packages"]["ray"]
    assert json.loads(files["why.jsonl"]) == why
    assert "gateway.log" in "".join(files)
    assert len(files) > 10  # Ray's own
    for name, text in files.items():
        assert KEY not in text, name
        assert PROMPT not in text, name


@pytest.mark.slow  # the doctor loads torch
def test_beside_a_dead_cluster_it_says_what_is_missing(tmp_path: Path) -> None:
    make_certificates(tmp_path)
    key = tmp_path / "member.key"
    with socket.socket() as nobody:  # bound, and listens not: nothing answers there
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        logs = tmp_path / "logs"
        logs.mkdir()
        (logs / "worker.err").write_text(f"Traceback\n{key.read_text()}\n")
        (tmp_path / "c.yaml").write_text(
            f"store: {{key_salt: hunter2hunter2, redis_url: 'redis://:hunter2@r/0'}}\n"
            f"gateway: {{tls_certificate: {tmp_path}/member.pem, tls_key: {key}}}\n"
        )
        files = bundle(
            tmp_path / "b.tar.gz",
            *("--url", url, "--logs", str(logs), "--config", str(tmp_path / "c.yaml")),
        )
    missing: dict[str, Any] = json.loads(files["manifest.json"])["missing"]
    assert set(missing) == {"status.json", "autoscaling.json", "metrics.txt", "kv.json"}
    assert all("nothing answers" in reason for reason in missing.values())
    assert "without status.json: nothing answers" in files[""]
    assert json.loads(files["settings.json"])["gateway"]["tls_key"] == str(key)
    assert files["doctor.txt"].strip()
    body = [line for line in key.read_text().splitlines() if not line.startswith("-----")]
    for name, text in files.items():
        assert "hunter2" not in text, name
        assert not [line for line in body if line in text], name


def ray_logs() -> Path:
    """Of the run's Ray, to which this process is connected."""
    import ray

    return Path(ray._private.worker._global_node.get_session_dir_path(), "logs")
