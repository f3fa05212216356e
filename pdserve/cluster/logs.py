"""Logs of the replicas: plain or as JSON, with the id of the request they are about, and bounded.

``PDSERVE_LOG_FORMAT`` is ``text`` (the default) or ``json``; ``PDSERVE_LOG_LEVEL`` is ``WARNING``
unless it says otherwise. Both belong into the environment of the whole cluster. A line of JSON:

    {"at": "2026-03-01T09:30:00.125Z", "level": "WARNING", "logger": "pdserve.cluster.link",
     "message": "the router is silent", "request": "b2c1…", "pid": 4711}

``request`` is the ``x-request-id`` under which the client's call came, in whatever is logged while
the gateway works on it.

In a *storm* the same thing happens a thousand times a second. What is the same (the same logger,
level and text before its values are put in) is said ``STORM_LINES`` times in ``STORM_S`` seconds;
the first line afterwards says how many were left out. Audit lines have bounds of their own, and
pass.
"""

import contextvars
import json
import logging
import os
import sys
from collections import OrderedDict
from datetime import UTC, datetime

from pdserve.clock import Clock, S, monotonic
from pdserve.errors import ConfigError

FORMAT, LEVEL = "PDSERVE_LOG_FORMAT", "PDSERVE_LOG_LEVEL"
FORMATS = ("text", "json")
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")

STORM_S = 10.0
STORM_LINES = 10

KINDS_MAX = 1_000
"""Kinds of lines that are counted; the one that was quiet for longest is forgotten first."""

MESSAGE_CHARACTERS_MAX = 8_192

NEVER_LEFT_OUT = ("pdserve.audit", "pdserve.why")

request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="")
"""Of the client's call that is worked on here."""


class StormFilter(logging.Filter):
    """Lets the first lines of a kind pass, and counts the others."""

    def __init__(self, *, clock: Clock = monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._kinds: OrderedDict[tuple[str, int, str], list[int]] = OrderedDict()
        """When the span began, lines in it, and how many were left out."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name in NEVER_LEFT_OUT:
            return True
        kind, now_ns = (record.name, record.levelno, str(record.msg)), self._clock()
        span = self._kinds.setdefault(kind, [now_ns, 0, 0])
        self._kinds.move_to_end(kind)
        if len(self._kinds) > KINDS_MAX:
            self._kinds.popitem(last=False)
        if now_ns - span[0] >= STORM_S * S:
            left_out = span[2]
            span[:] = [now_ns, 0, 0]
            if left_out:
                record.left_out = left_out
        span[1] += 1
        if span[1] > STORM_LINES:
            span[2] += 1
            return False
        return True


class _Formatter(logging.Formatter):
    """What both formats have: a bounded message, and what a storm has swallowed."""

    def message_of(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        if record.exc_info:
            message += "\n" + self.formatException(record.exc_info)
        if (left_out := getattr(record, "left_out", 0)) > 0:
            message += f" ({left_out} like this were left out)"
        if len(message) > MESSAGE_CHARACTERS_MAX:
            cut = len(message) - MESSAGE_CHARACTERS_MAX
            message = f"{message[:MESSAGE_CHARACTERS_MAX]}… ({cut} more characters)"
        return message


class TextFormatter(_Formatter):
    def format(self, record: logging.LogRecord) -> str:
        request = request_id.get()
        about = f" [{request}]" if request else ""
        return f"{record.levelname} {record.name}{about}: {self.message_of(record)}"


class JsonFormatter(_Formatter):
    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {
            "at": at.replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": self.message_of(record),
        }
        if request := request_id.get():
            line["request"] = request
        return json.dumps({**line, "pid": record.process})


def start_logging() -> None:
    """Once per process that serves. Where somebody has set up logging in this process already, and
    neither variable is set, it is left as it is.

    Raises:
        ConfigError: one of the two variables has a value that it cannot have.
    """
    style = _one_of(FORMAT, FORMATS, "text")
    level = _one_of(LEVEL, LEVELS, "WARNING")
    if logging.getLogger().handlers and not (FORMAT in os.environ or LEVEL in os.environ):
        return
    ours = logging.getLogger("pdserve")
    for handler in [each for each in ours.handlers if each.get_name() == __name__]:
        ours.removeHandler(handler)  # a process may serve twice
    handler = logging.StreamHandler(sys.stderr)
    handler.set_name(__name__)
    handler.addFilter(StormFilter())
    handler.setFormatter(JsonFormatter() if style == "json" else TextFormatter())
    ours.addHandler(handler)
    ours.setLevel(level)
    ours.propagate = False  # else what Ray or Serve put at the root would say it again


def _one_of(variable: str, known: tuple[str, ...], default: str) -> str:
    value = os.environ.get(variable, default)
    if value not in known:
        raise ConfigError(f"{variable} is {value!r}, must be one of {', '.join(known)}")
    return value
