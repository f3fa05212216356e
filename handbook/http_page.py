"""Every operation and field of the HTTP API, from the OpenAPI document that a gateway serves."""

from collections.abc import Iterator, Mapping
from typing import Any

from handbook.tables import HEAD, code, prose, table
from pdserve.cluster.http.openapi import document as openapi
from pdserve.cluster.http.openapi.bodies import Facts

FACTS = Facts(models=("MODEL",), context_tokens=8192, vocab_size=49152, n_max=16)
"""What depends on the model that is served: here the default one's."""

INTRODUCTION = """# HTTP operations

Made from the OpenAPI document, which every gateway serves at `/openapi.json` with its own model's
bounds; here they are those of the default model. What the fields mean beyond OpenAI's
documentation stands in [the HTTP API](../http.md).
"""

REFERENCE = "#/components/schemas/"


def http_page() -> str:
    tree = openapi.document(FACTS, version="", paths=openapi_paths(), keys=True)
    schemas: Mapping[str, Any] = tree["components"]["schemas"]
    out = [HEAD + INTRODUCTION, "## Operations\n", table(["", "operation", "takes", "gives"], (
        [f"`{method.upper()}`", code(path), _body(said), _answers(said)]
        for path, methods in tree["paths"].items()
        for method, said in methods.items()
    ))]  # fmt: skip
    out.append("## Fields\n")
    for name in sorted(schemas):
        out.append(f"### {name}\n")
        if fields := dict(_fields(schemas[name])):
            required = set(schemas[name].get("required", ()))
            rows = (
                [
                    code(field),
                    "yes" if field in required else "",
                    kind(it),
                    prose(it.get("description", "")),
                ]
                for field, it in fields.items()
            )
            out.append(table(["field", "required", "type", ""], rows))
        else:
            out.append(f"{kind(schemas[name])}\n")
    return "\n".join(out)


def openapi_paths() -> list[str]:
    """All that a gateway with everything switched on serves."""
    return list(openapi._OPERATIONS)


def kind(schema: Mapping[str, Any]) -> str:
    """In one line, cut where a schema is deep."""
    if "$ref" in schema:
        name = str(schema["$ref"]).removeprefix(REFERENCE)
        return f"[{name}](#{name.lower()})"
    if "enum" in schema:
        return ", ".join(code(str(value)) for value in schema["enum"])
    if "const" in schema:
        return code(str(schema["const"]))
    for several in ("anyOf", "oneOf"):
        if several in schema:
            return " or ".join(dict.fromkeys(kind(each) for each in schema[several]))
    bounds = _bounds(schema)
    of = schema.get("type", "any")
    if of == "array":
        return f"list of {kind(schema.get('items', {}))}{bounds}"
    return (" or ".join(of) if isinstance(of, list) else str(of)) + bounds


def _bounds(schema: Mapping[str, Any]) -> str:
    low = schema.get("minimum", schema.get("exclusiveMinimum", schema.get("minItems")))
    high = schema.get("maximum", schema.get("exclusiveMaximum", schema.get("maxItems")))
    above = "above " if "exclusiveMinimum" in schema else ""
    if low is None and high is None:
        return ""
    if high is None:
        return f", from {above}{low}"
    return f", {above}{low} to {high}" if low is not None else f", to {high}"


def _fields(schema: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield from schema.get("properties", {}).items()
    for part in schema.get("allOf", ()):
        yield from _fields(part)


def _body(operation: Mapping[str, Any]) -> str:
    content = operation.get("requestBody", {}).get("content", {})
    return ", ".join(kind(it["schema"]) for it in content.values() if "schema" in it)


def _answers(operation: Mapping[str, Any]) -> str:
    said = operation.get("responses", {}).get("200", {}).get("content", {})
    return ", ".join(
        "events" if "event-stream" in name else kind(it.get("schema", {}))
        for name, it in said.items()
    )
