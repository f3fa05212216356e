"""Which prefixes get a second home, and when. Pure: time and what is where are arguments.

A prefix that many hosts fetch from one is a load on that one, and is lost with it. Each read from
elsewhere adds one to the prefix's heat, which halves every ``HALF_LIFE_NS``; r reads per second
come to a heat of about 1.44 r half-lives. From ``HEAT_MIN`` on a prefix that one node alone has is
copied to another, one prefix at a time.

A copy takes nothing from anybody: it goes to a node that has free slots for all of it (which the
node itself makes sure of, since it evicts nothing for such a copy), and all copies together keep to
``bytes_per_s``. The books are of ``PREFIXES_MAX`` prefixes; the coldest is forgotten first.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from pdserve.clock import S
from pdserve.ids import BlockKey
from pdserve.kvstore.masters.core import Host
from pdserve.kvstore.masters.mastering import Remembered

HALF_LIFE_NS = 10 * S
HEAT_MIN = 20.0
"""What about 1.4 reads per second come to, or twenty at once."""

READS_MAX = 1000
"""What one client may say of one prefix at once."""

PREFIXES_MAX = 1024
BYTES_PER_S = 64 << 20
"""A sixteenth of a 10 GbE port, and half a percent of what a host's memory moves."""

BURST_NS = 10 * S
"""What was not used is saved up for so long."""

RETRY_NS = 30 * S
"""A prefix that could not be copied is left alone for so long."""

Holders = Callable[[Sequence[BlockKey]], Sequence[tuple[Host, int]]]
"""``MasterCore.holders``."""


@dataclass(frozen=True, slots=True)
class Copy:
    keys: tuple[BlockKey, ...]  # from the chain's first
    source: Host
    target: Host
    blocks: int  # that the target lacks
    remembered: tuple[Remembered, ...] = ()  # of ``keys``: what is worth less may go for them
    tenant: str = ""


@dataclass(slots=True)
class _Prefix:
    keys: tuple[BlockKey, ...]
    heat: float
    since_ns: int
    not_before_ns: int = 0

    def heat_at(self, now_ns: int) -> float:
        return self.heat * float(0.5 ** ((now_ns - self.since_ns) / HALF_LIFE_NS))


class Replication:
    def __init__(self, *, bytes_per_s: int = BYTES_PER_S, prefixes_max: int = PREFIXES_MAX) -> None:
        assert bytes_per_s >= 0
        assert prefixes_max > 0
        self._bytes_per_s = bytes_per_s
        self._prefixes_max = prefixes_max
        self._prefixes: dict[BlockKey, _Prefix] = {}  # by its last block
        self._saved_bytes = 0.0
        self._saved_ns: int | None = None

    def read(self, keys: Sequence[BlockKey], reads: int, now_ns: int) -> None:
        """A prefix was read from another host than the reader's, ``reads`` times."""
        if not keys or reads <= 0:
            return
        prefix = self._prefixes.get(keys[-1])
        if prefix is None:
            if len(self._prefixes) >= self._prefixes_max:
                coldest = min(self._prefixes.values(), key=lambda each: each.heat_at(now_ns))
                del self._prefixes[coldest.keys[-1]]
            prefix = self._prefixes[keys[-1]] = _Prefix(tuple(keys), 0.0, now_ns)
        prefix.heat = prefix.heat_at(now_ns) + min(reads, READS_MAX)
        prefix.since_ns = now_ns

    def next_copy(self, holders: Holders, hosts: Collection[Host], now_ns: int) -> Copy | None:
        """The hottest prefix that may be copied now. The caller says how it went by ``done``."""
        self._save(now_ns)
        hot = [
            (-heat, prefix.keys[-1])
            for prefix in self._prefixes.values()
            if (heat := prefix.heat_at(now_ns)) >= HEAT_MIN and now_ns >= prefix.not_before_ns
        ]
        for _, last in sorted(hot):
            copy = self._copy_of(self._prefixes[last], holders, hosts)
            if copy is not None:
                self._saved_bytes -= copy.blocks * copy.source.block_bytes
                return copy
        return None

    def done(self, copy: Copy, blocks: int, now_ns: int) -> None:
        """``blocks`` were copied. What was not is paid back."""
        self._saved_bytes += max(0, copy.blocks - blocks) * copy.source.block_bytes
        prefix = self._prefixes.get(copy.keys[-1])
        if prefix is not None:  # also where it went well: the index learns of it a little later
            prefix.not_before_ns = now_ns + RETRY_NS

    def _copy_of(self, prefix: _Prefix, holders: Holders, hosts: Collection[Host]) -> Copy | None:
        found = holders(prefix.keys)
        if not found or found[0][1] == 0:
            return None
        count = max(count for _, count in found)
        whole = [host for host, has in found if has == count]
        if len(whole) != 1:
            return None
        source = whole[0]
        has = {host.number: count for host, count in found}
        targets = [
            (host.slots_free - (count - has.get(host.number, 0)), host)
            for host in hosts
            if host.takes_blocks_of(source)
        ]
        targets = [each for each in targets if each[0] >= 0]
        if not targets:
            return None
        _, target = min(targets, key=lambda each: (-each[0], each[1].member.store_id))
        blocks = count - has.get(target.number, 0)
        if blocks * source.block_bytes > self._saved_bytes:
            return None
        return Copy(prefix.keys[:count], source, target, blocks)

    def _save(self, now_ns: int) -> None:
        most = self._bytes_per_s * BURST_NS / S
        if self._saved_ns is None:
            self._saved_bytes = most
        else:
            self._saved_bytes += (now_ns - self._saved_ns) * self._bytes_per_s / S
        self._saved_bytes = min(self._saved_bytes, most)
        self._saved_ns = now_ns
