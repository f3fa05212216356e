import ast
import json
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from handbook.benchmarks_page import figure, section
from handbook.client_record import Row, merged, row_of
from handbook.compatibility_page import shown
from handbook.grpc_page import FILES, calls, definitions, grpc_page
from handbook.http_page import http_page, kind, openapi_paths
from handbook.python_page import described, documented, python_page
from handbook.settings_page import settings_page
from handbook.staging import decisions, place
from handbook.tables import block, cell, code
from pdserve.config import ClusterConfig
from pdserve.settings import to_tree

ROOT = Path(__file__).parents[3]


def test_every_setting_has_a_row() -> None:
    page = settings_page()
    missing = [name for name in names_in(to_tree(ClusterConfig())) if f"| `{name}` |" not in page]
    assert not missing


def names_in(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from names_in(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def test_every_operation_has_a_row() -> None:
    page = http_page()
    assert "/v1/chat/completions" in openapi_paths()
    assert all(f"`{path}`" in page for path in openapi_paths())


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "integer", "minimum": 1, "maximum": 9}, "integer, 1 to 9"),
        ({"type": "number", "exclusiveMinimum": 0}, "number, from above 0"),
        ({"type": "array", "items": {"type": "string"}, "maxItems": 4}, "list of string, to 4"),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "string or null"),
        ({"$ref": "#/components/schemas/Model"}, "[Model](#model)"),
        ({"enum": ["a", 1]}, "`a`, `1`"),
    ],
)
def test_a_schema_in_one_line(schema: dict[str, object], said: str) -> None:
    assert kind(schema) == said


def test_every_call_and_message_of_the_protocol_is_there() -> None:
    page = grpc_page(ROOT / "proto")
    for file in FILES:
        for found in definitions((ROOT / "proto" / file).read_text()):
            assert f".{found.name}\n" in page
    first = next(definitions((ROOT / "proto" / FILES[0]).read_text()))
    assert [row[0] for row in calls(first)] == ["`Generate`", "`Chat`", "`Cancel`", "`ListModels`"]
    assert next(calls(first))[2] == "stream of `GenerateChunk`"


def test_what_programs_import_is_there_with_what_it_raises() -> None:
    page = python_page(ROOT)
    for name in ("### LLM", "#### LLM.generate", "### SamplingParams", "### build", "### Headroom"):
        assert f"{name}\n" in page
    assert "- `ConfigError`: a setting cannot be used" in page
    assert "_call" not in page


def test_a_docstrings_sections_are_lists_and_its_examples_code() -> None:
    said = documented("Does it.\n\n    x = f(1)\n\nArgs:\n    x: how ``much``,\n        in ms.\n")
    assert said.startswith("Does it.\n")
    assert "```python\nx = f(1)\n```" in said
    assert "- `x`: how `much`,\n  in ms." in said


def test_a_long_signature_has_an_argument_a_line() -> None:
    source = "def f(aaaaaaaaaaaaaaaaaaaaaaaaa: dict[str, int], bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb: int = 1, *, c: int) -> None:\n  'It.'"  # noqa: E501
    lines = "".join(described(ast.parse(source).body[0], "###")).splitlines()
    assert "    aaaaaaaaaaaaaaaaaaaaaaaaa: dict[str, int]," in lines
    assert "    *," in lines


@pytest.mark.parametrize(
    ("value", "said"),
    [(0, "0"), (0.00012345, "0.000123"), (3.14159, "3.14"), (353.2, "353"), (12345.6, "12,346")],
)
def test_figures_have_three_digits(value: float, said: str) -> None:
    assert figure(value) == said


def test_a_benchmark_that_missed_its_bar_says_so() -> None:
    row = {"name": "call", "value": 3.0, "unit": "ms", "bar": "≤ 2 ms", "holds": False}
    run = {"area": "calls", "rows": [row], "machine": {"cores": 2}, "date": "2026-11-22T00:00"}
    assert "≤ 2 ms: **missed**" in section("calls_2026", run)


def test_every_result_of_a_benchmark_can_be_shown() -> None:
    for file in sorted((ROOT / "bench" / "results").glob("*.json")):
        assert section(file.stem, json.loads(file.read_text()))


def test_a_clients_latest_run_counts() -> None:
    old = Row("openai", "chat", "t::a", False, "3.0", "2026-11-01")
    new = Row("openai", "chat", "t::a", True, "3.1", "2026-11-22")
    other = Row("litellm", "chat", "t::b", False, "1.2", "2026-11-01")
    assert merged([old, other], [new]) == [other, new]
    table = shown([other, new])
    assert "| openai | 3.1 | chat | works | 2026-11-22 | `t::a` |" in table
    assert "**fails**" in table


def test_of_several_cases_of_a_test_the_worst_counts() -> None:
    runs = [Row("openai", "chat", "t::a", passed, "3", "2026-11-22") for passed in (True, False)]
    assert merged([], runs) == merged([], runs[::-1]) == [runs[1]]


@pytest.mark.parametrize(
    ("test", "client", "kept"),
    [
        ("t.py::test_an_unchanged_client_works[litellm_client-x]", "litellm", "[litellm_client-x]"),
        ("t.py::test_it_works[pydantic-ai-slim]", "pydantic-ai-slim", "works[pydantic-ai-slim]"),
        ("t.py::test_the_openai_sdk_streams[3-4]", "openai", "streams"),
        ("t.py::test_sixty_threads[a]", None, ""),
    ],
)
def test_a_tests_name_tells_its_client(test: str, client: str | None, kept: str) -> None:
    row = row_of(test, {}, True, "2026-11-22")
    assert (row and row.client) == client
    assert row is None or row.test.endswith(kept)


def test_a_test_may_say_whose_it_is() -> None:
    said = {"client": "guidellm", "shows": "a sweep", "version": "0.5"}
    row = row_of("t.py::test_x", said, True, "2026-11-22")
    assert row == Row("guidellm", "a sweep", "t.py::test_x", True, "0.5", "2026-11-22")


def test_the_decisions_are_listed_by_number() -> None:
    listed = decisions(ROOT / "docs" / "adr")
    assert "- 01 [Serve's replicas are the workers](0001-" in listed


def test_a_file_of_the_repository_gets_a_page_and_no_other_does() -> None:
    wanted: dict[str, None] = {}
    assert place(ROOT, PurePosixPath("pdserve/ids.py"), wanted) == "source/pdserve/ids.py.md"
    assert place(ROOT, PurePosixPath("docs/security.md"), wanted) == "security.md"
    assert place(ROOT, PurePosixPath("pdserve/config.py"), wanted) == "reference/settings.md"
    assert list(wanted) == ["pdserve/ids.py"]
    for path in ("nosuch.py", "../etc/passwd"):
        with pytest.raises(KeyError):
            place(ROOT, PurePosixPath(path), wanted)


def test_cells_and_fences_hold_what_would_end_them() -> None:
    assert cell("a | b\nc") == "a \\| b c"
    assert code("a `b`") == "`` a `b` ``"
    assert block("```\nx\n```").startswith("````\n")
