"""A JSON schema of everything that can be set, made from ``config`` itself.

Types, defaults and names come from the dataclasses, descriptions from the texts below the fields.
What only ``_problems`` knows (that a number must be positive, that two fields belong together) is
not in it: ``pdserve config validate`` says that.
"""

import ast
import dataclasses
import inspect
import textwrap
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pdserve.config import ClusterConfig
from pdserve.settings import FURTHER_MAX, GATEWAY_FIELDS, MODEL_PARTS

DRAFT = "https://json-schema.org/draft/2020-12/schema"


def settings_schema() -> dict[str, Any]:
    schema = {"$schema": DRAFT, "title": "pdserve", **_part(ClusterConfig())}
    models = schema["properties"]["models"]
    models["maxProperties"] = FURTHER_MAX
    own = {part: {"$ref": f"#/properties/{part}"} for part in MODEL_PARTS}
    fields = {name: {"$ref": f"#/properties/gateway/properties/{name}"} for name in GATEWAY_FIELDS}
    models["additionalProperties"] = _object({**own, "gateway": _object(fields)})
    return schema


def _part(default: Any) -> dict[str, Any]:
    cls = type(default)
    hints, told = get_type_hints(cls), _descriptions(cls)
    properties: dict[str, Any] = {}
    for part in dataclasses.fields(cls):
        value = getattr(default, part.name)
        if dataclasses.is_dataclass(value):
            properties[part.name] = _part(value)
        else:
            properties[part.name] = {**_type(hints[part.name]), "default": value}
        if part.name in told:
            properties[part.name]["description"] = told[part.name]
    schema = _object(properties)
    own = inspect.getdoc(cls) if "__doc__" in vars(cls) else None
    if own and not own.startswith(f"{cls.__name__}("):
        schema["description"] = own
    return schema


def _object(properties: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": dict(properties), "additionalProperties": False}


def _type(hint: Any) -> dict[str, Any]:
    origin = get_origin(hint)
    if origin is Literal:
        return {"enum": list(get_args(hint))}
    if origin in (types.UnionType, typing.Union):
        kinds = [
            {"type": "null"} if arg is types.NoneType else _type(arg) for arg in get_args(hint)
        ]
        return {"anyOf": kinds}
    if origin is not None and issubclass(origin, Mapping):
        return {"type": "object", "additionalProperties": _type(get_args(hint)[1])}
    if hint is Any:
        return {}
    return {"type": {int: "integer", float: "number", bool: "boolean", str: "string"}[hint]}


def _descriptions(cls: type) -> dict[str, str]:
    """The texts below the fields of a class, base classes included."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(body, ast.ClassDef)
        for field, below in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
                and isinstance(below.value.value, str)
            ):
                found[field.target.id] = inspect.cleandoc(below.value.value).replace("\n", " ")
    return found
