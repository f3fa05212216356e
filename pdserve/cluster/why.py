"""Why a request went where it did: the router's decisions, for answers, the log and traces.

Every ``Timing`` carries the decisions that the router took for its request. A client that asks for
them gets them in its answer; an operator who sets the logger ``pdserve.why`` to INFO gets one line
of JSON per finished choice, and one who exports traces its spans (``tracing``). That logger is at
WARNING until somebody sets it, so a request costs two comparisons here.
"""

import json
import logging
import time
from typing import Any

from pdserve.cluster.gateway.calls import Call, Piece
from pdserve.cluster.tracing import is_tracing, tell_choice
from pdserve.errors import PdserveError
from pdserve.messages import Decision, Timing

US_PER_MS = 1000

log = logging.getLogger("pdserve.why")
if log.level == logging.NOTSET:
    log.setLevel(logging.WARNING)


def time_report(timing: Timing) -> dict[str, Any]:
    """Where the time went inside the cluster, and who spent it."""
    return {
        "queue_ms": timing.queued_us / US_PER_MS,
        "prefill_ms": timing.prefill_us / US_PER_MS,
        "step_ms": timing.step_us / US_PER_MS,
        "handoff_ms": timing.handoff_us / US_PER_MS,
        "cached_tokens": timing.cached_tokens,
        "preempted_count": timing.preempted_count,
        "parked_count": timing.parked_count,
        "level": timing.level,
        "prefill_worker": timing.prefill,
        "decode_worker": timing.decode,
    }


def decision_report(decision: Decision) -> dict[str, Any]:
    return {
        "at_unix_ms": decision.at_unix_us / US_PER_MS,
        "reason": decision.reason,
        "waited_ms": decision.waited_us / US_PER_MS,
        "level": decision.level,
        "work_ms": decision.work_us / US_PER_MS,
        "cached_tokens": decision.cached_tokens,
        "prefill_worker": decision.prefill,
        "decode_worker": decision.decode,
        "price_ms": decision.price_us / US_PER_MS,
        "others": [
            {"worker": worker, "price_ms": price_us / US_PER_MS}
            for worker, price_us in decision.others
        ],
    }


class WhyLog:
    """What is said of one call once its choices end."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._began_unix_ns = time.time_ns()
        self._timings: dict[int, Timing] = {}
        self._generated: dict[int, int] = {}
        self._open = set(range(call.n))

    def note(self, piece: Piece) -> None:
        if piece.timing is not None:
            self._timings[piece.choice] = piece.timing
        self._generated[piece.choice] = self._generated.get(piece.choice, 0) + len(piece.tokens)
        if piece.finish is not None:
            self._say(piece.choice, {"finish": piece.finish})

    def failed(self, error: PdserveError) -> None:
        """The call ends with ``error``, and with it every choice that had not ended."""
        for choice in sorted(self._open):
            self._say(choice, {"error": error.kind, "message": str(error)})

    def _say(self, choice: int, end: dict[str, Any]) -> None:
        self._open.discard(choice)
        call, timing = self._call, self._timings.get(choice, Timing())
        said = {
            "call": call.call,
            "choice": choice,
            "tenant": call.tenant,
            "service_class": call.service_class,
            "prompt_tokens": len(call.prompt),
            "generated_tokens": self._generated.get(choice, 0),
            **end,
            **time_report(timing),
            "decisions": [decision_report(decision) for decision in timing.decisions],
        }
        tell_choice(said, self._timings.get(choice), self._began_unix_ns)
        if log.isEnabledFor(logging.INFO):
            log.info("%s", json.dumps(said, ensure_ascii=False))


def why_log(call: Call) -> WhyLog | None:
    """None while nobody listens."""
    return WhyLog(call) if is_tracing() or log.isEnabledFor(logging.INFO) else None
