"""Who may import whom. A row of the table is a folder and those it may know.

``violations`` takes a path and a source text, so that planted violations can show that it sees.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.architecture.imports import PACKAGE, ROOT, Import, folder_of, imports_of, source_files

FOLDERS = {
    "cluster", "decode", "engine", "kvstore", "model", "prefill", "proto", "router", "simulator",
    "text", "wire",
}  # fmt: skip
VOCABULARY = {
    *("checked", "clock", "compiled", "config", "errors", "ids", "lifecycle", "messages"),
    *(
        "access_config",
        "batch_config",
        "prompt_tasks",
        "router_config",
        "settings",
        "settings_schema",
    ),
    "speculation_config",
    *("storms", "suspicion", "values", "vitals"),
}

MAY_IMPORT: dict[str, set[str]] = {
    "text": set(),
    "wire": set(),
    "model": set(),
    "router": set(),
    "kvstore": {"wire"},
    "engine": {"model", "kvstore", "text"},
    "prefill": {"engine", "model", "kvstore", "text"},
    "decode": {"engine", "model", "kvstore", "text"},
    "simulator": {"router", "kvstore"},
    "cluster": FOLDERS,
}  # and everybody may import pdserve.<module>, the shared vocabulary

ONLY_HERE = {
    "tokenizers": {"text"},
    "jinja2": {"text"},
    "llguidance": {"text"},
    "msgpack": {"wire"},
    "ssl": {"wire"},
    "triton": {"model"},
    "gguf": {"model", "text"},  # the tokenizer lies in the same file as the weights
    "safetensors": {"model"},
    "torch": {"model", "engine", "prefill", "decode"},
    "redis": {"kvstore"},
    "mooncake": {"kvstore"},
    "xxhash": {"kvstore"},
    "ray": {"cluster"},
    "opentelemetry": {"cluster"},
    "fastapi": {"cluster"},
    "starlette": {"cluster"},
    "uvicorn": {"cluster"},
    "grpc": {"cluster"},
    "typer": {"cluster"},
    "rich": {"cluster"},
    "transformers": set[str](),
}

NOWHERE = {"pickle", "cloudpickle", "marshal", "shelve", "dill", "joblib"}
"""What would run a peer's or a file's bytes as code."""

PURE = {"router": {"asyncio", "socket", "threading", "time", "random", "subprocess", "logging"}}
"""Folders of pure decisions, and what a decision needs none of."""


ONE_DOOR = {"pdserve.cluster.commands": "cluster/cli.py"}
"""Rooms within a folder of which others need nothing, and the one file that leads in."""

FRONT_DOOR = PACKAGE / "__init__.py"
"""Offers programs what they import from ``pdserve``, by names that load it when they are used."""


def violations(path: Path, source: str) -> Iterator[str]:
    """What ``source`` imports against the rules, if it lies at ``path``."""
    folder = "cluster" if path == FRONT_DOOR else folder_of(path)
    tree = ast.parse(source, str(path))
    for item in imports_of(tree):
        where = f"{path.relative_to(ROOT)}:{item.line}: "
        if item.relative:
            yield where + "a relative import; write it in full"
        elif item.top == "pdserve":
            yield from (where + problem for problem in _folder_problems(folder, item))
            yield from (where + problem for problem in _door_problems(path, item))
        elif item.top in FOLDERS:
            yield where + f"import through the link {item.top}/; write pdserve.{item.module}"
        else:
            yield from (where + problem for problem in _package_problems(folder, item))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name | ast.alias):
            name = {ast.Attribute: "attr", ast.Name: "id", ast.alias: "name"}[type(node)]
            yield from _object_store_problems(path, node, getattr(node, name))


def _folder_problems(folder: str | None, item: Import) -> Iterator[str]:
    parts = item.module.split(".")
    if len(parts) < 2:
        return
    target = parts[1]
    if target in VOCABULARY or target == folder:
        return
    if target not in FOLDERS:
        yield f"{item.module} is neither a folder nor the shared vocabulary"
    elif folder is None:
        yield f"the shared vocabulary imports {target}"
    elif target not in MAY_IMPORT[folder]:
        yield f"{folder} imports {target}"


def _door_problems(path: Path, item: Import) -> Iterator[str]:
    for room, door in ONE_DOOR.items():
        within = path.is_relative_to(ROOT / room.replace(".", "/"))
        if item.module.startswith(f"{room}.") and not within and path != PACKAGE / door:
            yield f"{item.module} is behind {door}"


def _package_problems(folder: str | None, item: Import) -> Iterator[str]:
    if NOWHERE & set(item.module.split(".")):
        yield f"{item.module}: nothing here is pickled"
    if item.top in ONLY_HERE and folder not in ONLY_HERE[item.top]:
        yield f"{folder or 'the shared vocabulary'} imports {item.top}"
    if folder is not None and item.top in PURE.get(folder, ()):
        yield f"{folder} is pure and imports {item.top}"


def _object_store_problems(path: Path, node: ast.AST, name: str) -> Iterator[str]:
    """Data goes over our own sockets and shared memory, never through Ray's object store."""
    where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}: "
    if name in ("ObjectRef", "ObjectRefGenerator"):
        yield where + f"{name}: no object references"
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        if node.value.id == "ray" and name == "put":
            yield where + "ray.put: no data through Ray's object store"
        if node.value.id == "ray" and name == "get" and folder_of(path) != "cluster":
            yield where + "ray.get outside cluster"


