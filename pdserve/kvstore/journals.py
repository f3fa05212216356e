"""What is written while it happens and read again later, perhaps by another process.

A *journal* has a name, a *state* (replaced as a whole) and *lines* (only ever added to). One
process writes it. Others read it, and may ask its writer to end. It is kept for a bounded time, in
memory or in Redis, with the same behaviour. Both hold bytes and know nothing of what they mean.

A writer that works on a journal says so again and again (``append`` with ``alive_s``). When it
falls silent, a reader sees ``is_alive`` become false, and need not wait for an end that will never
come.

In memory the oldest that nobody writes any more give way when there are too many, or too many
bytes. In Redis each has a time to live, and each has a bound in bytes.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pdserve.clock import Clock, S, monotonic
from pdserve.errors import CapacityError
from pdserve.kvstore.redis_client import RedisClient

TIMEOUT_S = 1.0
"""For one call to Redis, which takes about a millisecond."""

_PREFIX = "pdserve:journal:"


@dataclass(frozen=True, slots=True)
class Found:
    state: bytes
    is_alive: bool  # its writer said so less than ``alive_s`` ago
    end_asked: bool  # somebody asked its writer to end


class Journals(Protocol):
    """Every method raises ``StoreUnavailable`` when the place cannot be reached."""

    async def make(self, name: str, state: bytes, *, alive_s: float = 0.0) -> None:
        """Begins a journal.

        Args:
            alive_s: how long the writer may now be silent; 0: it is done.

        Raises:
            CapacityError: there is no room for it.
        """
        ...

    async def write(self, name: str, state: bytes, *, alive_s: float = 0.0) -> None:
        """Replaces the state of a journal that is there; one that was removed stays so.

        Raises:
            CapacityError: as ``make``.
        """
        ...

    async def append(self, name: str, lines: Sequence[bytes], *, alive_s: float) -> bool:
        """Adds lines, perhaps none, to a journal that is there. Whether its end was asked for:
        removing it asks for that too."""
        ...

    async def find(self, name: str) -> Found | None: ...

    async def lines(self, name: str, start: int, count: int) -> list[bytes]:
        """At most ``count`` of the lines from number ``start`` on; none where there are none."""
        ...

    async def ask_end(self, name: str) -> None:
        """Idempotent; of a journal that is not there, nothing."""
        ...

    async def remove(self, name: str) -> bool:
        """False: it was not there."""
        ...

    async def close(self) -> None: ...


@dataclass(slots=True)
class _Journal:
    state: bytes
    made_ns: int
    alive_until_ns: int
    end_asked: bool = False
    lines: list[bytes] = field(default_factory=list)
    size_bytes: int = 0


class MemoryJournals:
    """In this process, for its own readers.

    Invariants, asserted by ``check``: the count and the bytes are within their bounds, and the
    bytes that are counted are those that are held.
    """

    def __init__(
        self, *, count_max: int, bytes_max: int, keep_s: float, clock: Clock = monotonic
    ) -> None:
        assert count_max > 0
        assert bytes_max > 0
        self._count_max = count_max
        self._bytes_max = bytes_max
        self._keep_ns = round(keep_s * S)
        self._clock = clock
        self._journals: OrderedDict[str, _Journal] = OrderedDict()  # the oldest first
        self._size_bytes = 0

    async def make(self, name: str, state: bytes, *, alive_s: float = 0.0) -> None:
        self._expire()
        self._make_room(name, len(state), new=True)
        now_ns = self._clock()
        self._journals[name] = _Journal(
            state, now_ns, now_ns + round(alive_s * S), size_bytes=len(state)
        )
        self._size_bytes += len(state)

    async def write(self, name: str, state: bytes, *, alive_s: float = 0.0) -> None:
        journal = self._journals.get(name)
        if journal is None:
            return
        added = len(state) - len(journal.state)
        self._make_room(name, added, new=False)
        journal.state = state
        journal.alive_until_ns = self._clock() + round(alive_s * S)
        journal.size_bytes += added
        self._size_bytes += added

    async def append(self, name: str, lines: Sequence[bytes], *, alive_s: float) -> bool:
        journal = self._journals.get(name)
        if journal is None:
            return True
        journal.alive_until_ns = self._clock() + round(alive_s * S)
        added = sum(map(len, lines))
        self._make_room(name, added, new=False)
        journal.lines.extend(lines)
        journal.size_bytes += added
        self._size_bytes += added
        return journal.end_asked

    async def find(self, name: str) -> Found | None:
        self._expire()
        journal = self._journals.get(name)
        if journal is None:
            return None
        is_alive = self._clock() < journal.alive_until_ns
        return Found(journal.state, is_alive, journal.end_asked)

    async def lines(self, name: str, start: int, count: int) -> list[bytes]:
        journal = self._journals.get(name)
        return [] if journal is None else journal.lines[start : start + count]

    async def ask_end(self, name: str) -> None:
        if name in self._journals:
            self._journals[name].end_asked = True

    async def remove(self, name: str) -> bool:
        self._expire()
        return self._forget(name)

    async def close(self) -> None:
        self._journals.clear()
        self._size_bytes = 0

    def check(self) -> None:
        assert len(self._journals) <= self._count_max
        assert 0 <= self._size_bytes <= self._bytes_max
        held = [
            (journal.size_bytes, len(journal.state) + sum(map(len, journal.lines)))
            for journal in self._journals.values()
        ]
        assert all(counted == there for counted, there in held)
        assert sum(there for _, there in held) == self._size_bytes

    def _expire(self) -> None:
        now_ns = self._clock()
        while self._journals:
            name, journal = next(iter(self._journals.items()))
            if now_ns - journal.made_ns < self._keep_ns or now_ns < journal.alive_until_ns:
                return
            self._forget(name)

    def _make_room(self, keep: str, added_bytes: int, *, new: bool) -> None:
        """Lets the oldest go whose writers are done; ``keep`` stays."""
        now_ns = self._clock()
        done = [n for n, j in self._journals.items() if n != keep and now_ns >= j.alive_until_ns]
        for name in done:
            if self._has_room(added_bytes, new=new):
                return
            self._forget(name)
        if not self._has_room(added_bytes, new=new):
            raise CapacityError(
                f"this gateway keeps {len(self._journals)} responses of {self._size_bytes} bytes "
                f"that are being written; at most {self._count_max} and {self._bytes_max} pass",
                retry_after_ms=1000,
            )

    def _has_room(self, added_bytes: int, *, new: bool) -> bool:
        return (
            len(self._journals) + new <= self._count_max
            and self._size_bytes + added_bytes <= self._bytes_max
        )

    def _forget(self, name: str) -> bool:
        journal = self._journals.pop(name, None)
        if journal is None:
            return False
        self._size_bytes -= journal.size_bytes
        return True


# KEYS: the journal, its lines, the sign of life of its writer.
#
# The lines of a journal that was removed must not come back with its writer's next ones.
_MAKE = """
redis.call('DEL', KEYS[1], KEYS[2], KEYS[3])
redis.call('HSET', KEYS[1], 'state', ARGV[1], 'keep_ms', ARGV[2], 'alive_ms', ARGV[3])
redis.call('PEXPIRE', KEYS[1], ARGV[2])
if tonumber(ARGV[3]) > 0 then redis.call('SET', KEYS[3], 1, 'PX', ARGV[3]) end
return 1
"""
_ALIVE = """
redis.call('HSET', KEYS[1], 'alive_ms', ARGV[1])
if tonumber(ARGV[1]) > 0 then redis.call('SET', KEYS[3], 1, 'PX', ARGV[1])
else redis.call('DEL', KEYS[3]) end
"""
_APPEND = f"""
if redis.call('EXISTS', KEYS[1]) == 0 then return 1 end
{_ALIVE}
for i = 2, #ARGV do redis.call('RPUSH', KEYS[2], ARGV[i]) end
redis.call('PEXPIRE', KEYS[2], redis.call('PTTL', KEYS[1]))
return tonumber(redis.call('HGET', KEYS[1], 'end_asked') or '0')
"""
_WRITE = f"""
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
{_ALIVE}
redis.call('HSET', KEYS[1], 'state', ARGV[2])
return 1
"""
# What has longer to live than it was ever given had it from a clock that has been set back since.
_FIND = """
local state, keep, alive, asked = unpack(redis.call(
  'HMGET', KEYS[1], 'state', 'keep_ms', 'alive_ms', 'end_asked'))
