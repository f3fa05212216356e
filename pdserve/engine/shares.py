"""Blocks of another rank: what its end asks (``RankShares``) and what its own end does (``serve``).

Beside the steps and on a channel of its own, since moves run beside the thread that computes. The
channel carries orders; bytes lie in the staging buffer that both ends have mapped
(``model.parallel.pool``). Each order is answered when it has happened.
"""

import struct
from collections.abc import Callable

from pdserve.engine.channel import Channel
from pdserve.model.parallel.pool import PartedPool

_ORDER = struct.Struct("<cqqq")  # what, block, and: target of a copy; or layers, first and end
_PUT, _TAKE, _COPY, _DONE = b"p", b"t", b"c", b"d"


class RankShares:
    """``model.parallel.pool.OtherRank`` over a channel."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def put(self, block: int, layers: range) -> None:
        self._channel.write(_ORDER.pack(_PUT, block, layers.start, layers.stop))

    def take(self, block: int) -> None:
        self._channel.write(_ORDER.pack(_TAKE, block, 0, 0))

    def copy(self, source: int, target: int) -> None:
        self._channel.write(_ORDER.pack(_COPY, source, target, 0))

    def done(self) -> None:
        self._channel.read(memoryview(bytearray(_DONE)))


def serve(channel: Channel, pool: Callable[[], PartedPool]) -> None:
    """Carries out what comes, until the other end hangs up, which raises ``RankLost``.

    Args:
        pool: asked for with the first order, when there is one.
    """
    order = bytearray(_ORDER.size)
    while True:
        channel.read(memoryview(order))
        what, block, first, end = _ORDER.unpack(order)
        own = pool()
        if what == _PUT:
            own.put_shares(block, range(first, end))
        elif what == _TAKE:
            own.take_shares(block)
        else:
            own.copy_shares(block, first)
        channel.write(_DONE)
