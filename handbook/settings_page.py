"""Every setting, from the schema that ``pdserve config schema`` prints."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from handbook.tables import HEAD, code, prose, table
from pdserve.settings_schema import settings_schema

INTRODUCTION = """# Settings

A setting is `part.field`. It comes from a YAML file (`pdserve serve FILE.yaml`), from the
environment (`PDSERVE_PART__FIELD`) or from the command line (`--set part.field=value`); what is
named last here wins. `pdserve config validate` says what is wrong with a file, and `pdserve
config schema` prints this page for editors.
"""


def settings_page() -> str:
    properties = settings_schema()["properties"]
    parts = {name: it for name, it in properties.items() if "properties" in it}
    own = {name: it for name, it in properties.items() if name not in parts}
    sections = [f"## The cluster\n\n{_table('', own)}"]
    for name, part in parts.items():
        told = prose(part.get("description", ""))
        sections.append(f"## {name}\n\n{told}\n\n{_table(f'{name}.', part['properties'])}")
    return HEAD + INTRODUCTION + "\n" + "\n".join(sections)


def _table(prefix: str, fields: Mapping[str, Any]) -> str:
    return table(["setting", "type", "default", ""], _rows(prefix, fields))


def _rows(prefix: str, fields: Mapping[str, Any]) -> Iterator[list[str]]:
    for name, field in fields.items():
        if "properties" in field:
            yield from _rows(f"{prefix}{name}.", field["properties"])
        else:
            default = json.dumps(field["default"], ensure_ascii=False)
            yield [
                code(prefix + name), kind(field), code(default), prose(field.get("description", ""))
            ]  # fmt: skip


def kind(field: Mapping[str, Any]) -> str:
    """A JSON schema's type in one line."""
    if "enum" in field:
        return ", ".join(code(str(value)) for value in field["enum"])
    if "anyOf" in field:
        return " or ".join(kind(choice) for choice in field["anyOf"])
    if field["type"] == "object":
        if "properties" in field:  # with parts of settings in it
            return "objects with " + ", ".join(code(part) for part in field["properties"])
        return f"object of {kind(field['additionalProperties'])}"
    return str(field["type"])
