"""A stream that any gateway can go on with: event ids, and what a resumed answer leaves out. Pure.

A client that asks for it (``x-pdserve-resumable: 1``) gets an id with every event. When the
connection breaks it sends the same body again, to any gateway, with the last id as
``Last-Event-ID``, as the HTML standard's server-sent events do. The new stream begins behind that
event, and its text, tokens and log-probabilities are those that the old one would have had: the
answer is computed again from the prompt and the seed that the id carries, and what was told is left
out. So no gateway keeps anything for one that may die.

An id says which answer (its name, when it began, the seed) and how far each choice was told: tokens
and characters, since how many come in one event is a matter of timing. It carries no right. Who
makes one up gets the rest of an answer to a request of their own; the digest in it, over body,
prompt, tenant and model, is there so that nothing is glued to the beginning of something else.
"""

import hashlib
import json
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pdserve.cluster.gateway.calls import Piece
from pdserve.cluster.gateway.parameters import shown
from pdserve.cluster.http.answers import Choice, Dialect
from pdserve.cluster.http.asking import Asked, flag_of
from pdserve.errors import InvalidField

HEADER = "Last-Event-ID"
WANTED_HEADER = "x-pdserve-resumable"
CHOICES_MAX = 16
"""In a stream that can be resumed: every event's id names each of them."""

ID_CHARACTERS_MAX = 1024
DIGEST_CHARACTERS = 20
_SEED_BITS = 63

_ID = re.compile(
    r"1\.(?P<name>[0-9a-f]{24})\.(?P<created>[0-9a-f]{1,12})\.(?P<seed>[0-9a-f]{1,16})"
    rf"\.(?P<digest>[0-9a-f]{{{DIGEST_CHARACTERS}}})\.(?P<told>[0-9a-f_f-]*)"
)
_TOLD = re.compile(r"([0-9a-f]{1,8})-([0-9a-f]{1,8})(-f)?")


@dataclass(frozen=True, slots=True)
class Told:
    """How far one choice was told."""

    tokens: int
    characters: int
    finished: bool = False


@dataclass(frozen=True, slots=True)
class EventId:
    name: str  # the answer's, without its prefix: 24 hexadecimal digits
    created: int  # unix time, s
    seed: int
    digest: str
    told: tuple[Told | None, ...]  # by choice; None: nothing yet

    def __str__(self) -> str:
        told = "_".join(map(_told_text, self.told))
        return f"1.{self.name}.{self.created:x}.{self.seed:x}.{self.digest}.{told}"


def parse_event_id(text: str, *, field: str = HEADER) -> EventId:
    """``field``: where it came from, for errors.

    Raises:
        InvalidField: it is none of ours.
    """
    match = _ID.fullmatch(text) if len(text) <= ID_CHARACTERS_MAX else None
    parts = [_TOLD.fullmatch(part) for part in match["told"].split("_")] if match else []
    blank = [not part for part in match["told"].split("_")] if match else []
    if match is None or not all(p or b for p, b in zip(parts, blank, strict=True)):
        raise InvalidField(
            field, f"is {shown(text)}, which is no id of an event of ours; send the last one as is"
        )
    told = (Told(int(p[1], 16), int(p[2], 16), p[3] is not None) if p else None for p in parts)
    return EventId(
        match["name"],
        int(match["created"], 16),
        int(match["seed"], 16),
        match["digest"],
        tuple(told),
    )


def _told_text(told: Told | None) -> str:
    if told is None:
        return ""
    return f"{told.tokens:x}-{told.characters:x}" + ("-f" if told.finished else "")


def digest_of(
    tree: Mapping[str, Any], prompts: Sequence[Sequence[int]], tenant: str, identity: str
) -> str:
    """Of all that an answer depends on but its seed.

    Args:
        tree: the body.
        prompts: their tokens: a chat template may know the date.
        identity: of the model and its numerics.
    """
    text = json.dumps([tree, [[*tokens] for tokens in prompts], tenant, identity], sort_keys=True)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:DIGEST_CHARACTERS]


