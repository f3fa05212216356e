"""A tool call's JSON object, read while it is being written. Pure.

    {"name": "weather", "arguments": {"city": "Oslo"}}

``json`` reads whole texts only; a client wants the arguments of a call as they come. So this
follows the object's outermost level, and passes what is inside the arguments through as it stands.
"""

import json
from enum import StrEnum

ARGUMENTS = ("arguments", "parameters")
"""The second is Llama 3's."""

_SPACE = " \t\r\n"


class _At(StrEnum):
    START = "start"
    KEY = "key"  # or the end
    IN_KEY = "in_key"
    COLON = "colon"
    VALUE = "value"
    IN_VALUE = "in_value"
    AFTER = "after"  # a comma, or the end
    END = "end"
    BROKEN = "broken"


class CallObject:
    """Characters go in; name and arguments come out as soon as they are known."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._at = _At.START
        self._key = ""
        self._text = ""  # of the key or the value under way
        self._depth = 0  # of brackets within the value
        self._in_string = False
        self._escaped = False
        self._arguments = ""  # not taken yet
        self._has_arguments = False

    @property
    def ended(self) -> bool:
        """The object is whole, or what came is none."""
        return self._at in (_At.END, _At.BROKEN)

    def take(self, text: str) -> int:
        """How many characters of ``text`` belong to the object. Those that break it do not."""
        for index, character in enumerate(text):
            if self.ended:
                return index
            self._take(character)
            if self._at is _At.BROKEN:
                return index
        return len(text)

    def take_arguments(self) -> str:
        """What came since the last time; an object that has none at its end has empty ones."""
        if self._at is _At.END and not self._has_arguments:
            self._has_arguments = True
            return "{}"
        arguments, self._arguments = self._arguments, ""
        return arguments

    def _take(self, character: str) -> None:
        if self._at is _At.IN_KEY:
            self._take_of_key(character)
        elif self._at is _At.IN_VALUE:
            self._take_of_value(character)
        elif self._at is _At.VALUE and character not in _SPACE:
            self._at, self._text, self._depth = _At.IN_VALUE, "", 0
            self._take_of_value(character)
        elif character not in _SPACE:
            self._at = {
                (_At.START, "{"): _At.KEY,
                (_At.KEY, '"'): _At.IN_KEY,
                (_At.KEY, "}"): _At.END,
                (_At.COLON, ":"): _At.VALUE,
                (_At.AFTER, ","): _At.KEY,
                (_At.AFTER, "}"): _At.END,
            }.get((self._at, character), _At.BROKEN)
            self._text = ""

    def _take_of_key(self, character: str) -> None:
        if character == '"' and not self._escaped:
            self._at, self._key = _At.COLON, self._text
        else:
            self._text += character
        self._escaped = character == "\\" and not self._escaped

    def _take_of_value(self, character: str) -> None:
        if not self._in_string and self._depth == 0 and self._text and character in ",}" + _SPACE:
            self._end_value()  # of a number or a word
            self._take(character)
            return
        self._text += character
        if self._is_passed_through():
            self._arguments += character
        if self._in_string:
            self._in_string = self._escaped or character != '"'
            self._escaped = character == "\\" and not self._escaped
        elif character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            if self._depth < 0:
                self._at = _At.BROKEN
                return
        if self._depth == 0 and not self._in_string and character in '"}]':
            self._end_value()

    def _is_passed_through(self) -> bool:
        """Arguments that are an object; some models write one into a string."""
        return self._key in ARGUMENTS and self._text.startswith("{")

    def _end_value(self) -> None:
        self._at = _At.AFTER
        if self._key in ARGUMENTS:
            self._has_arguments = True
            if not self._is_passed_through():
                value = _read(self._text)
                self._arguments += value if isinstance(value, str) else self._text
        elif self._key == "name":
            name = _read(self._text)
            if isinstance(name, str) and name:
                self.name = name
            else:
                self._at = _At.BROKEN


def _read(text: str) -> object:
    try:
        return json.loads(text, strict=False)
    except ValueError:
        return None
