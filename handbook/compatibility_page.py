"""Which clients were seen to work, from what their tests left in ``docs/clients.json``."""

from collections.abc import Iterable
from pathlib import Path

from handbook.client_record import Row, read_rows
from handbook.tables import HEAD, code, table

INTRODUCTION = """# Compatibility

Unchanged clients that ran against a gateway, each in a test with the client's own library in the
version beside it; `make clients` writes the rows. What differs for who comes from vLLM: [coming
from vLLM](from_vllm.md).
"""


def compatibility_page(file: Path) -> str:
    return HEAD + INTRODUCTION + "\n" + shown(read_rows(file))


def shown(rows: Iterable[Row]) -> str:
    return table(
        ["client", "version", "what was done", "", "date", "test"],
        (
            [
                row.client,
                row.version,
                row.shows,
                "works" if row.passed else "**fails**",
                row.date,
                code(row.test),
            ]
            for row in rows
        ),
    )
