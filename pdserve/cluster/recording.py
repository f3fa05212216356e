"""What arrived at the router, as a trace to be simulated: lengths and times only, never text.

Pure: requests and endings in, lines out. Block keys become small numbers in the order in which they
appeared, tenants a keyed hash whose key nobody keeps; so a recording says who shares a prefix with
whom, and nothing of what it is. A request is written when its last token is out; one that fails or
is cancelled is not. The format is that of ``simulator.traces``.
"""

import json
from collections import deque
from dataclasses import dataclass
from hashlib import blake2b

from pdserve.clock import MS
from pdserve.ids import BlockKey, RequestId
from pdserve.messages import Request

RECORDING_VERSION = 1

OPEN_MAX = 65_536
"""Requests under way; one more is not recorded."""

LINES_MAX = 65_536
"""Lines nobody has fetched; one more is lost, and counted."""

BLOCKS_MAX = 1 << 20
"""Keys remembered; beyond, the first is forgotten, and a number of its own if it comes again."""

TENANT_CHARACTERS = 12


@dataclass(frozen=True, slots=True)
class _Open:
    arrival_ns: int
    prompt_tokens: int
    blocks: tuple[int, ...]
    tenant: str
    service_class: str


class Recorder:
    """Every count here is bounded; what did not fit is counted in ``lost_count``."""

    def __init__(
        self,
        *,
        block_tokens: int,
        began_ns: int,
        tenant_key: bytes,
        open_max: int = OPEN_MAX,
        lines_max: int = LINES_MAX,
        blocks_max: int = BLOCKS_MAX,
    ) -> None:
        """``tenant_key``: random bytes for this recording alone."""
        self.lost_count = 0
        self._block_tokens = block_tokens
        self._began_ns = began_ns
        self._tenant_key = tenant_key
        self._open_max = open_max
        self._lines_max = lines_max
        self._blocks_max = blocks_max
        self._open: dict[RequestId, _Open] = {}
        self._lines: deque[str] = deque()
        self._blocks: dict[BlockKey, int] = {}
        self._next_block = 0
        self._lines.append(
            _line({"pdserve_recording": RECORDING_VERSION, "block_tokens": block_tokens})
        )

    def on_request(self, request: Request, now_ns: int) -> None:
        """A gateway submitted it. Later attempts belong to the first."""
        if request.attempt > 0 or request.request in self._open:
            return
        if len(self._open) >= self._open_max:
            self.lost_count += 1
            return
        keys = request.block_keys[: request.prompt_tokens // self._block_tokens]
        self._open[request.request] = _Open(
            now_ns - self._began_ns,
            request.prompt_tokens,
            tuple(self._number(key) for key in keys),
            self._tenant(request.tenant),
            request.service_class,
        )

    def on_ended(self, request: RequestId, total_tokens: int) -> None:
        """Its last token is out; ``total_tokens`` are prompt and answer."""
        ended = self._open.pop(request, None)
        if ended is None:
            return
        if len(self._lines) >= self._lines_max:
            self.lost_count += 1
            return
        self._lines.append(
            _line(
                {
                    "arrival_ms": round(ended.arrival_ns / MS, 3),
                    "prompt_tokens": ended.prompt_tokens,
                    "generated_tokens": total_tokens - ended.prompt_tokens,
                    "blocks": ended.blocks,
                    "tenant": ended.tenant,
                    "service_class": ended.service_class,
                }
            )
        )

    def on_given_up(self, request: RequestId) -> None:
        """Cancelled or refused: it is no part of the recording."""
        self._open.pop(request, None)

    def take_lines(self) -> list[str]:
        """What was written since the last call; the header comes first of all."""
        lines = list(self._lines)
        self._lines.clear()
        return lines

    def _number(self, key: BlockKey) -> int:
        number = self._blocks.get(key)
        if number is None:
            if len(self._blocks) >= self._blocks_max:
                del self._blocks[next(iter(self._blocks))]
            number = self._blocks[key] = self._next_block
            self._next_block += 1
        return number

    def _tenant(self, tenant: str) -> str:
        if not tenant:
            return ""
        return blake2b(tenant.encode(), key=self._tenant_key).hexdigest()[:TENANT_CHARACTERS]


def _line(fields: dict[str, object]) -> str:
    return json.dumps(fields, separators=(",", ":")) + "\n"
