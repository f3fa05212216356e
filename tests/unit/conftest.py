"""Unit tests cannot cheat: whoever sleeps or connects in one is told so."""

import socket
import sys
import time
from typing import NoReturn

import pytest

_sleep = time.sleep


@pytest.fixture(autouse=True)
def _no_sleep_no_connect(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> NoReturn:
        raise AssertionError("a unit test neither sleeps nor connects; pass time and peers in")

    def sleep(seconds: float) -> None:
        # A child that has closed its pipes and not ended yet: the compiler, asked for its version.
        if sys._getframe(1).f_globals["__name__"] != "subprocess":
            forbidden()
        _sleep(seconds)

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(socket.socket, "connect", forbidden)
