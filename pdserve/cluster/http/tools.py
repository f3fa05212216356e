"""What a chat says of tools: which there are, and whether one must be called.

    tools                 [{"type": "function", "function": {"name", "description", "parameters"}}]
    tool_choice           "auto", "none", "required", {"type": "function", "function": {"name"}},
                          or {"type": "allowed_tools", "allowed_tools": {"mode", "tools"}}
    parallel_tool_calls   false: one call at most

Where a call is required the answer is constrained to be calls of these functions, with arguments
that follow their schemas. Otherwise the model decides, and its arguments are its own.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pdserve.cluster.gateway.constraints import Wanted
from pdserve.cluster.gateway.parameters import shown
from pdserve.errors import ConflictingFields, InvalidField
from pdserve.messages import Constraint, ConstraintKind
from pdserve.text.tool_calls import CALLS_MAX

TOOLS_MAX = 128

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")

_CHOICES = ("auto", "none", "required")


@dataclass(frozen=True, slots=True)
class Tools:
    """Those that this answer may call."""

    tools: tuple[Mapping[str, Any], ...]  # as the client wrote them
    required: bool
    named: bool  # the client chose the function itself
    parallel: bool

    def constraint(self) -> Wanted | None:
        """What the answer must be where a call is required: a JSON list of calls."""
        if not self.required:
            return None
        functions = [tool["function"] for tool in self.tools]
        calls = [
            {
                "type": "object",
                "properties": {
                    "name": {"const": function["name"]},
                    "arguments": {"$ref": f"#/$defs/{index}"},
                },
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for index, function in enumerate(functions)
        ]
        schema = {
            "type": "array",
            "items": calls[0] if len(calls) == 1 else {"anyOf": calls},
            "minItems": 1,
            "maxItems": CALLS_MAX if self.parallel and not self.named else 1,
            "$defs": {
                str(index): _moved(_parameters(function), f"#/$defs/{index}")
                for index, function in enumerate(functions)
            },
        }
        text = json.dumps(schema, ensure_ascii=False, separators=(",", ":"))
        return Wanted(Constraint(ConstraintKind.JSON_SCHEMA, text), "tools")


def tools_of(tools: Any, choice: Any, parallel: Any) -> Tools | None:
    """What the three fields ask for; None where no tool may be called.

    Raises:
        InvalidField: the first that is not as it must be.
    """
    if parallel is not None and not isinstance(parallel, bool):
        raise InvalidField("parallel_tool_calls", f"is {shown(parallel)}, must be true or false")
    known = _checked(tools or [])
    allowed, required, named = list(known), choice == "required", False
    if isinstance(choice, Mapping):
        if choice.get("type") == "allowed_tools":
            allowed, required = _allowed(choice.get("allowed_tools"), known)
        else:
            if choice.get("type") != "function":
                raise InvalidField(
                    "tool_choice.type",
                    f"is {shown(choice.get('type'))}, must be function or allowed_tools",
                )
            allowed = [_chosen("tool_choice.function", choice, known)]
            required = named = True
    elif choice is not None and choice not in _CHOICES:
        raise InvalidField(
            "tool_choice",
            f"is {shown(choice)}, must be one of {', '.join(_CHOICES)}, or an object that names a "
            "function",
        )
    if choice == "none" or (not known and not required):
        return None
    if not allowed:
        raise ConflictingFields("tool_choice", "asks for a call, and tools has none; send tools")
    return Tools(
        tuple(known[name] for name in allowed),
        required=required,
        named=named,
        parallel=parallel is not False,
    )


def _checked(tools: Sequence[Any]) -> dict[str, Mapping[str, Any]]:
    """By name."""
    if len(tools) > TOOLS_MAX:
        raise InvalidField("tools", f"has {len(tools)} tools, at most {TOOLS_MAX} are allowed")
    known: dict[str, Mapping[str, Any]] = {}
    for index, tool in enumerate(tools):
        where = f"tools.{index}"
        if tool.get("type") != "function":
            raise InvalidField(f"{where}.type", f"is {shown(tool.get('type'))}, must be function")
        function = tool.get("function")
        if not isinstance(function, Mapping):
            raise InvalidField(
                f"{where}.function", f"is {shown(function)}, must be an object with a name"
            )
        name = _name(f"{where}.function.name", function.get("name"))
        if name in known:
            raise ConflictingFields(
                f"{where}.function.name", f"is {shown(name)}, as is another tool's"
            )
        for field, kind, what in (
            ("description", str, "text"),
            ("parameters", dict, "a JSON schema"),
            ("strict", bool, "true or false"),
        ):
            value = function.get(field)
            if value is not None and not isinstance(value, kind):
                raise InvalidField(
                    f"{where}.function.{field}", f"is {shown(value)}, must be {what}"
                )
        known[name] = tool
    return known


def _allowed(said: Any, known: Mapping[str, Any]) -> tuple[list[str], bool]:
    where = "tool_choice.allowed_tools"
    if not isinstance(said, Mapping) or not isinstance(said.get("tools"), list):
        raise InvalidField(where, f"is {shown(said)}, must be an object with mode and tools")
    if said.get("mode") not in ("auto", "required"):
        raise InvalidField(
            f"{where}.mode", f"is {shown(said.get('mode'))}, must be auto or required"
        )
    names = [
        _chosen(f"{where}.tools.{index}.function", tool, known)
        for index, tool in enumerate(said["tools"])
    ]
    return list(dict.fromkeys(names)), said["mode"] == "required"


def _chosen(where: str, tool: Any, known: Mapping[str, Any]) -> str:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping):
        raise InvalidField(where, f"is {shown(function)}, must be an object with a name")
    name = _name(f"{where}.name", function.get("name"))
    if name not in known:
        raise ConflictingFields(f"{where}.name", f"is {shown(name)}, which is none of tools")
    return name


def _name(where: str, name: Any) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidField(where, f"is {shown(name)}, must be 1 to 64 of a-z, A-Z, 0-9, _, . and -")
    return name


def _parameters(function: Mapping[str, Any]) -> Any:
    return function.get("parameters") or {"type": "object"}


def _moved(schema: Any, place: str) -> Any:
    """The schema with its references to itself as they must be where it stands at ``place``."""
    if isinstance(schema, Mapping):
        return {
            key: place + value[1:]
            if key == "$ref" and isinstance(value, str) and value.startswith("#")
            else _moved(value, place)
            for key, value in schema.items()
        }
    if isinstance(schema, list):
        return [_moved(item, place) for item in schema]
    return schema
