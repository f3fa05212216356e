"""How many calls of the kernel an answer takes, on the side that waits for it in a thread."""

import socket
from collections.abc import Iterator

import pytest

from pdserve.ids import RequestId
from pdserve.messages import Cancel
from pdserve.wire.blocking import BlockingConnection, Wait
from pdserve.wire.codec import MESSAGES
from pdserve.wire.frame import Kind, pack_head

BLOCK = bytes(range(256)) * 64  # 16 KiB
ANSWER = Cancel(RequestId("r"))
PATIENCE_S = 60.0


class Counting(socket.socket):
    received = 0

    def recv_into(self, *arguments: object) -> int:
        self.received += 1
        return super().recv_into(*arguments)  # type: ignore[arg-type]


@pytest.fixture
def ends() -> Iterator[tuple[Counting, socket.socket]]:
    near, far = socket.socketpair()
    with Counting(fileno=near.detach()) as counting, far:
        yield counting, far


def test_each_small_block_comes_with_one_call(ends: tuple[Counting, socket.socket]) -> None:
    """Also where the ones before have used up most of the buffer that is read ahead into."""
    near, far = ends
    connection = BlockingConnection(near, MESSAGES)
    message = MESSAGES.encode(ANSWER)
    wait = Wait.of(PATIENCE_S)
    out = memoryview(bytearray(len(BLOCK)))
    for count in range(1, 9):
        call = connection.submit(ANSWER, wait=wait)
        far.sendall(pack_head(Kind.ANSWER, call, message, len(BLOCK)) + BLOCK)
        assert connection.answer_to(call, wait=wait).body_bytes == len(BLOCK)
        connection.receive_body(out, wait=wait)
        assert bytes(out) == BLOCK
        out[:] = bytes(len(out))
        assert near.received == count
    connection.close()
