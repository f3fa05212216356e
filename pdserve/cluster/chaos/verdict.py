"""Whether a cluster kept its promises while it was struck. Pure.

tokens   an answer is what it was without faults, token by token, as far as it went
lost     an answer that did not come, though nothing struck a gateway
held     what requests can hold, anywhere, after the last one: 0 within ``IDLE_S_MAX``
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pdserve.cluster.chaos.load import Answer

IDLE_S_MAX = 60.0
"""A dead worker's successor comes first; then the graces of gateways and of a silent worker."""

STILL = ("finished", "aborted", "failed")
"""Phases of what holds nothing any more."""

SHOWN_MAX = 5


@dataclass(frozen=True, slots=True)
class Verdict:
    answers: int
    wrong: tuple[str, ...]  # what differs, said in words
    lost: tuple[str, ...]
    held: Mapping[str, int]  # at the end; only what is not 0
    slowest_s: float

    @property
    def good(self) -> bool:
        return not (self.wrong or self.lost or self.held)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "held": dict(self.held), "good": self.good}

    def lines(self) -> list[str]:
        held = ", ".join(f"{count} {name}" for name, count in self.held.items())
        return [
            f"answers          {self.answers}, the slowest took {self.slowest_s:.1f} s",
            f"wrong tokens     {len(self.wrong)}",
            *(f"    {each}" for each in self.wrong[:SHOWN_MAX]),
            f"lost             {len(self.lost)}",
            *(f"    {each}" for each in self.lost[:SHOWN_MAX]),
            f"held afterwards  {held or 'nothing'}",
        ]


def judge(calm: Sequence[Answer], struck: Sequence[Answer], held: Mapping[str, int]) -> Verdict:
    """``calm`` has each question's answer without faults, in their order."""
    wrong, lost = [], []
    for answer in struck:
        expected = calm[answer.question].tokens
        first = next(
            (
                index
                for index, token in enumerate(answer.tokens)
                if index >= len(expected) or token != expected[index]
            ),
            None,
        )
        if first is not None:
            wanted = expected[first] if first < len(expected) else "the end"
            wrong.append(
                f"question {answer.question}: token {first} is {answer.tokens[first]}, not {wanted}"
            )
        elif answer.error:
            lost.append(f"question {answer.question}: {answer.error}")
        elif len(answer.tokens) < len(expected):
            wrong.append(
                f"question {answer.question}: ends after {len(answer.tokens)} of {len(expected)}"
            )
    return Verdict(
        answers=len(struck),
        wrong=tuple(wrong),
        lost=tuple(lost),
        held={name: count for name, count in held.items() if count},
        slowest_s=max((answer.elapsed_s for answer in struck), default=0.0),
    )


def held_in(snapshot: Mapping[str, Any]) -> dict[str, int]:
    """What requests hold, by the router's snapshot and its workers' counters."""
    workers = snapshot["workers"]
    return {
        "waiting requests": sum(snapshot["queue_lengths"]),
        "parked requests": snapshot["parked"],
        "queue entries": sum(
            count for phase, count in snapshot["phases"].items() if phase not in STILL
        ),
        "sequences": sum(worker["running"] + worker["waiting"] for worker in workers),
        "device blocks": sum(worker["block_count"] - worker["free_blocks"] for worker in workers),
        "store pins": sum(worker["counters"].get("store_pinned", 0) for worker in workers),
        "store tickets": sum(worker["counters"].get("store_tickets", 0) for worker in workers),
    }
