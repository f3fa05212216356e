"""Batches at work: a gateway takes one, answers its lines a few at a time, and writes its files.

    open batches ──claim──► read, check ──► lines, ``lines_at_once`` side by side ──► files, its end
                   ▲                          │ each answer is kept as soon as it is there
                   └── lease lapses: its gateway died, another goes on with what has no answer

A line may be computed twice, at a gateway that was taken for dead and at the next one. It is
answered once: the first answer to its number is the one that is kept. All lines are of the lowest
service class, and few at a time, so the router runs them in what others leave.
"""

import asyncio
import json
import logging
import os
import secrets
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from pdserve.clock import unix_ms
from pdserve.cluster.http.batches.asking import Endpoints, Reply, refusal, reply_of
from pdserve.cluster.http.batches.files import Files
from pdserve.cluster.http.batches.lines import (
    CANCELLED_CODE,
    EXPIRED_CODE,
    Line,
    Problem,
    answered,
    given_up,
    is_good,
    lines_of,
    written,
)
from pdserve.cluster.http.batches.states import (
    OVER,
    BatchState,
    Record,
    decoded,
    ending,
    refused,
)
from pdserve.cluster.http.metrics import FrontMetrics
from pdserve.config import GatewayConfig
from pdserve.errors import CapacityError, IllegalTransition, PdserveError, StoreUnavailable
from pdserve.kvstore.documents import Documents

log = logging.getLogger(__name__)

LEASE_S = 15.0
"""A gateway that has not renewed for so long is taken for dead."""

BEAT_S = 1.0
"""How often it renews, tells how far it is, and looks whether the batch was cancelled."""

POLL_S = 2.0
"""How often it looks for batches that nobody works on."""

BACK_OFF_MS_MIN, BACK_OFF_MS_MAX = 250, 10_000
"""Until a line that was refused for want of capacity is asked again."""

SWAPS_MAX = 50
"""How often a record that others change too is written before it is given up."""

OPEN = "open"
"""The group of batches that are not over; those of tenants have a colon in their names."""

Change = Callable[[Record], Record]


