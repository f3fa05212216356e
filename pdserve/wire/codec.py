"""Dataclasses to bytes and back, with every type checked on the way back.

A message is a msgpack array: the type's name, then its fields in order. What is nested is an array
of fields without a name, because the field's type hint says what it is; only a union of several
dataclasses carries names inside.

Each dataclass is compiled once, from its type hints, into one function per direction, because token
streams and all that a router hears pass here. Encoding trusts its caller (the type checker has been
there); decoding trusts nobody: wrong types, unknown names, missing or extra fields are a
``FrameError`` that names the type and the field. Hints that may stand in a message: int (64 bits),
float (an int is taken for one), str, bytes, bool, NewTypes of these, ``StrEnum``,
``tuple[T, ...]``, ``tuple[A, B]``, ``Mapping[str, T]``, dataclasses, and unions of None, of plain
types, or of dataclasses.

A ``SteadyMs`` is an instant by a clock that only its process has. It travels as what is left of it,
hop by hop, as the timeouts of gRPC do; what a hop takes is added to it, and nothing else is. A
``SinceUs``, which has passed, travels as how long ago it was; what a hop takes is left out.

A length that a message claims and does not contain costs nothing: a first pass, which allocates
nothing, finds it. So a message of n bytes never takes more than about 90 n bytes (empty mappings).
"""

import dataclasses
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from typing import Annotated, Any, NoReturn, get_args, get_origin

import msgpack

from pdserve import messages, prompt_tasks
from pdserve.clock import SinceUs, SteadyMs, steady_unix_ms, steady_unix_us
from pdserve.errors import ErrorInfo, FrameError, MessageTooLarge
from pdserve.wire.frame import MESSAGE_BYTES_MAX, Buffer

_PLAIN = (int, float, str, bytes, bool)

_Encode = Callable[[Any], Any]
_Decode = Callable[[Any], Any]


