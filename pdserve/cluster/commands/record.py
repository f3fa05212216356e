"""``pdserve record FILE``: what arrives at a running cluster, as a trace for ``pdserve simulate``.

The router records while somebody fetches: this command asks the gateway again and again for the
lines there are, and appends them to the file. Lengths and times only, never text.
"""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

from pdserve.cluster.http_client import get_json, of_model
from pdserve.errors import ConfigError

EVERY_S = 0.5
"""Between two fetches. The router gives a recording up that nobody fetches for ten seconds."""

PATH = "/cluster/recording"
"""Answers ``{"recording": name, "lines": […], "lost": count}``; the first call begins one."""


def record(url: str, file: Path, *, seconds: float | None = None, model: str | None = None) -> None:
    """Until Ctrl-C, or for so long; what arrives for one model, the first unless one is named.

    Raises:
        ConfigError: the file exists, or cannot be written, or nothing answers at ``url``.
    """
    console = Console(highlight=False, stderr=True)
    until_s = None if seconds is None else time.monotonic() + seconds
    try:
        with file.open("x", encoding="utf-8") as out, contextlib.suppress(KeyboardInterrupt):
            console.print(f"recording {url} to {file}; Ctrl-C ends it")
            _fetch_all(lambda: get_json(url, of_model(PATH, model)), out, until_s)
    except FileExistsError:
        raise ConfigError(f"{file} is there already; name another file") from None
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error.strerror}") from error
    console.print(f"wrote {file}: `pdserve simulate {file}` plays it")


def _fetch_all(fetch: Callable[[], Any], out: TextIO, until_s: float | None) -> None:
    begun: str | None = None
    while True:
        answer = fetch()
        if begun not in (None, answer["recording"]):
            raise ConfigError(
                "the router has begun another recording: it restarted, or somebody else records; "
                "what was written until then is complete"
            )
        begun = answer["recording"]
        out.writelines(answer["lines"])
        out.flush()
        if until_s is not None and time.monotonic() >= until_s:
            return
        time.sleep(EVERY_S)