def test_every_import_is_one_that_the_table_allows() -> None:
    found = [
        problem for path in source_files(PACKAGE) for problem in violations(path, path.read_text())
    ]
    assert found == [], "\n" + "\n".join(found)


def test_every_folder_and_every_module_is_in_the_table() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert folders <= FOLDERS
    assert modules <= VOCABULARY
    assert set(MAY_IMPORT) == FOLDERS - {"proto"}


@pytest.mark.parametrize(
    ("file", "source", "problem"),
    [
        ("router/x.py", "from pdserve.kvstore.keys import block_keys", "router imports kvstore"),
        ("router/x.py", "from pdserve import kvstore", "router imports kvstore"),
        ("router/x.py", "import asyncio", "router is pure and imports asyncio"),
        ("prefill/x.py", "import pdserve.decode.loop", "prefill imports decode"),
        ("decode/x.py", "def f():\n    from pdserve.prefill import loop", "decode imports prefill"),
        ("engine/x.py", "from pdserve.wire.codec import Codec", "engine imports wire"),
        ("kvstore/deep/x.py", "import torch.nn", "kvstore imports torch"),
        ("text/x.py", "import torch", "text imports torch"),
        ("text/x.py", "import importlib\nimportlib.import_module('torch')", "text imports torch"),
        ("clock.py", "import ray", "the shared vocabulary imports ray"),
        ("clock.py", "from pdserve.wire import codec", "the shared vocabulary imports wire"),
        ("model/x.py", "import transformers", "model imports transformers"),
        ("wire/x.py", "import pickle", "nothing here is pickled"),
        ("cluster/x.py", "from ray import cloudpickle", "nothing here is pickled"),
        ("wire/x.py", "from .codec import Codec", "a relative import"),
        ("wire/x.py", "from router.core import RouterCore", "import through the link router/"),
        ("wire/x.py", "from pdserve.utils import f", "neither a folder nor"),
        ("cluster/x.py", "import ray\nray.put(1)", "no data through Ray's object store"),
        ("cluster/x.py", "from ray import ObjectRef", "no object references"),
        ("engine/x.py", "ray.get(1)", "ray.get outside cluster"),
        ("cluster/x.py", "import pdserve.cluster.commands.chat", "is behind cluster/cli.py"),
    ],
)
def test_a_planted_violation_is_found(file: str, source: str, problem: str) -> None:
    assert any(problem in found for found in violations(PACKAGE / file, source))


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("kvstore/x.py", "from pdserve.wire.blocking import connect_blocking\nimport redis"),
        ("prefill/x.py", "import torch\nfrom pdserve.engine.mover import Mover"),
        ("cluster/x.py", "import ray\nfrom pdserve.decode.loop import DecodeLoop\nray.get(1)"),
        ("router/x.py", "from pdserve.messages import Request\nfrom pdserve.router.core import X"),
        ("cluster/cli.py", "from pdserve.cluster.commands.chat import chat"),
        ("cluster/commands/x.py", "from pdserve.cluster.commands.chat import chat"),
    ],
)
def test_what_the_table_allows_passes(file: str, source: str) -> None:
    assert list(violations(PACKAGE / file, source)) == []


LISTS_HEAVY = """
import contextlib, io, sys
sys.argv = ["pdserve", "--help"]
from pdserve.cluster.cli import main
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    main()
print(sorted({name.partition(".")[0] for name in sys.modules} & {"ray", "torch", "triton", "grpc"}))
"""


def test_help_loads_nothing_heavy() -> None:
    said = subprocess.run(
        [sys.executable, "-c", LISTS_HEAVY], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert said.stdout.strip() == "[]"