def resumable(
    asked: Asked, tree: Mapping[str, Any], headers: Mapping[str, str], identity: str
) -> tuple[Asked, "Trail | None"]:
    """What is asked with the name and the seed that its ids carry, and the trail of its events;
    the same and none where no ids are wanted.

    Args:
        tree: the body that was asked with.
        identity: of the model and its numerics.

    Raises:
        InvalidField: the id is not one of this request's, or it cannot have any.
    """
    last = headers.get(HEADER.lower())
    if last is None and not flag_of(headers, WANTED_HEADER):
        return asked, None
    count = len(asked.calls) * asked.n
    if not asked.stream:
        raise InvalidField("stream", "is false; only a stream has events that could be resumed")
    if count > CHOICES_MAX:
        raise InvalidField("n", f"makes {count} choices, a resumable stream has {CHOICES_MAX}")
    first = asked.calls[0]
    digest = digest_of(tree, [call.prompt for call in asked.calls], first.tenant, identity)
    fresh = asked.id.removeprefix(asked.dialect.id_prefix)
    begin = begin_of(last, digest, count, name=fresh, seed=first.seed)
    name = asked.dialect.id_prefix + begin.name
    calls = tuple(
        replace(call, call=name + call.call.removeprefix(asked.id), seed=begin.seed)
        for call in asked.calls
    )
    return replace(asked, id=name, calls=calls), Trail(begin)


def begin_of(
    last: str | None, digest: str, count: int, *, name: str, seed: int | None, field: str = HEADER
) -> EventId:
    """Behind which event a stream of ``count`` choices begins.

    Args:
        last: the last id that the client has; None or empty: it begins anew, with ``name`` (24
            hexadecimal digits) and ``seed``, which is drawn where it is None.
        digest: of what is asked for now.
        field: where ``last`` came from, for errors.

    Raises:
        InvalidField: ``last`` is none of ours, or of another request.
    """
    if not last:
        seed = secrets.randbits(_SEED_BITS) if seed is None else seed
        return EventId(name, int(time.time()), seed, digest, (None,) * count)
    begin = parse_event_id(last, field=field)
    if begin.digest != digest or len(begin.told) != count:
        raise InvalidField(
            field,
            "belongs to another request, API key or model; send the body, the key and the id "
            "of one and the same stream, or leave the id out to begin anew",
        )
    return begin


class Trail:
    """One stream's way through its events: gives them ids, and leaves out what was told before."""

    def __init__(self, begin: EventId) -> None:
        """``begin``: behind which event the stream begins; of a new one nothing is told."""
        self.created = begin.created
        self._id = begin
        self._told = list(begin.told)
        self._skip = begin.told
        self._seen = [Told(0, 0) for _ in begin.told]

    def chunks(
        self, dialect: Dialect, choice: Choice, piece: Piece
    ) -> list[tuple[str, dict[str, Any]]]:
        """What is to be said of ``piece``, each chunk with the id of its event."""
        if self._skip[choice.index] is not None:
            choice.started = True
        head, tail = cut(piece, self._seen[choice.index], self._skip[choice.index])
        if head is not None:
            self._see(choice.index, head)
            dialect.chunks(choice, head)  # told before; the dialect is to know it all the same
        if tail is None:
            return []
        before = self._seen[choice.index]
        self._see(choice.index, tail)
        told = []
        chunks = dialect.chunks(choice, tail)
        for index, chunk in enumerate(chunks):
            # All but the last one say who speaks, and nothing of the piece.
            last = index == len(chunks) - 1
            self._told[choice.index] = self._seen[choice.index] if last else before
            told.append((str(replace(self._id, told=tuple(self._told))), chunk))
        return told

    def rest(self, piece: Piece) -> tuple[str, Piece] | None:
        """What of ``piece`` was not told before, as one event, and its id; None: all of it was."""
        index = piece.choice
        head, tail = cut(piece, self._seen[index], self._skip[index])
        for part in filter(None, (head, tail)):
            self._see(index, part)
        if tail is None:
            return None
        self._told[index] = self._seen[index]
        return str(replace(self._id, told=tuple(self._told))), tail

    def _see(self, index: int, piece: Piece) -> None:
        seen = self._seen[index]
        self._seen[index] = Told(
            seen.tokens + len(piece.tokens),
            seen.characters + len(piece.text),
            piece.finish is not None,
        )


def cut(piece: Piece, seen: Told, told: Told | None) -> tuple[Piece | None, Piece | None]:
    """``piece``, which begins at ``seen``, as what lies before and what lies behind ``told``; None
    for a part that is empty."""
    if told is None:
        return None, piece
    tokens, characters = told.tokens - seen.tokens, told.characters - seen.characters
    if tokens >= len(piece.tokens) and characters >= len(piece.text):
        if piece.finish is None or told.finished:
            return piece, None
    elif tokens <= 0 and characters <= 0:
        return None, piece
    tokens, characters = max(tokens, 0), max(characters, 0)
    head = replace(
        piece,
        tokens=piece.tokens[:tokens],
        text=piece.text[:characters],
        finish=None,
        stop_reason=None,
    )
    return head, replace(piece, tokens=piece.tokens[tokens:], text=piece.text[characters:])
