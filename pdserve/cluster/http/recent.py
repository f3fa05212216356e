"""The latest calls of one gateway and where their time went, for the console. No text, no tokens.

Bounded, in memory, and per gateway: what passed through another one is known there. Whoever may see
it is an administrator: it tells tenants and lengths of everybody's calls.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pdserve.cluster.http.answers import timing_report
from pdserve.cluster.why import decision_report
from pdserve.messages import Timing

RECENT_MAX = 64


@dataclass(frozen=True, slots=True)
class Ended:
    """A client call that has ended; ``timing`` is its first choice's, None where none came."""

    call: str
    model: str  # or its adapter
    front: str
    operation: str
    tenant: str
    status: str
    ended_unix_ms: int
    prompt_tokens: int
    generated_tokens: int
    first_token_us: int
    total_us: int
    timing: Timing | None

    def report(self) -> dict[str, Any]:
        said: dict[str, Any] = {
            "call": self.call,
            "model": self.model,
            "front": self.front,
            "operation": self.operation,
            "tenant": self.tenant,
            "status": self.status,
            "ended_unix_ms": self.ended_unix_ms,
            "prompt_tokens": self.prompt_tokens,
            "generated_tokens": self.generated_tokens,
        }
        if self.timing is not None:
            said |= timing_report(
                self.timing, first_token_us=self.first_token_us, total_us=self.total_us
            )
            said["decisions"] = [decision_report(one) for one in self.timing.decisions]
        return said


class Recent:
    def __init__(self) -> None:
        self._ended: deque[Ended] = deque(maxlen=RECENT_MAX)

    def add(self, ended: Ended) -> None:
        self._ended.append(ended)

    def report(self) -> Mapping[str, Any]:
        """The latest first."""
        return {"requests": [ended.report() for ended in reversed(self._ended)]}
