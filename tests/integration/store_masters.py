"""What tests of the master share: real master processes, and patience."""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pdserve.errors import StoreUnavailable
from pdserve.kvstore.masters.client import MasterClient
from pdserve.kvstore.masters.protocol import AskMaster, MasterReport
from pdserve.messages import Address

DEADLINE_S = 60.0

T = TypeVar("T")


@dataclass
class MasterProcess:
    process: subprocess.Popen[str]
    name: str
    address: Address

    @property
    def tcp(self) -> str:
        return self.address.tcp

    def client(self) -> MasterClient:
        return MasterClient([self.tcp], name="test")

    def report(self) -> MasterReport | None:
        """Its own; None when it does not answer."""
        client = self.client()
        try:
            return client.call(AskMaster(), MasterReport)
        except StoreUnavailable:
            return None
        finally:
            client.close()


@contextlib.contextmanager
def running_master(directory: Path, name: str, *arguments: str) -> Iterator[MasterProcess]:
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "pdserve.kvstore.masters.process"),
            *("--directory", str(directory / "masters"), "--master", name),
            *("--tcp-host", "127.0.0.1", *arguments),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line, f"the master ended with {process.wait(DEADLINE_S)}"
        yield MasterProcess(process, name, Address(**json.loads(line)["address"]))
    finally:
        process.kill()
        process.wait(DEADLINE_S)
        process.stdin.close()
        process.stdout.close()


def until(question: Callable[[], T | None], what: str) -> T:
    """Its first answer that is one."""
    until_s = time.monotonic() + DEADLINE_S
    while True:
        answer = question()
        if answer:
            return answer
        assert time.monotonic() < until_s, f"{what} did not come within {DEADLINE_S:g} s"
        time.sleep(0.02)  # between two questions; the state is what is waited for


def leader_of(*masters: MasterProcess) -> MasterProcess:
    def ask() -> MasterProcess | None:
        for master in masters:
            report = master.report()
            if report is not None and report.epoch:
                return master
        return None

    return until(ask, "a leader")
