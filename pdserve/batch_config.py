"""Settings of uploaded files and of batches of requests.

A part of ``GatewayConfig``, as ``gateway.batches``. Where they are kept is ``responses_redis``, as
for responses: with it any gateway goes on with a batch whose gateway died.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from pdserve.checked import Checked

MiB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchConfig(Checked):
    file_bytes_max: int = 64 * MiB
    """Of one uploaded file."""

    kept_bytes_max: int = 256 * MiB
    """Of all files and answers that a gateway without Redis keeps in its memory."""

    files_max: int = 100
    """Of one tenant, which it has uploaded."""

    batches_max: int = 100
    """Of one tenant; those that are over count until they expire."""

    lines_max: int = 50_000
    """Requests in one file."""

    keep_s: float = 30 * 24 * 3600.0
    """How long files and batches are kept, unless an upload asks for less."""

    at_once: int = 2
    """Batches that one gateway works on."""

    lines_at_once: int = 8
    """Of one batch, requests that are under way."""

    def _problems(self) -> Iterator[str]:
        yield from self._positive(
            *("file_bytes_max", "kept_bytes_max", "files_max", "batches_max", "lines_max"),
            *("keep_s", "at_once", "lines_at_once"),
        )
