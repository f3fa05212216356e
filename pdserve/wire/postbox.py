"""One-way traffic to any number of peers: post and forget.

Each peer has an outbox: messages in order, sent in batches, kept until the peer's receipt comes. A
broken connection is opened again and what has no receipt is sent again; the listener on the other
side knows this postbox by its number and drops what it has received already. So every message
arrives once and in order, as long as the peer process lives; when nothing gets through for
``grace_s``, ``on_undelivered`` is given what is left.

A slow peer fills its own outbox, by letters or by bytes, and then makes ``post`` refuse; it delays
nobody else.
"""

import asyncio
import itertools
import secrets
import ssl
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from pdserve.errors import CapacityError, WireError
from pdserve.ids import HostId
from pdserve.messages import Address
from pdserve.wire.codec import MESSAGES, Codec
from pdserve.wire.connection import Connection
from pdserve.wire.endpoint import dial
from pdserve.wire.outbox import OUTBOX_BYTES_MAX, OUTBOX_MAX

BATCH_MAX = 256
"""Messages in one write, …"""

BATCH_BYTES_MAX = 256 << 10
"""… which ends with the message that passes so many bytes."""

BACKOFF_S = 0.01
BACKOFF_S_MAX = 0.5

Undelivered = Callable[[Address, list[object]], None]


@dataclass(frozen=True, slots=True)
class _Letter:
    sequence: int
    message: object
    data: bytes


class Postbox:
    """Post to any address. Used from one event loop."""

    def __init__(
        self,
        *,
        host: HostId,
        codec: Codec = MESSAGES,
        outbox_max: int = OUTBOX_MAX,
        outbox_bytes_max: int = OUTBOX_BYTES_MAX,
        grace_s: float = 10.0,
        on_undelivered: Undelivered | None = None,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self._host = host
        self._codec = codec
        self._outbox_max = outbox_max
        self._outbox_bytes_max = outbox_bytes_max
        self._grace_s = grace_s
        self._on_undelivered = on_undelivered
        self._ssl_context = ssl_context
        self._outboxes: dict[Address, _Outbox] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def post(self, address: Address, message: object) -> None:
        """Put a message into the outbox of ``address``. Never blocks.

        Raises:
            CapacityError: too many messages or bytes wait there already; this one was not taken.
            MessageTooLarge: no frame can carry it.
        """
        data = self._codec.encode(message)
        outbox = self._outboxes.get(address)
        if outbox is None:
            outbox = self._outboxes[address] = _Outbox(address)
            task = asyncio.get_running_loop().create_task(self._deliver(outbox))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        count, size = len(outbox.letters), outbox.byte_count
        if count >= self._outbox_max or (count and size + len(data) > self._outbox_bytes_max):
            raise CapacityError(
                f"{count} messages of {size} bytes wait for {address.unix_path or address.tcp} "
                f"already, at most {self._outbox_max} of {self._outbox_bytes_max} may",
                retry_after_ms=50,
            )
        outbox.put(message, data)

    async def flush(self) -> None:
        """Wait until each outbox has been empty once: all has arrived, or was given up."""
        for outbox in list(self._outboxes.values()):
            await outbox.empty.wait()

    async def close(self) -> None:
        """End at once; what has not arrived is dropped. ``flush`` first to wait for it."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for outbox in self._outboxes.values():
            outbox.empty.set()
        self._outboxes.clear()

    async def _deliver(self, outbox: "_Outbox") -> None:
        """One outbox's life: until it is empty and disconnected, or has been given up."""
        backoff_s = BACKOFF_S
        while outbox.letters:
            progress = outbox.receipt_count
            try:
                await self._deliver_over_one_connection(outbox)
            except WireError:
                if outbox.receipt_count > progress:
                    backoff_s = BACKOFF_S
                if time.monotonic() - outbox.stuck_since_s > self._grace_s:
                    break
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, BACKOFF_S_MAX)
        del self._outboxes[outbox.address]
        undelivered = [letter.message for letter in outbox.letters]
        outbox.letters.clear()
        outbox.empty.set()
        if undelivered and self._on_undelivered is not None:
            self._on_undelivered(outbox.address, undelivered)

    async def _deliver_over_one_connection(self, outbox: "_Outbox") -> None:
        """Ends with a WireError, whatever happens; at the latest when the peer goes."""
        connection = Connection(
            self._codec, on_receipt=outbox.take_receipt, on_end=outbox.changed.set
        )
        remaining_s = outbox.stuck_since_s + self._grace_s - time.monotonic()
        await dial(
            lambda: connection,
            outbox.address,
            host=self._host,
            timeout_s=max(remaining_s, BACKOFF_S_MAX),
            ssl_context=self._ssl_context,
        )
        connection.raise_if_ended()
        try:
            await connection.introduce(outbox.poster)
            outbox.sent_count = 0
            while True:
                batch = outbox.unsent()
                if batch:
                    outbox.sent_count += len(batch)
                    await connection.post([(letter.sequence, letter.data) for letter in batch])
                else:
                    outbox.changed.clear()
                    await outbox.changed.wait()
                    connection.raise_if_ended()
        finally:
            await connection.close()


class _Outbox:
    """What waits for one peer, oldest first; the first ``sent_count`` letters are on their way."""

    def __init__(self, address: Address) -> None:
        self.address = address
        # A number of its own per outbox: an outbox that was given up leaves a gap in no sequence.
        self.poster = secrets.randbits(63)
        self.letters: deque[_Letter] = deque()
        self.byte_count = 0  # of them
        self.sent_count = 0
        self.receipt_count = 0
        self.stuck_since_s = time.monotonic()  # nothing has got through since then
        self.changed = asyncio.Event()
        self.empty = asyncio.Event()
        self._sequences = itertools.count(1)

    def put(self, message: object, data: bytes) -> None:
        if not self.letters:
            self.stuck_since_s = time.monotonic()
        self.letters.append(_Letter(next(self._sequences), message, data))
        self.byte_count += len(data)
        self.empty.clear()
        self.changed.set()

    def unsent(self) -> list[_Letter]:
        """What goes into the next write."""
        batch: list[_Letter] = []
        batch_bytes = 0
        stop = self.sent_count + BATCH_MAX
        for letter in itertools.islice(self.letters, self.sent_count, stop):
            batch.append(letter)
            batch_bytes += len(letter.data)
            if batch_bytes >= BATCH_BYTES_MAX:
                break
        return batch

    def take_receipt(self, sequence: int) -> None:
        """Everything up to ``sequence`` has arrived."""
        while self.letters and self.letters[0].sequence <= sequence:
            self.byte_count -= len(self.letters.popleft().data)
            self.sent_count = max(0, self.sent_count - 1)
            self.receipt_count += 1
            self.stuck_since_s = time.monotonic()
        if not self.letters:
            self.empty.set()
