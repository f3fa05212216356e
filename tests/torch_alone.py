"""A machine that has a GPU, torch, Triton and little else, played by this one.

    python -m tests.torch_alone

Imports what is run there, with everything that such a machine lacks hidden from Python: the tests
of the kernels, as pytest collects them, and the benchmarks, as far as ``--help`` and, where there
is no CUDA device, as far as the rows that say so. The exit code is that of the first that fails.
"""

import importlib
import os
import runpy
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

ABSENT = frozenset(
    {
        *("ray", "redis", "gguf", "tokenizers", "safetensors", "transformers", "huggingface_hub"),
        *("grpc", "fastapi", "uvicorn", "aiohttp", "httpx", "pydantic", "prometheus_client"),
        *("jinja2", "llguidance", "typer", "rich", "yaml"),
    }
)
COMMANDS: tuple[tuple[str, ...], ...] = (
    ("bench.kernels", "--help"),
    ("bench.engine", "--device", "cuda", "--help"),
    ("bench.pd_gpu", "--help"),
    ("bench.kvstore", "--gpu", "--help"),
)
BEHIND_THE_HELP = (
    ("bench.kernels", "--quick"),
    ("bench.engine", "--device", "cuda", "--quick"),
    ("bench.kvstore", "--gpu", "--quick"),
)
"""What is imported once a benchmark is at work; measures nothing without a CUDA device."""

TESTS = "tests/kernels"


class Without:
    """A finder of modules that does not find those of ``ABSENT``: to an import they do not exist,
    which is not the same as one that fails."""

    def __init__(self, finder: Any) -> None:
        self._finder = finder

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.partition(".")[0] in ABSENT:
            return None
        found: ModuleSpec | None = self._finder.find_spec(name, path, target)
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._finder, name)


def hide() -> None:
    """From every import of this process that comes after."""
    loaded = sorted({name.partition(".")[0] for name in sys.modules} & ABSENT)
    assert not loaded, f"too late: {loaded} are imported"
    sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
    importlib.invalidate_caches()


def run(module: str, *arguments: str) -> None:
    """``python -m module arguments``, within this process: torch is imported once for all."""
    print(f"── {module} {' '.join(arguments)}", flush=True)
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        if ended.code:
            raise


def main() -> None:
    hide()
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # they may come with what is hidden
    import torch

    commands = COMMANDS
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # before the first import of triton
        commands += BEHIND_THE_HELP
    for command in commands:
        run(*command)
    import pytest

    options = ("--collect-only", "-q", "-p", "pytest_timeout", "-p", "no:cacheprovider")
    sys.exit(pytest.main([*options, TESTS]))


if __name__ == "__main__":
    main()
