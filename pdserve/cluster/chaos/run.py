"""One run: the questions without faults, the same ones under strikes, then quiet, and a verdict."""

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pdserve.cluster.chaos import load, plan
from pdserve.cluster.chaos.strikes import Striker
from pdserve.cluster.chaos.targets import by_role, processes
from pdserve.cluster.chaos.verdict import IDLE_S_MAX, Verdict, held_in, judge
from pdserve.cluster.http_client import get_json
from pdserve.errors import PdserveError

LOOK_S = 0.5
READY_S_MAX = 120.0


@dataclass(frozen=True, slots=True)
class ChaosReport:
    seed: int
    seconds: float
    struck: tuple[str, ...]  # when, and what was done
    verdict: Verdict

    def as_dict(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "seconds": self.seconds,
            "strikes": list(self.struck),
            **self.verdict.as_dict(),
        }

    def text(self) -> str:
        outcome = "every promise was kept" if self.verdict.good else "A PROMISE WAS BROKEN"
        return "\n".join(
            [
                f"seed {self.seed}, {self.seconds:.0f} s, {len(self.struck)} strikes",
                *(f"  {each}" for each in self.struck),
                *self.verdict.lines(),
                outcome,
            ]
        )

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(self.as_dict(), indent=2) + "\n", encoding="utf-8")


def strike_cluster(
    url: str,
    *,
    seed: int,
    seconds: float,
    strikes: Sequence[plan.Strike],
    clients: int = 4,
    disk: Path | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> ChaosReport:
    """
    Raises:
        ConfigError: the cluster is not there, or its workers are not on this host.
        PdserveError: it does not answer even without faults.
    """
    find(url)  # before anything is asked
    questions = load.drawn(seed)
    ask = load.ask_http(url)
    progress(f"{len(questions)} questions without faults")
    calm = load.ask_all(ask, questions, clients=clients)
    for answer in calm:
        if answer.error:
            raise PdserveError(f"question {answer.question} without faults: {answer.error}")
    began_s = time.monotonic()
    struck: list[str] = []
    answers: list[load.Answer] = []
    asking = threading.Thread(
        target=lambda: answers.extend(
            load.ask_for(ask, questions, clients=clients, until_s=began_s + seconds)
        ),
        daemon=True,
    )
    asking.start()
    with Striker(lambda: find(url), disk) as striker:
        for strike in strikes:
            time.sleep(max(0.0, began_s + strike.at_s - time.monotonic()))
            done = _carry_out(striker, strike)
            struck.append(f"{time.monotonic() - began_s:6.1f} s  {done}")
            progress(struck[-1])
        time.sleep(max(0.0, began_s + seconds - time.monotonic()))
    asking.join()
    progress("quiet")
    return ChaosReport(seed, seconds, tuple(struck), judge(calm, answers, held_at_rest(url)))


def find(url: str) -> dict[str, list[int]]:
    """The cluster's processes on this host, by role."""
    return by_role(get_json(url, "/cluster/status")["workers"], processes())


def _carry_out(striker: Striker, strike: plan.Strike) -> str:
    try:
        return striker.carry_out(strike)
    except PdserveError as error:  # the router may be away, and nobody knows who is where
        return f"{strike.kind} {strike.role}: left out, {error}"


def held_at_rest(url: str, *, limit_s: float = IDLE_S_MAX) -> Mapping[str, int]:
    """What is held when it gets no less, or nothing is."""
    until_s = time.monotonic() + limit_s
    held: dict[str, int] = {"clusters that do not answer": 1}
    while any(held.values()) and time.monotonic() < until_s:
        time.sleep(LOOK_S)
        try:
            held = held_in(get_json(url, "/cluster/status"))
        except PdserveError:
            held = {"clusters that do not answer": 1}
    return held
