"""Ray's object store behind ``kv_agent``'s loop: numpy arrays through shared memory."""

import os

import numpy as np
import ray
from kv_agent import check, serve

OBJECT_STORE_BYTES = 1 << 30


class RayStore:
    def __init__(self) -> None:
        self._refs: dict[str, ray.ObjectRef] = {}
        self._sources: dict[int, np.ndarray] = {}

    def put(self, name: str, size: int) -> None:
        if size not in self._sources:
            self._sources[size] = np.frombuffer(os.urandom(size), np.uint8)
        self._refs[name] = ray.put(self._sources[size])

    def get(self, name: str, size: int) -> None:
        check(ray.get(self._refs[name]).nbytes, size)

    def get_many(self, names: list[str], size: int) -> None:
        found = ray.get([self._refs[name] for name in names])
        check(sum(each.nbytes for each in found), size * len(names))

    def present(self, names: list[str]) -> int:
        ready, _ = ray.wait([self._refs[name] for name in set(names)], timeout=0)
        return len(ready)

    def forget(self, name: str) -> None:
        del self._refs[name]


def main() -> None:
    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray.init(
        address="local",
        num_cpus=1,
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
    )
    try:
        serve(RayStore())
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
