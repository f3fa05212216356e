"""Unit tests cannot cheat: whoever sleeps or connects in one is told so."""

import socket
import time
from typing import NoReturn

import pytest


@pytest.fixture(autouse=True)
def _no_sleep_no_connect(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> NoReturn:
        raise AssertionError("a unit test neither sleeps nor connects; pass time and peers in")

    monkeypatch.setattr(time, "sleep", forbidden)
    monkeypatch.setattr(socket.socket, "connect", forbidden)
