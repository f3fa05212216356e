"""What stands behind the question mark, as strictly as what stands in a body."""

from collections.abc import Mapping, Sequence
from typing import Any

from pdserve.cluster.gateway.parameters import shown
from pdserve.errors import InvalidField, UnusableValue

_DIGITS_MAX = 12


def flag_in(query: Mapping[str, str], name: str) -> bool:
    """False where it is not said.

    Raises:
        InvalidField: it is neither true nor false; so with the next two, in their way.
    """
    text = query.get(name)
    if text not in (None, "true", "false"):
        raise InvalidField(name, f"is {shown(text)}, must be true or false")
    return text == "true"


def number_in(query: Mapping[str, str], name: str, low: int, high: int) -> int | None:
    text = query.get(name)
    if text is None:
        return None
    if text.isascii() and text.isdigit() and len(text) <= _DIGITS_MAX and low <= int(text) <= high:
        return int(text)
    raise InvalidField(name, f"is {shown(text)}, must be a whole number from {low} to {high}")


def word_in(query: Mapping[str, str], name: str, words: Sequence[str]) -> str | None:
    text = query.get(name)
    if text is not None and text not in words:
        raise InvalidField(name, f"is {shown(text)}, must be one of {', '.join(words)}")
    return text


def page_of(items: Sequence[Mapping[str, Any]], after_id: str | None, limit: int) -> dict[str, Any]:
    """OpenAI's page of a list: at most ``limit`` of what follows the item with this id.

    Raises:
        UnusableValue: ``after`` names none of them.
    """
    if after_id is not None:
        ids = [item["id"] for item in items]
        if after_id not in ids:
            raise UnusableValue("after", "names nothing in this list")
        items = items[ids.index(after_id) + 1 :]
    page = items[:limit]
    return {
        "object": "list",
        "data": list(page),
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": len(page) < len(items),
    }
