"""Hosts made of namespaces, on a network of their own.

A ``Host`` has its own network devices and address, process ids, System V IPC, ``/dev/shm`` and one
directory for sockets and logs (``LOCAL``, the same path on every host and another directory on
each). The rest of the file system is shared, so code and model need no copies. Its first process is
a ``cat`` that reads from here: when this process ends, however it ends, so does that, and the
kernel ends everything else on the host.

``power_off`` is what happens to a machine: from one moment on it says nothing more, not even a
reset. ``boot`` brings the same address back with nothing in memory.
"""

import contextlib
import fcntl
import ipaddress
import json
import os
import re
import secrets
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import pytest

from tests.hosts.links import CUT, PERFECT, Link

TUNSETIFF = 0x400454CA
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000
MTU_BYTES = 9000
QUEUE_PACKETS = 4000
SHARED_MEMORY = "512m"
COMMAND_S_MAX = 180.0
"""Nothing here takes more than a second, but `ray start`, and that on a busy machine."""
CLIENT = "client"
"""The name of this process's own end of the network."""

_NAMESPACES = ("--net", "--mount", "--pid", "--ipc", "--uts")


def reason_for_none() -> str | None:
    """Why hosts cannot be had here; None: they can."""
    if os.geteuid() != 0:
        return "hosts are made of namespaces, which needs root"
    if not Path("/dev/net/tun").exists():
        return "there is no /dev/net/tun"
    for command in ("ip", "unshare", "nsenter"):
        if shutil.which(command) is None:
            return f"the command {command} is not installed (deploy/setup.sh dev)"
    attempt = subprocess.run(
        ["unshare", *_NAMESPACES, "--fork", "--mount-proc", "true"],
        capture_output=True,
        text=True,
        timeout=COMMAND_S_MAX,
        check=False,
    )
    if attempt.returncode:
        return f"namespaces are not allowed here: {attempt.stderr.strip()}"
    return None


class Host:
    """One host. Made by ``Network.add``."""

    def __init__(self, network: "Network", name: str, address: str) -> None:
        self.name = name
        self.address = address
        self._network = network
        self._device = f"pd{secrets.token_hex(4)}"
        self._init: subprocess.Popen[bytes] | None = None
        self._pid = 0
        self.boot()

    @property
    def is_up(self) -> bool:
        return self._init is not None

    def boot(self) -> None:
        """From nothing to a network that works."""
        assert self._init is None, f"{self.name} is up already"
        local = self._network.local
        script = (
            f"mount -t tmpfs -o size={SHARED_MEMORY} tmpfs /dev/shm && "
            f"mount -t tmpfs -o size={SHARED_MEMORY} tmpfs {local} && "
            f"hostname {self.name} && ip link set lo up && "
            # Ignored here, so that the kernel itself buries the orphans that this process adopts.
            "trap '' CHLD && echo up && exec cat >/dev/null"
        )
        self._init = subprocess.Popen(
            ["unshare", *_NAMESPACES, "--fork", "--kill-child", "--mount-proc", "sh", "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._init.stdout is not None
        line = self._init.stdout.readline()
        assert line == b"up\n", f"{self.name} did not come up: {line!r}"
        children = Path(f"/proc/{self._init.pid}/task/{self._init.pid}/children").read_text()
        self._pid = int(children)
        descriptor = _tun_device(self._device)
        try:
            _run("ip", "link", "set", self._device, "netns", str(self._pid))
            self.run("ip", "addr", "add", f"{self.address}/24", "dev", self._device)
            _raise_device(self.run, self._device)
            self._network.plug(self.address, descriptor)
        finally:
            os.close(descriptor)

    def power_off(self) -> None:
        """No packet leaves it any more; then all its processes are gone. Idempotent."""
        self._network.unplug(self.address)
        if self._init is None:
            return
        assert self._init.stdin is not None
        assert self._init.stdout is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, 9)
        self._init.kill()
        self._init.wait(COMMAND_S_MAX)
        self._init.stdin.close()
        self._init.stdout.close()
        self._init = None

    def command(self, *words: str) -> list[str]:
        """What runs ``words`` there."""
        return ["nsenter", "--target", str(self._pid), *_NAMESPACES, "--", *words]

    def run(self, *words: str, environment: Mapping[str, str] | None = None) -> str:
        """What it printed; AssertionError with what it said when it failed."""
        return _run(*self.command(*words), environment=environment)

    def start(
        self,
        *words: str,
        environment: Mapping[str, str] | None = None,
        stderr: IO[bytes] | int | None = None,
    ) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*words),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env={**os.environ, **(environment or {})},
        )


