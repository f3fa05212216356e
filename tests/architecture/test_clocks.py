"""The store computes with clocks that nobody sets: the time of day decides one thing alone."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "pdserve"
WALL_CLOCKS = {"time", "time_ns", "now", "utcnow", "today", "localtime", "gmtime"}
MODULES = {"time", "datetime", "date"}
EXPIRY_OF_TOKENS = {"kvstore/capability.py", "kvstore/security.py"}


@pytest.mark.parametrize("folder", ["kvstore", "wire", "router"])
def test_a_jump_of_the_clock_changes_nothing_but_whether_a_token_is_good(folder: str) -> None:
    asking = {
        str(path.relative_to(PACKAGE))
        for path in (PACKAGE / folder).rglob("*.py")
        if _asks_for_the_time_of_day(ast.parse(path.read_text()))
    }
    assert asking <= EXPIRY_OF_TOKENS


def _asks_for_the_time_of_day(tree: ast.Module) -> bool:
    return any(
        isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in MODULES
        and node.attr in WALL_CLOCKS
        for node in ast.walk(tree)
    ) or any(
        isinstance(node, ast.ImportFrom)
        and node.module in MODULES
        and any(name.name in WALL_CLOCKS for name in node.names)
        for node in ast.walk(tree)
    )
