"""What waits for a connection: in order, bounded by number and by bytes, whatever is put in."""

import asyncio

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pdserve.errors import ErrorInfo, MessageTooLarge, QueueFull
from pdserve.wire.codec import MESSAGES
from pdserve.wire.frame import MESSAGE_BYTES_MAX
from pdserve.wire.outbox import Outbox

COUNT_MAX, BYTES_MAX = 4, 300


def of_size(text: str) -> ErrorInfo:
    return ErrorInfo("wire", text)


def put(outbox: Outbox, message: object) -> None:
    outbox.put(message, peer="a peer", retry_after_ms=7)


class FilledAndEmptied(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.outbox = Outbox(count_max=COUNT_MAX, bytes_max=BYTES_MAX)
        self.waiting: list[bytes] = []

    @rule(characters=st.integers(0, 2 * BYTES_MAX))
    def put(self, characters: int) -> None:
        message = of_size("x" * characters)
        data = MESSAGES.encode(message)
        fits = sum(map(len, self.waiting)) + len(data) <= BYTES_MAX
        if len(self.waiting) < COUNT_MAX and (fits or not self.waiting):
            put(self.outbox, message)
            self.waiting.append(data)
        else:
            with pytest.raises(QueueFull, match="a peer") as caught:
                put(self.outbox, message)
            assert caught.value.retry_after_ms == 7

    @rule()
    def take(self) -> None:
        taking = self.outbox.take()
        if not self.waiting:
            taking.close()
            return
        with pytest.raises(StopIteration) as taken:
            taking.send(None)
        assert taken.value.value == self.waiting.pop(0)

    @invariant()
    def agrees(self) -> None:
        assert len(self.outbox) == len(self.waiting)
        assert self.outbox.byte_count == sum(map(len, self.waiting))


TestFilledAndEmptied = FilledAndEmptied.TestCase


def test_what_no_frame_can_carry_is_its_senders_error_and_leaves_no_trace() -> None:
    outbox = Outbox()
    put(outbox, of_size("before"))
    with pytest.raises(MessageTooLarge, match=f"limit is {MESSAGE_BYTES_MAX}"):
        put(outbox, of_size("x" * MESSAGE_BYTES_MAX))
    assert (len(outbox), outbox.byte_count) == (1, len(MESSAGES.encode(of_size("before"))))


def test_who_waits_gets_what_comes() -> None:
    async def run() -> bytes:
        outbox = Outbox()
        taking = asyncio.create_task(outbox.take())
        await asyncio.sleep(0)
        put(outbox, of_size("late"))
        return await taking

    assert asyncio.run(run()) == MESSAGES.encode(of_size("late"))
