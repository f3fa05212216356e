"""A batch, from its making to its end. Pure: what happened goes in, the next record comes out.

    validating ──► in_progress ──► finalizing ──► completed
        │  │            │              └────────► expired      its window closed before
        │  └────────────┴──► cancelling ───────► cancelled
        └──► failed          (its file is no batch)

A record is OpenAI's ``Batch`` object, kept as JSON with whose it is.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from pdserve.cluster.http.batches.lines import Problem
from pdserve.errors import IllegalTransition

WINDOW = "[1-9][0-9]{0,3}[sm]|([1-9][0-9]?|1[0-5][0-9]|16[0-8])h|[1-7]d"
"""Such as 24h: at most a week."""

_UNIT_S = MappingProxyType({"s": 1, "m": 60, "h": 3600, "d": 24 * 3600})


class BatchState(StrEnum):
    VALIDATING = "validating"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    CANCELLING = "cancelling"
    COMPLETED = "completed"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLED = "cancelled"


S = BatchState

_NEXT: Mapping[BatchState, frozenset[BatchState]] = MappingProxyType(
    {
        S.VALIDATING: frozenset({S.IN_PROGRESS, S.FAILED, S.CANCELLING, S.FINALIZING}),
        S.IN_PROGRESS: frozenset({S.FINALIZING, S.CANCELLING, S.FAILED}),
        S.FINALIZING: frozenset({S.COMPLETED, S.EXPIRED, S.FAILED}),
        S.CANCELLING: frozenset({S.CANCELLED, S.FAILED}),
    }
)

OVER = frozenset({S.COMPLETED, S.FAILED, S.EXPIRED, S.CANCELLED})

_STAMPS = tuple(f"{state}_at" for state in BatchState if state is not S.VALIDATING)


@dataclass(frozen=True, slots=True)
class Record:
    owner: str  # the tenant; empty where there are no keys
    batch: Mapping[str, Any]  # as clients see it

    @property
    def name(self) -> str:
        name: str = self.batch["id"]
        return name

    @property
    def state(self) -> BatchState:
        return BatchState(self.batch["status"])

    @property
    def is_over(self) -> bool:
        return self.state in OVER

    def encoded(self) -> bytes:
        return json.dumps({"owner": self.owner, "batch": self.batch}, sort_keys=True).encode()

    def moved(self, state: BatchState, now_s: int, **fields: Any) -> "Record":
        """
        Raises:
            IllegalTransition: no batch goes there from here.
        """
        if state not in _NEXT.get(self.state, ()):
            raise IllegalTransition(f"{self.name}: {state} while {self.state}")
        return self.noted(status=str(state), **{f"{state}_at": now_s}, **fields)

    def noted(self, **fields: Any) -> "Record":
        """The same with some fields changed."""
        return Record(self.owner, {**self.batch, **fields})

    def counted(self, completed: int, failed: int, total: int) -> "Record":
        counts = {"completed": completed, "failed": failed, "total": total}
        return self.noted(request_counts=counts)


def decoded(data: bytes) -> Record:
    return Record(**json.loads(data))


def new_batch(
    name: str,
    owner: str,
    *,
    endpoint: str,
    input_file: str,
    window: str,
    window_s: int,
    metadata: Mapping[str, str] | None,
    now_s: int,
) -> Record:
    batch: dict[str, Any] = {
        "id": name,
        "object": "batch",
        "endpoint": endpoint,
        "model": None,
        "errors": None,
        "input_file_id": input_file,
        "completion_window": window,
        "status": str(S.VALIDATING),
        "output_file_id": None,
        "error_file_id": None,
        "created_at": now_s,
        "expires_at": now_s + window_s,
        **dict.fromkeys(_STAMPS),
        "request_counts": {"total": 0, "completed": 0, "failed": 0},
        "usage": None,
        "metadata": metadata,
    }
    return Record(owner, batch)


def refused(record: Record, problems: Sequence[Problem], now_s: int) -> Record:
    """Its file cannot be a batch."""
    errors = {"object": "list", "data": [problem.told() for problem in problems]}
    return record.moved(S.FAILED, now_s, errors=errors)


def ending(record: Record, *, all_answered: bool) -> BatchState:
    """How a batch ends whose lines are all answered, or given up."""
    if record.state is S.CANCELLING:
        return S.CANCELLED
    return S.COMPLETED if all_answered else S.EXPIRED


def window_s_of(window: str) -> int | None:
    """Its seconds; None: it is no ``WINDOW``."""
    if re.fullmatch(WINDOW, window, re.ASCII) is None:
        return None
    return int(window[:-1]) * _UNIT_S[window[-1]]
