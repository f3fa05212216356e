"""Request traces: arrival times and lengths, never text. What is read is a ``Trace``.

Four formats, told apart by how a file begins:

    Mooncake   JSONL {"timestamp": ms, "input_length", "output_length", "hash_ids": […]}, blocks of
               512 tokens; the id of an unfinished last block is left out
    Azure      CSV   TIMESTAMP,ContextTokens,GeneratedTokens      wall time to 100 ns
    BurstGPT   CSV   Timestamp,[Session ID,Elapsed time,]Model,Request tokens,Response tokens,…
    recording  JSONL, first line {"pdserve_recording": 1, …}: our own, see ``RECORDING_VERSION``

Block ids say which prompts share a prefix: equal ids, equal tokens up to there. A request without
an answer is one that failed: it is left out, and counted.
"""

import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from pdserve.clock import MS, S
from pdserve.errors import ConfigError
from pdserve.messages import ServiceClass

RECORDING_VERSION = 1
"""First line ``{"pdserve_recording": 1, "block_tokens": n}``, then per request ``{"arrival_ms",
"prompt_tokens", "generated_tokens", "blocks", "tenant", "service_class"}``."""

MOONCAKE_BLOCK_TOKENS = 512
DEFAULT_BLOCK_TOKENS = 16


@dataclass(frozen=True, slots=True)
class TraceRequest:
    arrival_ns: int
    prompt_tokens: int
    generated_tokens: int
    blocks: tuple[int, ...] = ()  # of its full blocks, or fewer where no more is known
    tenant: str = ""
    service_class: ServiceClass = ServiceClass.STANDARD


@dataclass(frozen=True, slots=True)
class Trace:
    requests: tuple[TraceRequest, ...]  # by arrival, the first at 0
    block_tokens: int
    name: str
    dropped_count: int = 0  # lines that stand for failed requests

    @property
    def span_ns(self) -> int:
        return self.requests[-1].arrival_ns if self.requests else 0


def some_tokens(count: int) -> Any:
    """In the place of a tuple of tokens, of which only the number matters: nobody in the router
    looks at one, and a million prompts would not fit into memory."""
    return range(count)


def load_trace(path: str | Path) -> Trace:
    """Reads any of the four formats.

    Raises:
        ConfigError: the file cannot be read, has none of the formats, or a line that does not fit.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")  # Azure's files begin with a BOM
    except OSError as error:
        raise ConfigError(f"cannot read the trace {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not text in UTF-8: byte {error.start}") from error
    return parse_trace(text, str(path))


def parse_trace(text: str, name: str) -> Trace:
    first = text.lstrip().partition("\n")[0].strip()
    if not first:
        raise ConfigError(f"{name} is empty; a trace has at least one request")
    if first.startswith("{"):
        recording = '"pdserve_recording"' in first
        trace = _recording(text, name) if recording else _mooncake(text, name)
    elif {"TIMESTAMP", "ContextTokens", "GeneratedTokens"} <= set(first.split(",")):
        trace = _azure(text, name)
    elif {"Timestamp", "Request tokens", "Response tokens"} <= set(first.split(",")):
        trace = _burstgpt(text, name)
    else:
        raise ConfigError(
            f"{name}, line 1: {first[:80]!r} begins none of the known formats: Mooncake JSONL, "
            "Azure CSV, BurstGPT CSV, or what `pdserve record` writes"
        )
    if not trace.requests:
        raise ConfigError(f"{name} holds no request that was answered")
    return trace


# ── one line's fields ────────────────────────────────────────────────────────────────────────────


class _Line:
    """One line's fields, and where it stands, for messages."""

    __slots__ = ("_fields", "_name", "_number")

    def __init__(self, fields: dict[str, Any], name: str, number: int) -> None:
        self._fields = fields
        self._name = name
        self._number = number

    def bad(self, field: str, right: str) -> ConfigError:
        if field not in self._fields or self._fields[field] is None:
            return ConfigError(f"{self._name}, line {self._number}: {field} is missing; {right}")
        found = self._fields[field]
        return ConfigError(
            f"{self._name}, line {self._number}: {field} is {found!r}, must be {right}"
        )

    def number(self, field: str) -> float:
        try:
            value = float(self._fields[field])
        except (KeyError, TypeError, ValueError):
            raise self.bad(field, "a number, 0 or more") from None
        if not (math.isfinite(value) and value >= 0) or self._fields[field] is True:
            raise self.bad(field, "a number, 0 or more")
        return value

    def count(self, field: str, *, least: int = 1) -> int:
        value = self.number(field)
        if value != int(value) or value < least:
            raise self.bad(field, f"a whole number, {least} or more")
        return int(value)

    def ids(self, field: str) -> tuple[int, ...]:
        value = self._fields.get(field)
        if not isinstance(value, list) or any(type(i) is not int or i < 0 for i in value):
            raise self.bad(field, "a list of whole numbers, 0 or more")
        return tuple(value)

    def text(self, field: str) -> str:
        value = self._fields.get(field)
        if not isinstance(value, str):
            raise self.bad(field, "text")
        return value


