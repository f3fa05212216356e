"""Logs of the replicas: plain or as JSON, with the id of the request they are about, and bounded.

``PDSERVE_LOG_FORMAT`` is ``text`` (the default) or ``json``; ``PDSERVE_LOG_LEVEL`` is ``WARNING``
unless it says otherwise. Both belong into the environment of the whole cluster. A line of JSON:

    {"at": "2026-03-01T09:30:00.125Z", "level": "WARNING", "logger": "pdserve.cluster.link",
     "message": "the router is silent", "request": "b2c1…", "pid": 4711}

``request`` is the ``x-request-id`` under which the client's call came, in whatever is logged while
the gateway works on it.

In a storm of the same lines few are said (``storms``).
"""

import contextvars
import json
import logging
import os
import sys
from datetime import UTC, datetime

from pdserve.errors import ConfigError
from pdserve.storms import StormFilter, told_of

FORMAT, LEVEL = "PDSERVE_LOG_FORMAT", "PDSERVE_LOG_LEVEL"
FORMATS = ("text", "json")
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")

MESSAGE_CHARACTERS_MAX = 8_192

request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="")
"""Of the client's call that is worked on here."""


class _Formatter(logging.Formatter):
    """What both formats have: a bounded message, and what a storm has swallowed."""

    def message_of(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        if record.exc_info:
            message += "\n" + self.formatException(record.exc_info)
        message += told_of(record)
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
