"""Redis over a Unix socket with hiredis, behind ``kv_agent``'s loop: no persistence, no limit."""

import os
import subprocess
import tempfile
import time
from pathlib import Path

import redis
from kv_agent import check, serve

START_S_MAX = 10


class RedisStore:
    def __init__(self, path: str) -> None:
        self._redis = redis.Redis(unix_socket_path=path)
        self._sources: dict[int, bytes] = {}

    def put(self, name: str, size: int) -> None:
        if size not in self._sources:
            self._sources[size] = os.urandom(size)
        self._redis.set(name, self._sources[size])

    def get(self, name: str, size: int) -> None:
        check(len(self._redis.get(name)), size)  # type: ignore[arg-type]

    def get_many(self, names: list[str], size: int) -> None:
        check(sum(map(len, self._redis.mget(names))), size * len(names))  # type: ignore[arg-type]

    def present(self, names: list[str]) -> int:
        with self._redis.pipeline(transaction=False) as pipeline:
            for name in names:
                pipeline.exists(name)
            return sum(pipeline.execute())

    def forget(self, name: str) -> None:
        self._redis.delete(name)

    def answers(self) -> bool:
        try:
            return bool(self._redis.ping())
        except redis.ConnectionError:
            return False

    def wait(self) -> None:
        deadline = time.monotonic() + START_S_MAX
        while not self.answers():
            if time.monotonic() > deadline:
                raise TimeoutError("redis-server does not answer")
            time.sleep(0.02)


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = str(Path(directory) / "redis.sock")
        server = subprocess.Popen(
            [
                *("redis-server", "--port", "0", "--unixsocket", path, "--save", ""),
                *("--appendonly", "no", "--dir", directory),
            ],
            stdout=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
        )
        try:
            store = RedisStore(path)
            store.wait()
            serve(store)
        finally:
            server.kill()
            server.wait()


if __name__ == "__main__":
    main()