class Codec:
    """Encodes and decodes one set of message types, and ``ErrorInfo``, which answers may be."""

    def __init__(self, types: Iterable[type]) -> None:
        self._compiled: dict[type, tuple[_Encode, _Decode]] = {}
        self._encoders: dict[type, tuple[str, _Encode]] = {}
        self._decoders: dict[str, _Decode] = {}
        for cls in (ErrorInfo, *types):
            name = cls.__name__
            if cls in self._encoders:
                continue
            assert name not in self._decoders, f"two message types are called {name}"
            encode, decode = self._dataclass(cls)
            self._encoders[cls] = (name, encode)
            self._decoders[name] = decode

    def encode(self, message: object) -> bytes:
        """The message's bytes.

        Raises:
            MessageTooLarge: they are more than ``MESSAGE_BYTES_MAX``.
            TypeError: not a type of this codec, or a field holds what its hint forbids.
        """
        found = self._encoders.get(type(message))
        if found is None:
            raise TypeError(f"{type(message).__name__} is not a message type of this codec")
        name, fields_of = found
        data: bytes = msgpack.packb((name, *fields_of(message)))
        if len(data) > MESSAGE_BYTES_MAX:
            raise MessageTooLarge(
                f"{name} takes {len(data)} bytes, the limit is {MESSAGE_BYTES_MAX}; "
                "send less at once"
            )
        return data

    def decode(self, data: Buffer) -> object:
        """The message in ``data``. Raises FrameError for anything but one whole message."""
        if len(data) > MESSAGE_BYTES_MAX:
            raise FrameError(f"a message of {len(data)} bytes, the limit is {MESSAGE_BYTES_MAX}")
        try:
            structure = msgpack.Unpacker(max_buffer_size=len(data))
            structure.feed(data)
            structure.skip()
            value = msgpack.unpackb(data, use_list=False, max_ext_len=0)
        except (ValueError, msgpack.UnpackException) as error:
            raise FrameError(f"a message is not msgpack: {error}") from error
        if type(value) is not tuple or not value or type(value[0]) is not str:
            raise FrameError("a message must be an array that begins with its type's name")
        decode = self._decoders.get(value[0])
        if decode is None:
            raise FrameError(f"unknown message type {value[0][:64]!r}")
        return decode(value[1:])

    def _dataclass(self, cls: type) -> tuple[_Encode, _Decode]:
        """To a sequence of plain values, and back from a tuple of them."""
        if cls in self._compiled:
            return self._compiled[cls]
        assert dataclasses.is_dataclass(cls), f"{cls.__name__} is not a dataclass"
        known = typing.get_type_hints(cls, include_extras=True)
        hints = {field.name: known[field.name] for field in dataclasses.fields(cls)}
        fields = [self._hint(hint, f"{cls.__name__}.{name}") for name, hint in hints.items()]
        encode = _fields_encoder([*hints], [field[0] for field in fields])
        decode = _fields_decoder(cls, [*hints.values()], [field[1] for field in fields])
        self._compiled[cls] = (encode, decode)
        return encode, decode

    def _hint(self, hint: Any, where: str) -> tuple[_Encode | None, _Decode]:
        """Encoder and decoder of one hint; no encoder where the value may stay as it is."""
        hint = _without_newtypes(hint)
        if get_origin(hint) is Annotated or hint in _PLAIN:
            return _number_or_text(hint, where)
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            encode, decode = self._dataclass(hint)
            return encode, decode
        if isinstance(hint, type) and issubclass(hint, StrEnum):
            return None, _enum_decoder(hint, where)
        origin, arguments = get_origin(hint), get_args(hint)
        if origin is tuple:
            return self._tuple(arguments, where)
        if isinstance(origin, type) and issubclass(origin, Mapping) and arguments[0] is str:
            return self._mapping(arguments[1], where)
        if origin in (types.UnionType, typing.Union):
            return self._union(arguments, where)
        raise TypeError(f"{where}: {hint} cannot stand in a message")

    def _tuple(self, arguments: tuple[Any, ...], where: str) -> tuple[_Encode | None, _Decode]:
        if len(arguments) == 2 and arguments[1] is ...:
            encode, decode = self._hint(arguments[0], where)
            encode_all = None if encode is None else _each(encode)
            element = _without_newtypes(arguments[0])
            if element in _PLAIN and element is not float:
                return None, _plain_tuple_decoder(element, where)
            return encode_all, _tuple_decoder(decode, where)
        pairs = [self._hint(argument, where) for argument in arguments]
        if any(encode is not None for encode, _ in pairs):
            raise TypeError(f"{where}: a fixed tuple holds plain values only")
        return None, _fixed_tuple_decoder([decode for _, decode in pairs], where)

    def _mapping(self, argument: Any, where: str) -> tuple[_Encode, _Decode]:
        encode, decode = self._hint(argument, where)

        def encode_mapping(value: Mapping[str, Any]) -> dict[str, Any]:
            if encode is None:
                return dict(value)
            return {key: encode(item) for key, item in value.items()}

        def decode_mapping(value: Any) -> dict[str, Any]:
            if type(value) is not dict:
                _refuse(value, "a mapping", where)
            for key in value:
                if type(key) is not str:
                    _refuse(key, "text as a key", where)
            return {key: decode(item) for key, item in value.items()}

        return encode_mapping, decode_mapping

    def _union(self, arguments: tuple[Any, ...], where: str) -> tuple[_Encode | None, _Decode]:
        members = [argument for argument in arguments if argument is not types.NoneType]
        optional = len(members) < len(arguments)
        if len(members) > 1 and all(member in _PLAIN for member in members):
            allowed = frozenset(members) | ({types.NoneType} if optional else frozenset())
            return None, _plain_decoder(allowed, where)
        if len(members) == 1:
            encode, decode = self._hint(members[0], where)
        elif all(dataclasses.is_dataclass(member) for member in members):
            encode, decode = self._tagged(members, where)
        else:
            raise TypeError(f"{where}: a union of {members} cannot stand in a message")
        return (_optional(encode), _optional_decoder(decode)) if optional else (encode, decode)

    def _tagged(self, members: list[type], where: str) -> tuple[_Encode, _Decode]:
        by_type = {cls: (cls.__name__, self._dataclass(cls)[0]) for cls in members}
        by_name = {cls.__name__: self._dataclass(cls)[1] for cls in members}
        assert len(by_name) == len(members), f"{where}: two members have one name"

        def encode_tagged(value: Any) -> tuple[Any, ...]:
            name, encode = by_type[type(value)]
            return (name, *encode(value))

        def decode_tagged(value: Any) -> Any:
            if type(value) is not tuple or not value:
                _refuse(value, "an array that begins with a type's name", where)
            if type(value[0]) is not str or value[0] not in by_name:
                _refuse(value[0], "one of " + ", ".join(by_name), where)
            return by_name[value[0]](value[1:])

        return encode_tagged, decode_tagged


