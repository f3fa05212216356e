"""What the benchmarks for a GPU import: a machine that has one has torch, and little else."""

import ast
from pathlib import Path

import pytest

from tests.architecture.imports import ROOT

ABSENT = {
    "tokenizers",
    "jinja2",
    "llguidance",
    "prometheus_client",
    "pydantic",
    "typer",
    "rich",
    "uvicorn",
    "ray",
    "redis",
    "gguf",
    "aiohttp",
    "fastapi",
    "grpc",
    "httpx",
    "huggingface_hub",
    "yaml",
}
ABOVE = {"pdserve.cluster", "pdserve.router", "pdserve.simulator"}
STORE = {"msgpack", "xxhash"}
"""What the store needs beside: small, and asked for by ``bench.pd_gpu`` and rows about a loop."""


def file_of(module: str) -> Path | None:
    path = ROOT.joinpath(*module.split("."))
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)


def loaded_by(module: str, known: set[str]) -> set[str]:
    """Modules that an import of ``module`` loads: what stands at the top of files of ours."""
    path = file_of(module)
    if module in known:
        return known
    known.add(module)
    for node in [] if path is None else ast.parse(path.read_text()).body:
        match node:
            case ast.Import(names=names):
                for name in names:
                    loaded_by(name.name, known)
            case ast.ImportFrom(module=str(source), names=names):
                loaded_by(source, known)
                for name in names:
                    if file_of(f"{source}.{name.name}") is not None:
                        loaded_by(f"{source}.{name.name}", known)
            case _:
                pass
    return known


def too_much(modules: set[str]) -> set[str]:
    return {
        module
        for module in modules
        if module.partition(".")[0] in ABSENT or ".".join(module.split(".")[:2]) in ABOVE
    }


@pytest.mark.parametrize(
    ("module", "also"),
    [
        ("bench.kernels", set()),
        ("bench.engine", set()),
        ("bench.engine_gpu", set()),
        ("bench.decode_loop", STORE),
        ("bench.pd_gpu", STORE),
    ],
)
def test_it_needs_nothing_that_a_machine_with_torch_alone_lacks(
    module: str, also: set[str]
) -> None:
    loaded = loaded_by(module, set())
    assert "torch" in loaded or module == "bench.engine"
    assert too_much(loaded) == set()
    assert {name.partition(".")[0] for name in loaded} & STORE == also


def test_what_comes_with_ray_would_be_found() -> None:
    assert too_much(loaded_by("bench.servers", set())) == {"aiohttp"}
    assert "pdserve.cluster.worker_parts" in too_much(loaded_by("bench.engine_step", set()))
