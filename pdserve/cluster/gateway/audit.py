"""Who did what at a gateway: actions of administrators, changes of keys, refusals of access.

A line of JSON each, to the logger ``pdserve.audit`` or, where ``gateway.access.audit_log`` names
one, to a file. Prompts, answers and keys are never in it; a key is told by its name.

    {"at": "2026-03-01T09:30:00.125Z", "event": "action", "key": "ops", "tenant": "ops",
     "client": "10.0.0.7", "method": "POST", "path": "/cluster/role", "status": 200,
     "worker": "decode-8f3a2c", "role": "none"}

=========  ========================================================  ===============================
event      what happened                                             how often it is told
=========  ========================================================  ===============================
action     somebody with an admin's rights changed the cluster       every time, with its outcome
look       an admin's key was used to look                           once a minute and key
refusal    no key, an unknown one, or one that does not reach far    once a second, and how many
keys       the file of keys was read again, or could not be          every time
=========  ========================================================  ===============================

The file is bounded: when it is full it becomes ``FILE.1``, that ``FILE.2``, and so on up to
``files_max``; the oldest goes. Gateways of one host may share a file: a line is one write to its
end, and who turns it over holds a lock. One that cannot be written to is said once in the log, and
the lines go there: an unwritable disk must neither stop the gateway nor swallow what happened.
"""

import fcntl
import json
import logging
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from pdserve.clock import Clock, S, monotonic, unix_ms
from pdserve.errors import ConfigError

log = logging.getLogger("pdserve.audit")

LOOK_S = 60.0
REFUSAL_S = 1.0

VALUE_CHARACTERS_MAX = 256
"""Of any text in a line; clients choose some of them."""

LOOKERS_MAX = 10_000
"""Keys whose last look is remembered; with more, the first are told again too soon."""

Value = str | int | list[str] | None


class Audit:
    """One per gateway, for one event loop."""

    def __init__(
        self,
        write: Callable[[str], None] | None = None,
        *,
        clock: Clock = monotonic,
        wall_ms: Callable[[], int] = unix_ms,
    ) -> None:
        """``write``: takes a line without its end; None: the logger does."""
        self._write = write
        self._clock = clock
        self._wall_ms = wall_ms
        self._looked_ns: dict[str, int] = {}
        self._refused_ns = clock() - round(REFUSAL_S * S)
        self._refused_count = 0

    def action(self, *, key: str | None, status: int, **fields: Value) -> None:
        """``key``: its name; None where the gateway asks for none."""
        self._tell("action", logging.INFO, key=key, **fields, status=status)

    def look(self, *, key: str, **fields: Value) -> None:
        now_ns = self._clock()
        last_ns = self._looked_ns.get(key)
        if last_ns is not None and now_ns - last_ns < LOOK_S * S:
            return
        if len(self._looked_ns) >= LOOKERS_MAX:
            self._looked_ns.clear()
        self._looked_ns[key] = now_ns
        self._tell("look", logging.INFO, key=key, **fields)

    def refusal(self, *, why: str, **fields: Value) -> None:
        """The first of a second stands for those after it, which the next one counts."""
        self._refused_count += 1
        now_ns = self._clock()
        if now_ns - self._refused_ns < REFUSAL_S * S:
            return
        self._tell("refusal", logging.WARNING, why=why, **fields, count=self._refused_count)
        self._refused_ns, self._refused_count = now_ns, 0

    def keys(self, **fields: Value) -> None:
        self._tell("keys", logging.INFO, **fields)

    def _tell(self, event: str, level: int, **fields: Value) -> None:
        at = datetime.fromtimestamp(self._wall_ms() / 1000, UTC)
        shown = {
            name: value[:VALUE_CHARACTERS_MAX] if isinstance(value, str) else value
            for name, value in fields.items()
            if value is not None or name == "key"
        }
        stamp = at.isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = json.dumps({"at": stamp, "event": event, **shown})  # ASCII: no line ends within
        if self._write is None:
            log.log(level, "%s", line)
        else:
            self._write(line)


class AuditFile:
    """A bounded file of lines, which several processes may share."""

    def __init__(self, path: Path, *, bytes_max: int, files_max: int) -> None:
        """
        Args:
            bytes_max: of each file, but for the line that fills it.
            files_max: the current one and those before it.

        Raises:
            ConfigError: it cannot be opened.
        """
        self._path = path
        self._bytes_max = bytes_max
        self._files_max = files_max
        self._complained = False
        try:
            os.close(self._open())
        except OSError as error:
            raise ConfigError(
                f"gateway.access.audit_log is {path}, which cannot be written: {error.strerror}"
            ) from error

    def write(self, line: str) -> None:
        try:
            self._append(line.encode() + b"\n")
            self._complained = False
        except OSError as error:
            if not self._complained:
                log.warning("%s cannot be written: %s; its lines come here", self._path, error)
                self._complained = True
            log.warning("%s", line)

    def _append(self, data: bytes) -> None:
        # Opened for each line: another process may have turned the file over.
        file = self._open()
        try:
            if os.fstat(file).st_size < self._bytes_max:
                os.write(file, data)
                return
        finally:
            os.close(file)
        self._turn_over()
        file = self._open()
        try:
            os.write(file, data)
        finally:
            os.close(file)

    def _turn_over(self) -> None:
        lock = os.open(self._name("lock"), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self._path.stat().st_size < self._bytes_max:
                return  # somebody else was first
            for number in range(self._files_max - 1, 0, -1):
                older = self._name(str(number))
                newer = self._path if number == 1 else self._name(str(number - 1))
                if newer.exists():
                    newer.replace(older)
            if self._files_max == 1:
                self._path.unlink()
        finally:
            os.close(lock)

    def _open(self) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        return os.open(self._path, flags, 0o600)

    def _name(self, suffix: str) -> Path:
        return self._path.with_name(f"{self._path.name}.{suffix}")
