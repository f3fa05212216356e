"""Responses that are kept, and those that come to be in the background.

A record is written when a response begins in the background, and when it ends. What happens in
between goes into its journal event by event, from a task beside the one that generates: a slow
place to keep things slows nobody down. So whoever follows a response, here or at another gateway,
from the start or from ``starting_after``, reads the same events with the same numbers.

    created ──► queued ──► in_progress ──► completed | incomplete | failed | cancelled
                                └── its gateway falls silent: told as failed, by whoever reads it
"""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from pdserve.clock import MS, S, unix_ms
from pdserve.cluster.gateway.gathering import batches
from pdserve.cluster.gateway.models import Models
from pdserve.cluster.gateway.parameters import shown
from pdserve.cluster.http.errors import error_status
from pdserve.cluster.http.metrics import FrontMetrics
from pdserve.cluster.http.responses.asking import ResponseAsked
from pdserve.cluster.http.responses.items import messages_of
from pdserve.cluster.http.responses.telling import (
    COMPLETED,
    FAILED,
    INCOMPLETE,
    TERMINAL,
    Event,
    Teller,
)
from pdserve.config import GatewayConfig
from pdserve.errors import PdserveError, QueueFull, UnknownRequest, UnusableValue
from pdserve.kvstore.journals import Found, Journals, MemoryJournals, RedisJournals

log = logging.getLogger(__name__)

ALIVE_S = 15.0
"""A gateway that has not said for so long that it works on a response is taken for dead."""

BEAT_S = 0.5
"""How often it says so, and how long it may take to see that a response was cancelled elsewhere."""

POLL_S = 0.05
"""How often a response of another gateway is looked at while somebody follows it."""

LINES_MAX = 512
"""Events that are written to a journal, or read from it, at once."""

KEEP_TRIES_MAX = 10
"""How often the end of a response is written before it is given up, ``BEAT_S`` apart."""

CANCEL_WAIT_S = 5.0
"""How long whoever cancels a response waits for its end."""

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


@dataclass(slots=True)
class Record:
    """What is kept of a response."""

    owner: str  # the tenant; empty where there are no keys
    response: dict[str, Any]
    items: Sequence[Mapping[str, Any]]  # of its input
    messages: Sequence[Mapping[str, Any]]  # what the next response goes on from

    def encoded(self) -> bytes:
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return _encode(fields).encode()

    @property
    def is_over(self) -> bool:
        return self.response["status"] in TERMINAL


