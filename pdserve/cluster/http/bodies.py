"""A request's body as a JSON object, strictly: what two readers could understand differently is
refused.

Beyond the grammar: no NaN or Infinity, no number that overflows, no name twice in one object, no
lone surrogate (no tokeniser can encode one), UTF-8 only, and a bound on size, time and nesting.
"""

import asyncio
import json
import math
from typing import Any, NoReturn

from starlette.exceptions import HTTPException
from starlette.requests import Request

from pdserve.cluster.gateway.parameters import shown
from pdserve.errors import InvalidField, RequestError

BODY_WAIT_S = 30.0
"""How long a client may take to send its body."""

WHOLE_MAX = 2**53
"""Above it a floating-point number no longer says which whole number was meant."""

NESTING_MAX = 64
"""Levels of objects and lists."""


async def read_object(request: Request, bytes_max: int) -> dict[str, Any]:
    """The body of ``request``.

    Raises:
        HTTPException: too large (413), too slow (408), or not declared as JSON (415).
        RequestError: not a JSON object.
        InvalidField: some value in it is not acceptable in any field.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise HTTPException(415, f"content-type is {shown(kind)}, must be application/json")
    return parse_object(await read_bytes(request, bytes_max))


def parse_object(data: bytes) -> dict[str, Any]:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise RequestError(f"the body is not UTF-8: {error.reason} at byte {error.start}") from None
    try:
        tree = json.loads(
            text,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            object_pairs_hook=_without_duplicates,
        )
    except json.JSONDecodeError as error:
        raise RequestError(
            f"the body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from None
    except RecursionError:
        raise RequestError(f"the body nests deeper than {NESTING_MAX} levels") from None
    except ValueError:  # Python's own bound on the digits of a whole number
        raise RequestError("the body holds a whole number of thousands of digits") from None
    if not isinstance(tree, dict):
        raise RequestError("the body is not a JSON object; send {…} with the request's fields")
    _check_depth_and_surrogates(tree, surrogates="\\u" in text)
    return tree


async def read_bytes(request: Request, bytes_max: int) -> bytes:
    """The body as it is.

    Raises:
        HTTPException: too large (413) or too slow (408).
    """
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > bytes_max:
        raise _too_large(int(declared), bytes_max)
    parts: list[bytes] = []
    size_bytes = 0
    try:
        async with asyncio.timeout(BODY_WAIT_S):
            async for part in request.stream():
                size_bytes += len(part)
                if size_bytes > bytes_max:
                    raise _too_large(size_bytes, bytes_max)
                parts.append(part)
    except TimeoutError:
        raise HTTPException(408, f"the body did not arrive within {BODY_WAIT_S:g} s") from None
    return b"".join(parts)


def _too_large(size_bytes: int, bytes_max: int) -> HTTPException:
    return HTTPException(413, f"the body has {size_bytes} bytes or more, at most {bytes_max} pass")


def _refuse_constant(name: str) -> NoReturn:
    raise RequestError(f"the body holds {name}, which is not a JSON number")


def _finite(text: str) -> float | int:
    """To JSON, unlike to Python, 2.0 is a whole number."""
    value = float(text)
    if not math.isfinite(value):
        raise RequestError(f"the body holds the number {shown(text)}, which is too large")
    return int(value) if value.is_integer() and abs(value) <= WHOLE_MAX else value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise InvalidField(shown(name).strip("'\""), "appears twice in one object")
            seen.add(name)
    return tree


def _check_depth_and_surrogates(tree: dict[str, Any], *, surrogates: bool) -> None:
    """One pass without recursion; strings are looked at only where an escape stood in the text."""
    looked_at = dict | list | str if surrogates else dict | list
    pending = [(name, 1, value) for name, value in tree.items() if isinstance(value, looked_at)]
    if surrogates and not all(map(_encodable, tree)):
        raise RequestError("the body has a name with half of a surrogate pair")
    while pending:
        field, depth, value = pending.pop()
        if isinstance(value, str):
            if not _encodable(value):
                raise InvalidField(field, "holds half of a surrogate pair, which is no character")
            continue
        if depth >= NESTING_MAX:
            raise InvalidField(field, f"nests deeper than {NESTING_MAX} levels")
        items = value
        if isinstance(value, dict):
            items = value.values()
            if surrogates and not all(map(_encodable, value)):
                raise InvalidField(field, "has a name with half of a surrogate pair")
        pending.extend((field, depth + 1, item) for item in items if isinstance(item, looked_at))


def _encodable(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)