class Batches:
    """Of one gateway; on its event loop."""

    def __init__(
        self,
        documents: Documents,
        files: Files,
        endpoints: Endpoints,
        metrics: FrontMetrics,
        config: GatewayConfig,
    ) -> None:
        self.documents = documents
        self.files = files
        self.endpoints = endpoints
        self.metrics = metrics
        self.config = config.batches
        self._who = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(12)}"
        self._working: dict[str, asyncio.Task[None]] = {}
        self._watching: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._is_closed = False

    def start(self) -> None:
        """Begins to look for work. Idempotent; what has begun is told that there may be more."""
        self._wake.set()
        if self._watching is None and not self._is_closed:
            self._watching = asyncio.create_task(self._watch())

    async def close(self) -> None:
        """Lets everything go, for another gateway to take at once."""
        self._is_closed = True
        tasks = [*self._working.values(), *([self._watching] if self._watching else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def record(self, name: str) -> Record | None:
        data = await self.documents.state(name)
        return None if data is None else decoded(data)

    async def update(self, name: str, change: Change) -> Record | None:
        """The record as ``change`` made it of the one that is there; None: there is none.

        Raises:
            IllegalTransition: from ``change``.
            StoreUnavailable: also where others changed it all the while.
        """
        for _ in range(SWAPS_MAX):
            data = await self.documents.state(name)
            if data is None:
                return None
            record = change(decoded(data))
            if await self.documents.swap(name, data, record.encoded()):
                return record
        raise StoreUnavailable(f"the record of {name} changes faster than it can be written")

    # ── who works on what ────────────────────────────────────────────────────────────────────────

    async def _watch(self) -> None:
        while True:
            self._wake.clear()
            try:
                for name in await self.documents.names(OPEN):
                    if len(self._working) >= self.config.at_once:
                        break
                    if name not in self._working and await self._claim(name):
                        work = asyncio.create_task(self._hold(name))
                        self._working[name] = work
            except PdserveError as error:
                log.warning("no batches can be looked for: %s", error)
            except Exception:
                log.exception("looking for batches was ended by a bug, and begins anew")
            with suppress(TimeoutError):
                async with asyncio.timeout(POLL_S):
                    await self._wake.wait()

    async def _claim(self, name: str) -> bool:
        return await self.documents.claim(name, self._who, LEASE_S)

    async def _hold(self, name: str) -> None:
        """Works on a batch for as long as its lease is ours."""
        working_on = _Work(self, name)
        work = asyncio.create_task(working_on.run())
        try:
            while not work.done():
                await asyncio.wait([work], timeout=BEAT_S)
                if not work.done() and not await self._claim(name):
                    log.warning("another gateway has taken %s", name)
                    return
            await work
        except PdserveError as error:
            log.warning("the work on %s stops for now: %s", name, error)
            await asyncio.sleep(POLL_S)  # what fails now would fail again at once
        except Exception:
            log.exception("the work on %s was ended by a bug", name)
            with suppress(PdserveError):
                await working_on.fail(Problem("server_error", "An error inside the server"))
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
            with suppress(PdserveError):
                await self.documents.release(name, self._who)
            self._working.pop(name, None)
            self._wake.set()


class _Work:
    """One batch at this gateway, from wherever it stands to its end."""

    def __init__(self, batches: Batches, name: str) -> None:
        self._batches = batches
        self._documents = batches.documents
        self._name = name
        self._completed = self._failed = 0

    async def run(self) -> None:
        record = await self._batches.record(self._name)
        if record is None or record.is_over:
            await self._documents.leave(self._name, OPEN)
            return
        lines = await self._lines(record)
        if lines is None:
            return
        try:
            if record.state in (BatchState.VALIDATING, BatchState.IN_PROGRESS):
                record = await self._begin(len(lines))
                if record.state is BatchState.IN_PROGRESS:
                    await self._answer_all(record, lines)
            await self._end(lines)
        except CapacityError as error:
            await self.fail(Problem("no_room", f"The answers cannot be kept: {error}"))

    async def fail(self, *problems: Problem) -> None:
        """Ends it as one that cannot be done."""

        def change(record: Record) -> Record:
            return record if record.is_over else refused(record, problems, unix_ms() // 1000)

        await self._batches.update(self._name, change)
        await self._documents.leave(self._name, OPEN)

    async def _lines(self, record: Record) -> list[Line] | None:
        """What is asked; None: it is no batch, and has been told so."""
        file = record.batch["input_file_id"]
        data = await self._documents.content(file)
        if data is None:
            problems = [Problem("file_not_found", f"The file {file} is not there any more")]
            lines: list[Line] = []
        else:
            lines, problems = await asyncio.to_thread(
                lines_of,
                data,
                endpoint=record.batch["endpoint"],
                lines_max=self._batches.config.lines_max,
            )
        if not problems:
            return lines
        await self.fail(*problems)
        return None

    async def _begin(self, count: int) -> Record:
        def change(record: Record) -> Record:
            if record.state is BatchState.VALIDATING:
                record = record.moved(BatchState.IN_PROGRESS, unix_ms() // 1000)
            return record.counted(self._completed, self._failed, count)

        record = await self._batches.update(self._name, change)
        if record is None:
            raise StoreUnavailable(f"{self._name} was removed while it was worked on")
        return record

    # ── lines ────────────────────────────────────────────────────────────────────────────────────

    async def _answer_all(self, record: Record, lines: Sequence[Line]) -> None:
        """Until all are answered, the window closes, or somebody cancels."""
        known = await self._documents.answers(self._name)
        for data in known.values():
            self._count(data)
        waiting = iter([number for number in range(len(lines)) if number not in known])

        async def answer_next() -> None:
            for number in waiting:
                data = await self._answer(record, lines[number])
                if await self._documents.answer(self._name, number, data):
                    self._count(data)

        workers = [
            asyncio.create_task(answer_next()) for _ in range(self._batches.config.lines_at_once)
        ]
        telling = asyncio.create_task(self._tell_progress(len(lines)))
        working: asyncio.Future[Any] = asyncio.gather(*workers)
        either: list[asyncio.Future[Any]] = [working, telling]
        try:
            left_s = record.batch["expires_at"] - unix_ms() / 1000
            await asyncio.wait(
                either, timeout=max(0.0, left_s), return_when=asyncio.FIRST_COMPLETED
            )
            if working.done():
                await working
        finally:
            for task in (*workers, telling):
                task.cancel()
            await asyncio.gather(*workers, telling, working, return_exceptions=True)

    async def _tell_progress(self, count: int) -> None:
        """Until it is cancelled by a client."""
        while True:
            await asyncio.sleep(BEAT_S)
            with suppress(StoreUnavailable):
                record = await self._batches.update(
                    self._name, lambda each: each.counted(self._completed, self._failed, count)
                )
                if record is None or record.state is not BatchState.IN_PROGRESS:
                    return

    def _count(self, data: bytes) -> None:
        if is_good(json.loads(data)):
            self._completed += 1
        else:
            self._failed += 1

    async def _answer(self, record: Record, line: Line) -> bytes:
        back_off_ms = BACK_OFF_MS_MIN
        while True:
            reply = await self._reply(record, line)
            if not reply.is_refusal:
                return answered(line, _request_id(), reply.status, reply.body)
            wait_ms = min(max(back_off_ms, reply.retry_after_ms), BACK_OFF_MS_MAX)
            await asyncio.sleep(wait_ms / 1000)
            back_off_ms = min(2 * back_off_ms, BACK_OFF_MS_MAX)

    async def _reply(self, record: Record, line: Line) -> Reply:
        ledger = self._batches.metrics.ledger
        if ledger is not None and record.owner:
            try:
                ledger.check(record.owner, unix_ms())
            except PdserveError as error:
                return refusal(error)
        left_ms = record.batch["expires_at"] * 1000 - unix_ms()
        return await reply_of(
            self._batches.endpoints,
            record.batch["endpoint"],
            line.body,
            owner=record.owner,
            left_ms=left_ms,
        )

    # ── its end ──────────────────────────────────────────────────────────────────────────────────

    async def _end(self, lines: Sequence[Line]) -> None:
        def finalise(record: Record) -> Record:
            if record.state is BatchState.IN_PROGRESS:
                return record.moved(BatchState.FINALIZING, unix_ms() // 1000)
            return record

        record = await self._batches.update(self._name, finalise)
        if record is None:
            return
        await self._give_up(record, lines)
        answers = await self._documents.answers(self._name)
        told = await asyncio.to_thread(written, lines, answers)
        names = [
            await self._batches.files.write(record, kind, data)
            for kind, data in (("output", told.output), ("error", told.errors))
        ]

        def end(record: Record) -> Record:
            if record.state in OVER:
                return record
            state = ending(record, all_answered=not told.has_expired)
            counted = record.counted(told.completed, told.failed, len(lines))
            files = {"output_file_id": names[0], "error_file_id": names[1]}
            return counted.moved(state, unix_ms() // 1000, usage=told.usage, **files)

        await self._batches.update(self._name, end)
        await self._documents.leave(self._name, OPEN)

    async def _give_up(self, record: Record, lines: Sequence[Line]) -> None:
        """Lines that nobody will answer any more say so."""
        known = await self._documents.answers(self._name)
        code, why = (
            (CANCELLED_CODE, "The batch was cancelled before this request was answered")
            if record.state is BatchState.CANCELLING
            else (EXPIRED_CODE, "The batch's window closed before this request was answered")
        )
        for number, line in enumerate(lines):
            if number not in known:
                data = given_up(line, _request_id(), code, why)
                await self._documents.answer(self._name, number, data)


def _request_id() -> str:
    return f"batch_req_{secrets.token_hex(12)}"


def cancelled(record: Record, now_s: int) -> Record:
    """Asked to end; one that is over, or ends already, stays as it is.

    Raises:
        IllegalTransition: it is over.
    """
    if record.state in (BatchState.CANCELLING, BatchState.FINALIZING):
        return record
    if record.is_over:
        raise IllegalTransition(f"{record.name} is {record.state}")
    return record.moved(BatchState.CANCELLING, now_s)