def _without_newtypes(hint: Any) -> Any:
    while isinstance(hint, typing.NewType):
        hint = hint.__supertype__
    return hint


def _refuse(value: object, wanted: str, where: str) -> NoReturn:
    raise FrameError(f"{where} is {repr(value)[:64]}, must be {wanted}")


def _fields_encoder(names: list[str], encoders: list[_Encode | None]) -> _Encode:
    """A function that is written out, field by field: it takes half as long as a loop over them."""
    fields = [
        f"value.{name}" if encode is None else f"encode_{index}(value.{name})"
        for index, (name, encode) in enumerate(zip(names, encoders, strict=True))
    ]
    lines = ["def encode_fields(value):", f"    return [{', '.join(fields)}]"]
    known = {f"encode_{index}": encode for index, encode in enumerate(encoders)}
    return _written_out("encode_fields", lines, known)


def _fields_decoder(cls: type, hints: list[Any], decoders: list[_Decode]) -> _Decode:
    """Likewise. A field is looked at by its decoder unless it is plainly what it must be."""
    count = len(decoders)
    fields = [f"field_{index}" for index in range(count)]
    lines = [
        "def decode_fields(value):",
        f"    if type(value) is not tuple or len(value) != {count}:",
        f"        refuse(value, 'its {count} fields', '{cls.__name__}')",
        *([f"    {', '.join(fields)}, = value"] if fields else []),
    ]
    for index, (field, hint) in enumerate(zip(fields, hints, strict=True)):
        lines += [
            f"    if {_doubt(field, hint)}:",
            f"        {field} = decode_{index}({field})",
        ]
    lines.append(f"    return cls({', '.join(fields)})")
    known = {f"decode_{index}": decode for index, decode in enumerate(decoders)}
    return _written_out("decode_fields", lines, {"cls": cls, "refuse": _refuse, **known})


def _doubt(field: str, hint: Any) -> str:
    """A condition that is false only for values that may stay as they are."""
    hint = _without_newtypes(hint)
    if hint in _PLAIN:
        return f"type({field}) is not {hint.__name__}"
    if get_origin(hint) is tuple and get_args(hint)[1:] == (...,):
        return f"{field} != ()"
    arguments = get_args(hint)
    if get_origin(hint) in (types.UnionType, typing.Union) and types.NoneType in arguments:
        return f"{field} is not None"
    return "True"


def _written_out(name: str, lines: list[str], known: dict[str, Any]) -> _Encode:
    """The function of that name; nothing in ``lines`` comes from anywhere but our own classes."""
    exec("\n".join(lines), known)  # noqa: S102  (as dataclasses make theirs)
    function: _Encode = known[name]
    return function


