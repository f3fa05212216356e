"""Settings of who did what at a gateway, and of how much each tenant may have.

A part of ``GatewayConfig``, as ``gateway.access``.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from pdserve.checked import Checked

MiB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessConfig(Checked):
    audit_log: str | None = None
    """A file for what administrators do, changes of keys and refusals, as lines of JSON; gateways
    of one host may share it. None: the logger ``pdserve.audit`` says it."""

    audit_bytes_max: int = 16 * MiB
    """A file of it that is so long is put aside, and another begun."""

    audit_files_max: int = 4
    """How many are kept, the current one too; the oldest goes."""

    quota_redis: str | None = None
    """Where gateways add up what tenants with a quota have used, as ``redis://host:6379/0``. None:
    each gateway counts for itself, and a tenant has its quota at each."""

    def _problems(self) -> Iterator[str]:
        yield from self._positive("audit_bytes_max", "audit_files_max")
