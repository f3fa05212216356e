"""What a cluster leaves on its machine when it ends: nothing. And what it does without Redis."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pdserve.kvstore.masters.metadata import RedisMetadata
from tests.integration.harness import (
    Traces,
    end_ray,
    held,
    random_prompts,
    running,
    settings,
    storm,
    wait_until_equal,
)
from tests.redis_server import running_redis

STREAMS = 4


@pytest.mark.slow
def test_requests_do_not_miss_a_killed_redis(small_model: Path, tmp_path: Path) -> None:
    with running_redis(tmp_path) as redis:
        config = settings(small_model, model={"dtype": "float32"}, store={"redis_url": redis.url})
        prompts = random_prompts(STREAMS, seed=5, length=200)
        with running(config, own_ray=True) as cluster:
            assert len(RedisMetadata(redis.url).members()) == 1
            calm = storm(cluster, prompts, 60)
            struck = storm(cluster, prompts, 60, at=STREAMS, strike=redis.kill)
            afterwards = storm(cluster, prompts, 60)
            for streams in (struck, afterwards):
                assert [stream.error for stream in streams] == [None] * STREAMS
                assert [stream.tokens for stream in streams] == [stream.tokens for stream in calm]
            wait_until_equal("held at rest", lambda: held(cluster), 0)
            left = Traces.of_this_process()
            assert left.pids
            assert left.paths
        wait_until_equal("what is left", left.remaining, [])


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_signal_ends_serve_and_everything_it_started(
    small_model: Path, tmp_path: Path, number: signal.Signals
) -> None:
    command = [
        *(sys.executable, "-m", "pdserve.cluster.cli", "serve", str(small_model)),
        *("--set", "gateway.http_port=0", "--set", "gateway.grpc_port=-1"),
        *("--set", "store.arena_bytes=67108864", "--set", "tcp=false", "--no-first-chat"),
    ]
    end_ray()  # what runs from here on is this command's
    serve = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert serve.stdout is not None
        lines = iter(serve.stdout.readline, "")
        assert any("Ctrl-C stops everything" in line for line in lines)
        left = Traces.of_this_process()
        assert serve.pid in left.pids
        assert left.paths
        serve.send_signal(number)
        assert "nothing is left behind" in serve.stdout.read()
        assert serve.wait(30) == 0
    finally:
        serve.kill()
    wait_until_equal("what is left", left.remaining, [])
