"""A switch of IPv4 packets between TUN devices, one process, whose links can be bad.

    python -m tests.hosts.switch CONTROL_FD SEED

The other end of the control socket sends JSON, one message each:

    {"plug": "10.201.0.2"}                 with the descriptor of the host's TUN device
    {"unplug": "10.201.0.2"}
    {"from": …, "to": …, "link": {…}}      fields of ``links.Link``
    {"count": true}

and every message has one answer, so that who asked knows that it holds from now on: how many
packets were carried and lost, and how many per pair of hosts had a frame of ours in the clear. The
process ends when that socket is closed. A kernel's netem would do the same; many kernels of
containers and small virtual machines are built without it, TUN devices they have.
"""

import contextlib
import heapq
import itertools
import json
import os
import re
import select
import socket
import sys
import time
from collections import Counter

from pdserve.wire.frame import MAGIC, VERSION
from tests.hosts.links import Link, Links

PACKET_BYTES_MAX = 65_536
BURST_PACKETS = 64
"""Read from one device before the others have their turn."""
UNDERWAY_PACKETS_MAX = 20_000
"""Delayed; one more is lost, as in a full queue of a real switch."""

FRAME_START = re.compile(re.escape(MAGIC + bytes([VERSION])) + rb"[\x01-\x05]\0\0")


class Switch:
    def __init__(self, control: socket.socket, seed: int) -> None:
        self._control = control
        self._links = Links(seed)
        self._devices: dict[str, int] = {}
        self._names: dict[int, str] = {}
        self._in_the_clear: Counter[str] = Counter()
        self._underway: list[tuple[int, int, str, bytes]] = []
        self._order = itertools.count()
        self._poll = select.epoll()
        self._poll.register(control, select.EPOLLIN)

    def run(self) -> None:
        while True:
            for descriptor, _ in self._poll.poll(self._wait_s()):
                if descriptor == self._control.fileno():
                    if not self._obey():
                        return
                elif descriptor in self._names:
                    self._carry(descriptor)
            self._deliver_due()

    def _wait_s(self) -> float:
        if not self._underway:
            return -1
        return max(0.0, (self._underway[0][0] - time.monotonic_ns()) / 1e9)

    def _carry(self, descriptor: int) -> None:
        source = self._names[descriptor]
        for _ in range(BURST_PACKETS):
            try:
                packet = os.read(descriptor, PACKET_BYTES_MAX)
            except BlockingIOError:
                return
            except OSError:  # the device went with its host
                self._unplug(source)
                return
            if len(packet) < 20 or packet[0] >> 4 != 4:
                continue  # IPv6 looks for neighbours by itself
            target = socket.inet_ntoa(packet[16:20])
            if FRAME_START.search(packet):
                self._in_the_clear[f"{source} {target}"] += 1
            now_ns = time.monotonic_ns()
            for arrival_ns in self._links.arrivals_ns(source, target, now_ns=now_ns):
                if arrival_ns <= now_ns:
                    self._deliver(target, packet)
                elif len(self._underway) < UNDERWAY_PACKETS_MAX:
                    heapq.heappush(self._underway, (arrival_ns, next(self._order), target, packet))

    def _deliver_due(self) -> None:
        now_ns = time.monotonic_ns()
        while self._underway and self._underway[0][0] <= now_ns:
            _, _, target, packet = heapq.heappop(self._underway)
            self._deliver(target, packet)

    def _deliver(self, target: str, packet: bytes) -> None:
        descriptor = self._devices.get(target)
        if descriptor is not None:
            with contextlib.suppress(OSError):  # full or down: lost, as anywhere
                os.write(descriptor, packet)

    def _unplug(self, name: str) -> None:
        descriptor = self._devices.pop(name, None)
        if descriptor is not None:
            del self._names[descriptor]
            with contextlib.suppress(OSError):
                self._poll.unregister(descriptor)
            os.close(descriptor)

    def _obey(self) -> bool:
        """One message; False: the other end is gone."""
        data, files, _, _ = socket.recv_fds(self._control, 4096, 1)
        if not data:
            return False
        message = json.loads(data)
        if "plug" in message:
            (descriptor,) = files
            self._unplug(message["plug"])
            os.set_blocking(descriptor, False)
            self._devices[message["plug"]] = descriptor
            self._names[descriptor] = message["plug"]
            self._poll.register(descriptor, select.EPOLLIN)
        elif "unplug" in message:
            self._unplug(message["unplug"])
        elif "link" in message:
            self._links.set(message["from"], message["to"], Link(**message["link"]))
        answer = {
            "carried": self._links.carried_count,
            "lost": self._links.lost_count,
            "clear": self._in_the_clear,
        }
        self._control.send(json.dumps(answer).encode())
        return True


if __name__ == "__main__":
    Switch(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])).run()
