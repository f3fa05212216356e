"""Long measurements in pieces: what a piece gave is kept in a file, so that an interrupted run goes
on where it was.

A file's name says what was measured: a digest of everything that the result depends on, for our own
servers their source too. Change the load or the code and it is measured again; remove the folder
and everything is.
"""

import asyncio
import dataclasses
import datetime
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.frame import ROOT, commit
from bench.peer_places import peers_home
from bench.peers.mixed_load import Arrival, Outcome, Target, drive
from bench.servers import Form, Ours, ServerFailed, serving

DIGEST_CHARS = 12
PACKAGE = ROOT / "pdserve"
CODE_SUFFIXES = {".py", ".cpp", ".h"}


def driven(form: Form, target: Target, arrivals: Sequence[Arrival]) -> list[Outcome]:
    """What became of a load.

    Raises:
        ServerFailed: not every request was answered.
    """
    outcomes = asyncio.run(drive(target, arrivals))
    if errors := [outcome.error for outcome in outcomes if outcome.error]:
        raise ServerFailed(
            f"{form.name} failed {len(errors)} of {len(outcomes)} requests; the first: {errors[0]}"
        )
    return outcomes


class Work:
    """A folder of results, one file a piece."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._source = source_digest(PACKAGE)
        directory.mkdir(parents=True, exist_ok=True)

    def remembered(self, form: Form, about: object, measure: Callable[[], Any]) -> Any:
        """What ``measure`` gives, plain data, from its file where it was measured before.

        Args:
            about: everything beside the form and our source that the result depends on.
        """
        file = self.directory / f"{self._name(form, about)}.json"
        if not file.exists():
            _say(f"{form.name} …")
            result = measure()
            whole = {"form": form.name, "commit": commit(), "date": _now(), "result": result}
            unfinished = file.with_suffix(".part")
            unfinished.write_text(json.dumps(whole))
            unfinished.rename(file)
        return json.loads(file.read_text())["result"]

    def log(self, form: Form) -> Path:
        """Where the form's server writes."""
        return self.directory / f"{_slug(form.name)}.log"

    def outcomes(self, form: Form, arrivals: Sequence[Arrival]) -> list[Outcome]:
        """What became of a load on a server of its own.

        Raises:
            ServerFailed: the server did not start, or did not answer every request.
        """

        def measure() -> list[dict[str, Any]]:
            with serving(form, self.log(form)) as target:
                return [dataclasses.asdict(outcome) for outcome in driven(form, target, arrivals)]

        about = [dataclasses.asdict(arrival) for arrival in arrivals]
        return [Outcome(**fields) for fields in self.remembered(form, about, measure)]

    def _name(self, form: Form, about: object) -> str:
        source = self._source if isinstance(form, Ours) else ""
        whole = json.dumps([dataclasses.asdict(form), source, about], sort_keys=True)
        return f"{_slug(form.name)}_{hashlib.sha256(whole.encode()).hexdigest()[:DIGEST_CHARS]}"


def source_digest(package: Path) -> str:
    """Of every file of code below ``package``."""
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*")):
        if file.suffix in CODE_SUFFIXES:
            digest.update(f"{file.relative_to(package)}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def default_directory(area: str) -> Path:
    return peers_home() / "runs" / area


def take_turns(forms: Sequence[Form], round_index: int) -> list[Form]:
    """The order of a round: each begins with the next form, so that none is always first."""
    start = round_index % len(forms)
    return [*forms[start:], *forms[:start]]


def _slug(name: str) -> str:
    return name.replace(" ", "-").replace("/", "-")


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _say(what: str) -> None:
    print(f"{datetime.datetime.now():%H:%M:%S}  {what}", file=sys.stderr, flush=True)