def _json_lines(text: str, name: str) -> Iterator[tuple[int, _Line]]:
    for number, line in enumerate(io.StringIO(text), 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ConfigError(f"{name}, line {number} is not JSON: {error}") from None
        if not isinstance(fields, dict):
            raise ConfigError(f"{name}, line {number} must be an object in braces")
        yield number, _Line(fields, name, number)


def _csv_lines(text: str, name: str) -> Iterator[_Line]:
    rows = csv.DictReader(io.StringIO(text))
    try:
        for row in rows:
            if None in row:
                raise ConfigError(
                    f"{name}, line {rows.line_num} has more fields than the {len(row) - 1} of the "
                    "first line"
                )
            yield _Line(dict(row), name, rows.line_num)
    except csv.Error as error:
        raise ConfigError(f"{name}, line {rows.line_num} is not CSV: {error}") from None


# ── the formats ──────────────────────────────────────────────────────────────────────────────────


def _mooncake(text: str, name: str) -> Trace:
    requests = []
    for _, line in _json_lines(text, name):
        prompt_tokens = line.count("input_length")
        ids = line.ids("hash_ids")
        requests.append(
            TraceRequest(
                arrival_ns=round(line.number("timestamp") * MS),
                prompt_tokens=prompt_tokens,
                generated_tokens=line.count("output_length", least=0),
                blocks=ids[: prompt_tokens // MOONCAKE_BLOCK_TOKENS],
            )
        )
    return _trace(requests, MOONCAKE_BLOCK_TOKENS, name)


def _recording(text: str, name: str) -> Trace:
    lines = _json_lines(text, name)
    _, header = next(lines)
    version = header.count("pdserve_recording")
    if version != RECORDING_VERSION:
        raise ConfigError(
            f"{name}, line 1: recording version {version}; this release reads {RECORDING_VERSION}"
        )
    block_tokens = header.count("block_tokens")
    requests = []
    for _, line in lines:
        prompt_tokens = line.count("prompt_tokens")
        blocks = line.ids("blocks")
        if len(blocks) > prompt_tokens // block_tokens:
            raise line.bad("blocks", f"at most {prompt_tokens // block_tokens} ids, one per block")
        service_class = line.text("service_class")
        if service_class not in list(ServiceClass):
            raise line.bad("service_class", "one of " + ", ".join(ServiceClass))
        requests.append(
            TraceRequest(
                arrival_ns=round(line.number("arrival_ms") * MS),
                prompt_tokens=prompt_tokens,
                generated_tokens=line.count("generated_tokens", least=0),
                blocks=blocks,
                tenant=line.text("tenant"),
                service_class=ServiceClass(service_class),
            )
        )
    return _trace(requests, block_tokens, name)


def _azure(text: str, name: str) -> Trace:
    requests = []
    for line in _csv_lines(text, name):
        requests.append(
            TraceRequest(
                arrival_ns=_wall_ns(line, "TIMESTAMP"),
                prompt_tokens=line.count("ContextTokens"),
                generated_tokens=line.count("GeneratedTokens", least=0),
            )
        )
    return _trace(requests, DEFAULT_BLOCK_TOKENS, name)


def _wall_ns(line: _Line, field: str) -> int:
    """``2023-11-16 18:17:03.9799600``, to the last digit; also with a UTC offset or T."""
    text = line.text(field).strip()
    whole, _, rest = text.partition(".")
    digits = rest[: len(rest) - len(rest.lstrip("0123456789"))]
    try:
        moment = datetime.fromisoformat(whole + rest[len(digits) :] + "+00:00"[: _utc(whole, rest)])
    except ValueError:
        raise line.bad(field, "like 2023-11-16 18:17:03.9799600") from None
    return round(moment.timestamp()) * S + int((digits + "0" * 9)[:9])


def _utc(whole: str, rest: str) -> int:
    """How much of ``+00:00`` must be added to a time of day: nothing where it has an offset."""
    has_offset = "+" in whole[10:] or "-" in whole[10:] or "+" in rest or "-" in rest or "Z" in rest
    return 0 if has_offset else 6


def _burstgpt(text: str, name: str) -> Trace:
    requests = []
    for line in _csv_lines(text, name):
        generated_tokens = line.count("Response tokens", least=0)
        requests.append(
            TraceRequest(
                arrival_ns=round(line.number("Timestamp") * S),
                prompt_tokens=line.count("Request tokens", least=min(1, generated_tokens)),
                generated_tokens=generated_tokens,
            )
        )
    return _trace(requests, DEFAULT_BLOCK_TOKENS, name)


def _trace(requests: Sequence[TraceRequest], block_tokens: int, name: str) -> Trace:
    """By arrival, with the first at 0. Who is equal keeps the file's order."""
    answered = [request for request in requests if request.generated_tokens]
    first_ns = min((request.arrival_ns for request in answered), default=0)
    moved = [replace(request, arrival_ns=request.arrival_ns - first_ns) for request in answered]
    moved.sort(key=lambda request: request.arrival_ns)
    return Trace(tuple(moved), block_tokens, Path(name).name, len(requests) - len(answered))