class Network:
    """Hosts and what is between them. Made by ``network``."""

    def __init__(self, directory: Path, prefix: str, seed: int) -> None:
        self.local = directory
        self.seed = seed
        self.hosts: dict[str, Host] = {}
        self.client_address = f"{prefix}.254"
        self._prefix = prefix
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.settimeout(COMMAND_S_MAX)
        with theirs:
            self._switch = subprocess.Popen(
                [sys.executable, "-m", "tests.hosts.switch", str(theirs.fileno()), str(seed)],
                pass_fds=[theirs.fileno()],
                cwd=Path(__file__).parents[2],
            )
        self.client_device = f"pd{secrets.token_hex(4)}"
        descriptor = _tun_device(self.client_device)
        try:
            _run("ip", "addr", "add", f"{self.client_address}/24", "dev", self.client_device)
            _raise_device(_run, self.client_device)
            self.plug(self.client_address, descriptor)
        finally:
            os.close(descriptor)

    @property
    def switch_pid(self) -> int:
        return self._switch.pid

    def add(self, name: str) -> Host:
        host = Host(self, name, f"{self._prefix}.{len(self.hosts) + 1}")
        self.hosts[name] = host
        return host

    def link(self, source: str, target: str, link: Link) -> None:
        """From now on; one direction, by the names of hosts or ``CLIENT``."""
        self._tell(
            {"from": self._address(source), "to": self._address(target), "link": asdict(link)}
        )

    def both_ways(self, one: str, other: str, link: Link) -> None:
        self.link(one, other, link)
        self.link(other, one, link)

    def cut(self, one: str, other: str, *, both: bool = True) -> None:
        """Partition: nothing of ``one`` arrives at ``other``, nor the other way round."""
        self.link(one, other, CUT)
        if both:
            self.link(other, one, CUT)

    def everywhere(self, link: Link) -> None:
        """Between all pairs of hosts; clients keep their perfect links."""
        for one in self.hosts:
            for other in self.hosts:
                if one != other:
                    self.link(one, other, link)

    def heal(self) -> None:
        self.everywhere(PERFECT)

    def lost_count(self) -> int:
        """Packets that the links have lost so far."""
        return int(self._tell({"count": True})["lost"])

    def readable_count(self, source: str, target: str) -> int:
        """Packets so far in which whoever is on the way could read one of our frames."""
        pair = f"{self._address(source)} {self._address(target)}"
        return int(self._tell({"count": True})["clear"].get(pair, 0))

    def plug(self, address: str, descriptor: int) -> None:
        self._tell({"plug": address}, descriptor)

    def unplug(self, address: str) -> None:
        self._tell({"unplug": address})

    def close(self) -> None:
        for host in self.hosts.values():
            with contextlib.suppress(OSError):  # a switch that died is no reason to leave hosts
                host.power_off()
        self._control.close()
        self._switch.wait(COMMAND_S_MAX)

    def _tell(self, message: Mapping[str, object], descriptor: int | None = None) -> dict[str, Any]:
        files = [] if descriptor is None else [descriptor]
        socket.send_fds(self._control, [json.dumps(message).encode()], files)
        answer: dict[str, Any] = json.loads(self._control.recv(4096))
        return answer

    def _address(self, name: str) -> str:
        return self.client_address if name == CLIENT else self.hosts[name].address


@contextlib.contextmanager
def network(names: Sequence[str], *, seed: int) -> Iterator[Network]:
    """Hosts of these names; skips the test where there can be none. Nothing of them stays."""
    if reason := reason_for_none():
        pytest.skip(reason)
    print(f"the network's seed is {seed}")
    directory = Path(tempfile.mkdtemp(prefix="pdh-", dir="/tmp"))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        made = Network(directory, _free_prefix(), seed)
        stack.callback(made.close)
        for name in names:
            made.add(name)
        yield made


def _free_prefix() -> str:
    """Three numbers of a /24 that no route of this machine touches."""
    routes = [
        ipaddress.ip_network(word, strict=False)
        for word in re.findall(r"^[\d./]+", _run("ip", "-4", "route", "show", "table", "all"), re.M)
    ]
    for number in range(200, 256):
        ours = ipaddress.ip_network(f"10.{number}.77.0/24")
        if not any(ours.overlaps(route) for route in routes):
            return f"10.{number}.77"
    pytest.skip("this machine has routes to every network that could be used")


def _tun_device(name: str) -> int:
    """A descriptor of the new device; the device lasts as long as somebody has it open."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH", name.encode(), IFF_TUN | IFF_NO_PI))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _raise_device(run: Callable[..., str], device: str) -> None:
    run("ip", "link", "set", device, "mtu", str(MTU_BYTES), "txqueuelen", str(QUEUE_PACKETS), "up")


def _run(*words: str, environment: Mapping[str, str] | None = None) -> str:
    done = subprocess.run(
        words,
        capture_output=True,
        text=True,
        timeout=COMMAND_S_MAX,
        check=False,
        env={**os.environ, **(environment or {})},
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr or done.stdout}"
    return done.stdout
