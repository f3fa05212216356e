"""A proxy that damages what it passes on: bits flipped, bytes elsewhere, streams cut off."""

import contextlib
import random
import selectors
import socket
import threading
from collections import Counter

_PIECE_BYTES = 256 << 10
_TICK_S = 0.1


class Proxy:
    """Between clients and one TCP address; open until ``close``. It never drops bytes from the
    middle of a stream that goes on: a receiver could only wait for them until its deadline."""

    def __init__(self, target: str, seed: int, *, ratio: float) -> None:
        """``ratio``: of the pieces, as they come from a socket, that are damaged."""
        self.damage: Counter[str] = Counter()
        self._target = target
        self._chance = random.Random(seed)
        self._ratio = ratio
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listening.getsockname()[1]}"
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listening, selectors.EVENT_READ)
        self._others: dict[socket.socket, socket.socket] = {}
        self._ends = False
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._ends = True
        self._thread.join()
        for connected in list(self._others):
            self._hang_up(connected)
        self._listening.close()
        self._selector.close()

    def _run(self) -> None:
        while not self._ends:
            for key, _ in self._selector.select(_TICK_S):
                if key.fileobj is self._listening:
                    self._accept()
                elif isinstance(key.fileobj, socket.socket) and key.fileobj in self._others:
                    self._pass_on(key.fileobj)

    def _accept(self) -> None:
        theirs, _ = self._listening.accept()
        host, _, port = self._target.rpartition(":")
        ours = socket.create_connection((host, int(port)))
        for connected, other in ((theirs, ours), (ours, theirs)):
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._others[connected] = other
            self._selector.register(connected, selectors.EVENT_READ)

    def _pass_on(self, connected: socket.socket) -> None:
        try:
            data = connected.recv(_PIECE_BYTES)
            if not data:
                self._hang_up(connected)
                return
            spoilt, goes_on = self._spoil(data)
            self._others[connected].sendall(spoilt)
        except OSError:
            goes_on = False
        if not goes_on:
            self._hang_up(connected)

    def _spoil(self, data: bytes) -> tuple[bytes, bool]:
        """The bytes to pass on, and whether the stream goes on behind them."""
        if self._chance.random() >= self._ratio:
            return data, True
        what = self._chance.choice(("flip", "flip", "flip", "swap", "repeat", "cut"))
        self.damage[what] += 1
        spoilt = bytearray(data)
        at, other = self._chance.randrange(len(data)), self._chance.randrange(len(data))
        length = self._chance.randint(1, 1 + len(data) // 4)
        match what:
            case "flip":
                spoilt[at] ^= 1 << self._chance.randrange(8)
            case "swap":
                one, two = data[at : at + length], data[other : other + length]
                count = min(len(one), len(two))
                spoilt[at : at + count], spoilt[other : other + count] = two[:count], one[:count]
            case "repeat":
                part = data[at : at + length][: len(data) - other]
                spoilt[other : other + len(part)] = part
            case _:
                return bytes(data[:at]), False
        return bytes(spoilt), True

    def _hang_up(self, connected: socket.socket) -> None:
        for each in (connected, self._others.get(connected)):
            if each is not None and self._others.pop(each, None) is not None:
                self._selector.unregister(each)
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
                each.close()