def _plain_decoder(allowed: frozenset[type], where: str) -> _Decode:
    wanted = " or ".join(sorted(cls.__name__ for cls in allowed))
    int_as_float = float in allowed and int not in allowed

    def decode_plain(value: Any) -> Any:
        if type(value) in allowed:
            return value
        if int_as_float and type(value) is int:
            return float(value)
        _refuse(value, wanted, where)

    return decode_plain


def _number_or_text(hint: Any, where: str) -> tuple[_Encode | None, _Decode]:
    if hint == SteadyMs:
        return _left_ms, _instant_decoder(where)
    if hint == SinceUs:
        return _ago_us, _since_decoder(where)
    if hint in _PLAIN:
        return None, _plain_decoder(frozenset({hint}), where)
    raise TypeError(f"{where}: {hint} cannot stand in a message")


def _left_ms(until_ms: int) -> int:
    """What is left until an instant, in milliseconds: -1 where it has passed, 0 where it never
    comes."""
    if until_ms == 0:
        return 0
    left_ms = until_ms - steady_unix_ms()
    return left_ms if left_ms > 0 else -1


def _instant_decoder(where: str) -> _Decode:
    plain = _plain_decoder(frozenset({int}), where)

    def decode_instant(value: Any) -> int:
        left_ms: int = plain(value)
        return 0 if left_ms == 0 else steady_unix_ms() + max(left_ms, -1)

    return decode_instant


def _ago_us(since_us: int) -> int:
    """How long ago an instant was, in microseconds; -1 where there is none."""
    return -1 if since_us == 0 else max(0, steady_unix_us() - since_us)


def _since_decoder(where: str) -> _Decode:
    plain = _plain_decoder(frozenset({int}), where)

    def decode_since(value: Any) -> int:
        ago_us: int = plain(value)
        return 0 if ago_us < 0 else max(1, steady_unix_us() - ago_us)

    return decode_since


def _enum_decoder(cls: type[StrEnum], where: str) -> _Decode:
    members = {member.value: member for member in cls}

    def decode_enum(value: Any) -> StrEnum:
        member = members.get(value) if type(value) is str else None
        if member is None:
            _refuse(value, "one of " + ", ".join(members), where)
        return member

    return decode_enum


def _each(encode: _Encode) -> _Encode:
    return lambda value: [encode(item) for item in value]


def _optional(encode: _Encode | None) -> _Encode | None:
    if encode is None:
        return None
    return lambda value: None if value is None else encode(value)


def _optional_decoder(decode: _Decode) -> _Decode:
    return lambda value: None if value is None else decode(value)


def _tuple_decoder(decode: _Decode, where: str) -> _Decode:
    def decode_tuple(value: Any) -> tuple[Any, ...]:
        if type(value) is not tuple:
            _refuse(value, "an array", where)
        return tuple([decode(item) for item in value])

    return decode_tuple


def _plain_tuple_decoder(element: type, where: str) -> _Decode:
    """Of token ids and keys: thousands at once, so the good case is one pass in C."""
    allowed = frozenset({element})

    def decode_plain_tuple(value: Any) -> tuple[Any, ...]:
        if type(value) is not tuple:
            _refuse(value, "an array", where)
        if not allowed.issuperset(map(type, value)):
            wrong = next(item for item in value if type(item) is not element)
            _refuse(wrong, element.__name__, where)
        return value

    return decode_plain_tuple


def _fixed_tuple_decoder(decoders: list[_Decode], where: str) -> _Decode:
    count = len(decoders)

    def decode_fixed(value: Any) -> tuple[Any, ...]:
        if type(value) is not tuple or len(value) != count:
            _refuse(value, f"an array of {count}", where)
        return tuple([decode(item) for decode, item in zip(decoders, value, strict=True)])

    return decode_fixed


MESSAGES = Codec(
    value
    for module in (messages, prompt_tasks)
    for value in vars(module).values()
    if isinstance(value, type)
    and dataclasses.is_dataclass(value)
    and value.__module__ == module.__name__
)
"""Of everything that ``pdserve.messages`` and ``pdserve.prompt_tasks`` define."""
