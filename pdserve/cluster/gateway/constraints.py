"""What a client says that its answer must look like: OpenAI's field, vLLM's, and vLLM's older ones.

    response_format      {"type": "text" | "json_object"}, {"type": "json_schema", "json_schema": …}
    structured_outputs   {"json" | "json_object" | "regex" | "choice" | "grammar": …}
    guided_json, guided_regex, guided_choice, guided_grammar

and ``constraint`` over gRPC, which is as ``structured_outputs``.

At most one of all. A schema is enforced whether or not it is ``strict``. ``constraint_of`` reads;
``check`` compiles, so that what cannot be followed is refused here and under the client's own name
for it.
"""

import asyncio
import json
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from pdserve.cluster.gateway.parameters import Parameters, shown
from pdserve.errors import ConflictingFields, ConstraintFailed, InvalidField, UnusableValue
from pdserve.messages import Constraint, ConstraintKind
from pdserve.text.grammar import Grammars

ANY_OBJECT = '{"type": "object"}'

CHECK_S_MAX = 5.0
"""How long a request waits for its constraint to be compiled; ordinary ones take milliseconds."""

CHOICES_MAX = 1024

_SCHEMA_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")

# Of its own, so that constraints made to be slow hold up one another and no tokenising.
_threads = ThreadPoolExecutor(2, thread_name_prefix="constraints")


@dataclass(frozen=True, slots=True)
class Wanted:
    """A constraint, and what the client calls it."""

    constraint: Constraint
    field: str


async def check(grammars: Grammars, parameters: Parameters) -> None:
    """Compile the constraint, if there is one, beside the event loop.

    Raises:
        InvalidField: it cannot be followed, or takes too long to compile.
    """
    constraint, field = parameters.constraint, parameters.constraint_field
    if constraint is None:
        return
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(CHECK_S_MAX):
            await loop.run_in_executor(_threads, grammars.check, constraint)
    except ConstraintFailed as error:
        raise UnusableValue(field, f"cannot be followed: {error}") from None
    except TimeoutError:
        raise UnusableValue(
            field, f"takes more than {CHECK_S_MAX:g} s to compile; make it simpler"
        ) from None


def constraint_of(said: Mapping[str, Any]) -> Wanted | None:
    """What the fields in ``said`` ask for; fields that are not there, or None, ask for nothing.

    Raises:
        InvalidField: the first that is not as it must be, or the second constraint.
    """
    found = [asked for field, read in _READERS.items() if (asked := _read(field, read, said))]
    if len(found) > 1:
        raise ConflictingFields(
            found[1].field, f"comes beside {found[0].field}; an answer follows one constraint"
        )
    return found[0] if found else None


def json_schema(field: str, value: Any) -> Wanted:
    """A schema as a value, or as JSON in a text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise UnusableValue(field, f"is {shown(value)}, which is not JSON") from None
    if not isinstance(value, dict | bool):
        raise InvalidField(field, f"is {shown(value)}, must be a JSON schema")
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return Wanted(Constraint(ConstraintKind.JSON_SCHEMA, text), field)


def any_object(field: str, value: Any) -> Wanted | None:
    if not isinstance(value, bool):
        raise InvalidField(field, f"is {shown(value)}, must be true or false")
    return Wanted(Constraint(ConstraintKind.JSON_SCHEMA, ANY_OBJECT), field) if value else None


def regex(field: str, value: Any) -> Wanted:
    return Wanted(Constraint(ConstraintKind.REGEX, _text(field, value)), field)


def grammar(field: str, value: Any) -> Wanted:
    return Wanted(Constraint(ConstraintKind.LARK, _text(field, value)), field)


def choice(field: str, value: Any) -> Wanted:
    if not isinstance(value, list) or not value:
        raise InvalidField(field, f"is {shown(value)}, must be a list of texts")
    if len(value) > CHOICES_MAX:
        raise InvalidField(field, f"has {len(value)} texts, at most {CHOICES_MAX} are allowed")
    for index, item in enumerate(value):
        _text(f"{field}.{index}", item)
    return Wanted(Constraint(ConstraintKind.CHOICE, json.dumps(value)), field)


def _response_format(field: str, value: Any) -> Wanted | None:
    kinds = ("text", "json_object", "json_schema")
    kind = value.get("type") if isinstance(value, dict) else None
    if kind not in kinds:
        told = shown(kind if isinstance(value, dict) else value)
        where = f"{field}.type" if isinstance(value, dict) else field
        raise InvalidField(where, f"is {told}, must be one of {', '.join(kinds)}")
    if kind == "text":
        return None
    if kind == "json_object":
        return any_object(field, True)
    where = f"{field}.json_schema"
    named = value.get("json_schema")
    if not isinstance(named, dict):
        raise InvalidField(where, f"is {shown(named)}, must be an object with name and schema")
    name, strict = named.get("name"), named.get("strict")
    if not isinstance(name, str) or not _SCHEMA_NAME.fullmatch(name):
        raise InvalidField(
            f"{where}.name", f"is {shown(name)}, must be 1 to 64 of a-z, A-Z, 0-9, _ and -"
        )
    if strict is not None and not isinstance(strict, bool):
        raise InvalidField(f"{where}.strict", f"is {shown(strict)}, must be true or false")
    if not isinstance(named.get("schema"), dict):
        raise InvalidField(
            f"{where}.schema", f"is {shown(named.get('schema'))}, must be a JSON schema"
        )
    return json_schema(f"{where}.schema", named["schema"])


def structured_outputs(field: str, value: Any) -> Wanted:
    """One kind and its value, in an object."""
    if not isinstance(value, dict):
        raise InvalidField(field, f"is {shown(value)}, must be an object")
    for name, item in value.items():
        if name not in _KINDS and item is not None and item is not False:
            raise InvalidField(
                f"{field}.{shown(name)[1:-1]}",
                f"is not supported, must be one of {', '.join(_KINDS)}",
            )
    said = [(name, item) for name, item in value.items() if name in _KINDS and item is not None]
    asked = [one for name, item in said if (one := _KINDS[name](f"{field}.{name}", item))]
    if len(asked) != 1:
        raise InvalidField(field, f"has {len(asked)} of {', '.join(_KINDS)}, must have one")
    return asked[0]


def _read(field: str, read: "_Reader", said: Mapping[str, Any]) -> Wanted | None:
    value = said.get(field)
    return None if value is None else read(field, value)


def _text(field: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InvalidField(field, f"is {shown(value)}, must be text")
    return value


_Reader = Callable[[str, Any], Wanted | None]

_KINDS: Mapping[str, _Reader] = MappingProxyType(
    {
        "json": json_schema,
        "json_object": any_object,
        "regex": regex,
        "choice": choice,
        "grammar": grammar,
    }
)

_READERS: Mapping[str, _Reader] = MappingProxyType(
    {
        "response_format": _response_format,
        "structured_outputs": structured_outputs,
        **{f"guided_{name}": read for name, read in _KINDS.items() if name != "json_object"},
    }
)