if not state then return false end
local function bounded(key, most)
  if most and redis.call('PTTL', key) > tonumber(most) then redis.call('PEXPIRE', key, most) end
end
bounded(KEYS[1], keep)
bounded(KEYS[2], keep)
bounded(KEYS[3], alive)
return {state, redis.call('EXISTS', KEYS[3]), tonumber(asked or '0')}
"""
_REMOVE = """
local there = redis.call('EXISTS', KEYS[1])
redis.call('DEL', KEYS[1], KEYS[2], KEYS[3])
return there
"""
_ASK_END = """
if redis.call('EXISTS', KEYS[1]) == 1 then redis.call('HSET', KEYS[1], 'end_asked', 1) end
return 0
"""


class RedisJournals:
    """In Redis, for every gateway that has its address. No two clocks are compared: how long things
    live is sent as a duration, and measured by Redis alone.

    Redis keeps an expiry as wall time, over its own restarts too. Where its clock is set back, by
    however much, what is found lives at most once more what it was given: a silent writer is seen
    one ``alive_s`` later, and a journal goes one ``keep_s`` later. Set forward it forgets what has
    passed by the new time; a writer that lives is alive again with its next word.
    """

    def __init__(self, url: str, *, bytes_max: int, keep_s: float) -> None:
        """
        Args:
            bytes_max: of one journal's state.
            keep_s: from its making.

        Raises:
            ConfigError: the address is none, or the client library is not there.
        """
        self._redis = RedisClient(
            url, timeout_s=TIMEOUT_S, keeps="the responses", setting="gateway.responses_redis"
        )
        self._bytes_max = bytes_max
        self._keep_ms = max(1000, round(keep_s * 1000))

    async def make(self, name: str, state: bytes, *, alive_s: float = 0.0) -> None:
        self._check(state)
        await self._redis.run(_MAKE, _keys(name), [state, self._keep_ms, _ms(alive_s)])

    async def write(self, name: str, state: bytes, *, alive_s: float = 0.0) -> None:
        self._check(state)
        await self._redis.run(_WRITE, _keys(name), [_ms(alive_s), state])

    async def append(self, name: str, lines: Sequence[bytes], *, alive_s: float) -> bool:
        return bool(await self._redis.run(_APPEND, _keys(name), [_ms(alive_s), *lines]))

    async def find(self, name: str) -> Found | None:
        found: tuple[bytes, int, int] | None = await self._redis.run(_FIND, _keys(name))
        if found is None:
            return None
        state, is_alive, end_asked = found
        return Found(state, is_alive == 1, end_asked == 1)

    async def lines(self, name: str, start: int, count: int) -> list[bytes]:
        asking = self._redis.commands.lrange(f"{_PREFIX}{name}:lines", start, start + count - 1)
        found: list[bytes] = await self._redis.asked(asking)
        return found

    async def ask_end(self, name: str) -> None:
        await self._redis.run(_ASK_END, [_PREFIX + name])

    async def remove(self, name: str) -> bool:
        return bool(await self._redis.run(_REMOVE, _keys(name)))

    async def close(self) -> None:
        await self._redis.close()

    def _check(self, state: bytes) -> None:
        if len(state) > self._bytes_max:
            raise CapacityError(
                f"a response of {len(state)} bytes cannot be kept; at most {self._bytes_max} pass",
                retry_after_ms=1000,
            )


def _keys(name: str) -> list[str]:
    key = _PREFIX + name
    return [key, key + ":lines", key + ":alive"]


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