@dataclass(slots=True)
class _Run:
    """A response in the background. Its lines are bounded by the tokens it may generate."""

    record: Record
    teller: Teller
    asked: ResponseAsked
    lines: list[bytes] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    is_over: bool = False
    work: "asyncio.Task[None] | None" = None
    keeping: "asyncio.Task[None] | None" = None

    def add(self, events: Sequence[Event]) -> None:
        self.lines += [_encode(event).encode() for event in events]
        self.wake()

    def wake(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()


class Responses:
    """Of one gateway; on its event loop."""

    def __init__(
        self, models: Models, metrics: FrontMetrics, journals: Journals, *, running_max: int
    ) -> None:
        self._models = models
        self._metrics = metrics
        self._journals = journals
        self._running_max = running_max
        self._runs: dict[str, _Run] = {}

    async def close(self) -> None:
        """Ends what runs in the background; it is told as cancelled."""
        runs = list(self._runs.values())
        for run in runs:
            _stop(run)
        await asyncio.gather(*(run.keeping for run in runs if run.keeping), return_exceptions=True)
        await self._journals.close()

    # ── records ──────────────────────────────────────────────────────────────────────────────────

    async def found(self, response: str, owner: str) -> Record:
        """The record as it is now.

        Raises:
            UnknownRequest: there is none, or it is another tenant's, which looks the same.
            StoreUnavailable
        """
        record = await self._record(response)
        if record is None or record.owner != owner:
            error = UnknownRequest(f"Response with id {shown(response)} not found")
            error.field = "response_id"
            raise error
        return record

    async def before(self, response: str | None, owner: str) -> Sequence[Mapping[str, Any]]:
        """The messages that a response goes on from which names ``response`` as its previous one.

        Raises:
            UnusableValue, StoreUnavailable
        """
        if response is None:
            return ()
        try:
            record = await self.found(response, owner)
        except UnknownRequest:
            raise UnusableValue(
                "previous_response_id", f"is {shown(response)}, which is not found"
            ) from None
        if record.response["status"] not in (COMPLETED, INCOMPLETE):
            raise UnusableValue(
                "previous_response_id",
                f"names a response that is {record.response['status']}; only a completed or "
                "incomplete one can be gone on from",
            )
        return record.messages

    async def keep(self, record: Record) -> None:
        """Keeps a response that has ended. Where it cannot be kept it says so itself: the answer is
        there, and a place to keep it is not worth losing it."""
        try:
            await self._journals.make(record.response["id"], record.encoded())
        except PdserveError as error:
            record.response["store"] = False
            log.warning("%s is not kept: %s", record.response["id"], error)

    async def remove(self, response: str, owner: str) -> None:
        """
        Raises:
            UnknownRequest, StoreUnavailable
        """
        await self.found(response, owner)
        await self._journals.remove(response)
        if response in self._runs:
            _stop(self._runs[response])

    async def cancelled(self, response: str, owner: str) -> Record:
        """The record once it was asked to end, which it does shortly.

        Raises:
            UnknownRequest, StoreUnavailable
            UnusableValue: it is none of the background.
        """
        record = await self.found(response, owner)
        if not record.response["background"]:
            raise UnusableValue(
                "response_id", "is of a response that was not made in the background"
            )
        if record.is_over:
            return record
        if response in self._runs:
            _stop(self._runs[response])
        else:
            await self._journals.ask_end(response)
        try:
            async with asyncio.timeout(CANCEL_WAIT_S):
                while not record.is_over:
                    await asyncio.sleep(POLL_S)
                    record = await self.found(response, owner)
        except TimeoutError:
            pass  # it says itself that it is not over
        return record

    async def _record(self, response: str) -> Record | None:
        found = await self._journals.find(response)
        if found is None:
            return None
        run = self._runs.get(response)
        return _told(found) if run is None else run.record

    # ── in the background ────────────────────────────────────────────────────────────────────────

    async def start(self, record: Record, teller: Teller, asked: ResponseAsked) -> None:
        """Begins a response whose client need not stay.

        Raises:
            QueueFull, CapacityError, StoreUnavailable
        """
        if len(self._runs) >= self._running_max:
            raise QueueFull(
                f"this gateway has {len(self._runs)} responses in the background, at most "
                f"{self._running_max} are allowed",
                retry_after_ms=1000,
            )
        response = record.response["id"]
        run = self._runs[response] = _Run(record, teller, asked)
        try:
            await self._journals.make(response, record.encoded(), alive_s=ALIVE_S)
        except BaseException:
            del self._runs[response]
            raise
        run.work = asyncio.create_task(self._generate(run))
        run.keeping = asyncio.create_task(self._keep_events(run))

    async def follow(self, response: str, start: int) -> AsyncIterator[list[bytes]]:
        """The events from number ``start`` on, as they come; ends with the response.

        Raises:
            StoreUnavailable
        """
        while (run := self._runs.get(response)) is not None:
            changed, lines, is_over = run.changed, run.lines[start:], run.is_over
            if lines:
                start += len(lines)
                yield lines
            elif is_over:
                return
            else:
                await changed.wait()
        while True:
            record = await self._record(response)  # before its lines, which are written first
            lines = await self._journals.lines(response, start, LINES_MAX)
            if lines:
                start += len(lines)
                yield lines
            elif record is None:
                return
            elif record.is_over:
                if record.response["error"] == _SILENT:
                    yield [_failed(record, start)]
                return
            else:
                await asyncio.sleep(POLL_S)

    async def _generate(self, run: _Run) -> None:
        with self._metrics.follow("http", "responses") as meter:
            asked = run.asked.asked
            meter.calls = asked.calls
            run.add(run.teller.begin())
            try:
                session = self._models.of(asked.model)
                async with aclosing(batches(session, asked.calls)) as gathered:
                    async for batch in gathered:
                        meter.note(batch)
                        for _, piece in batch:
                            run.add(run.teller.tell(piece, now_s=unix_s()))
                meter.status = "200"
            except PdserveError as error:
                meter.status = str(error_status(error))
                run.add(run.teller.fail(error))
            except asyncio.CancelledError:
                meter.status = "cancelled"
                run.add(run.teller.cancel())
                raise
            except Exception:
                log.exception("%s ended by a bug", run.record.response["id"])
                run.add(run.teller.fail(PdserveError("an error inside the server")))
            finally:
                run.record.messages = after(run.asked, run.record.response)
                run.is_over = True
                run.wake()

    async def _keep_events(self, run: _Run) -> None:
        response = run.record.response["id"]
        sent, failed = 0, 0
        try:
            while failed < KEEP_TRIES_MAX:
                changed, lines = run.changed, run.lines[sent : sent + LINES_MAX]
                was_over = run.is_over
                try:
                    if await self._journals.append(response, lines, alive_s=ALIVE_S):
                        _stop(run)
                    sent += len(lines)
                    if was_over and sent == len(run.lines):
                        await self._journals.write(response, run.record.encoded())
                        return
                    failed = 0
                except PdserveError as error:
                    failed += was_over  # while it runs, the place may come back
                    log.warning("the events of %s are not kept: %s", response, error)
                    await asyncio.sleep(BEAT_S)
                    continue
                if sent == len(run.lines):
                    try:
                        async with asyncio.timeout(BEAT_S):
                            await changed.wait()
                    except TimeoutError:
                        pass  # time to say that we are alive
        finally:
            _stop(run)
            self._runs.pop(response, None)


_SILENT = {
    "code": "server_error",
    "message": "the gateway that worked on this response is gone; send the request again",
}


def journals_of(config: GatewayConfig) -> Journals:
    """Where this gateway keeps its responses.

    Raises:
        ConfigError
    """
    bytes_max, keep_s = config.responses_bytes_max, config.responses_keep_s
    if config.responses_redis is not None:
        return RedisJournals(config.responses_redis, bytes_max=bytes_max, keep_s=keep_s)
    return MemoryJournals(count_max=config.responses_max, bytes_max=bytes_max, keep_s=keep_s)


def after(asked: ResponseAsked, response: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The messages with the answer."""
    return [*asked.messages, *messages_of(response["output"])]


def unix_s() -> int:
    return unix_ms() * MS // S


def _told(found: Found) -> Record:
    """The record; as failed where nobody is left to end it."""
    record = Record(**json.loads(found.state))
    if not record.is_over and not found.is_alive:
        record.response |= {"status": FAILED, "error": _SILENT}
    return record


def _failed(record: Record, number: int) -> bytes:
    """The event that its gateway did not live to tell."""
    event = {
        "type": "response.failed",
        "sequence_number": number,
        "response": record.response,
    }
    return _encode(event).encode()


def _stop(run: _Run) -> None:
    if run.work is not None:
        run.work.cancel()
