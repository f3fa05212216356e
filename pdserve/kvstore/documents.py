"""What several gateways keep and work on together: uploaded files, batches of requests.

A *document* has a name, a *state* (small, replaced as a whole if it is still what was read), a
*content* (large, never changed) and *answers* (each number gets one, whoever is first). Groups list
it, and it lives for a bounded time, in memory or in Redis, with the same behaviour. All are bytes,
and nothing here knows what they mean.

Who works on a document holds its *lease* and renews it. One that falls silent loses the lease, and
another goes on with what is not answered yet. For a while both may answer: the first one counts, so
that nothing is answered twice, whatever leases and clocks do.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pdserve.clock import Clock, S, monotonic
from pdserve.errors import CapacityError, RateLimited
from pdserve.kvstore.redis_client import RedisClient

TIMEOUT_S = 10.0
"""For one call to Redis; a content of 64 MiB takes a tenth of a second on one host."""

_PREFIX = "pdserve:document:"


@dataclass(frozen=True, slots=True, kw_only=True)
class New:
    """A document that is to be made."""

    name: str
    state: bytes
    groups: Sequence[str]  # that list it; at least one
    keep_s: float  # how long it is there
    content: bytes = b""
    count_max: int | None = None  # of the first group, itself counted


class Documents(Protocol):
    """Every method raises ``StoreUnavailable`` when the place cannot be reached."""

    async def make(self, new: New) -> None:
        """
        Raises:
            CapacityError: there is no room for it, or the group is full.
        """
        ...

    async def state(self, name: str) -> bytes | None: ...

    async def states(self, group: str) -> list[bytes]:
        """Of the documents that it lists, the oldest first, in one question."""
        ...

    async def swap(self, name: str, old: bytes, new: bytes) -> bool:
        """Replaces the state; False: it is not ``old`` any more."""
        ...

    async def content(self, name: str) -> bytes | None: ...

    async def names(self, group: str) -> list[str]:
        """Of the documents that it lists, the oldest first."""
        ...

    async def leave(self, name: str, group: str) -> None:
        """The group does not list it any more."""
        ...

    async def remove(self, name: str) -> bool:
        """False: it was not there."""
        ...

    async def answer(self, name: str, number: int, answer: bytes) -> bool:
        """False: there is one already, or no such document.

        Raises:
            CapacityError: there is no room for it.
        """
        ...

    async def answers(self, name: str) -> dict[int, bytes]: ...

    async def claim(self, name: str, who: str, lease_s: float) -> bool:
        """Takes or renews the lease; False: another has it."""
        ...

    async def release(self, name: str, who: str) -> None:
        """Gives the lease back, where it is still ``who``'s."""
        ...

    async def close(self) -> None: ...


@dataclass(slots=True)
class _Document:
    state: bytes
    content: bytes
    groups: set[str]
    ends_ns: int
    answers: dict[int, bytes] = field(default_factory=dict)
    holder: str = ""
    held_until_ns: int = 0

    @property
    def size_bytes(self) -> int:
        return len(self.state) + len(self.content) + sum(map(len, self.answers.values()))


class MemoryDocuments:
    """In this process, for its own readers; they end with it. The bytes of all are bounded."""

    def __init__(self, *, bytes_max: int, clock: Clock = monotonic) -> None:
        assert bytes_max > 0
        self._bytes_max = bytes_max
        self._clock = clock
        self._documents: dict[str, _Document] = {}  # the oldest first
        self._size_bytes = 0

    async def make(self, new: New) -> None:
        count = len(await self.names(new.groups[0]))
        if new.count_max is not None and count >= new.count_max:
            raise full(new.count_max)
        ends_ns = self._clock() + round(new.keep_s * S)
        document = _Document(new.state, new.content, set(new.groups), ends_ns)
        self._check_room(document.size_bytes)
        self._forget(new.name)
        self._documents[new.name] = document
        self._size_bytes += document.size_bytes

    async def state(self, name: str) -> bytes | None:
        document = self._find(name)
        return None if document is None else document.state

    async def states(self, group: str) -> list[bytes]:
        self._expire()
        return [each.state for each in self._documents.values() if group in each.groups]

    async def swap(self, name: str, old: bytes, new: bytes) -> bool:
        document = self._find(name)
        if document is None or document.state != old:
            return False
        self._size_bytes += len(new) - len(old)  # small: no room is kept for it
        document.state = new
        return True

    async def content(self, name: str) -> bytes | None:
        document = self._find(name)
        return None if document is None else document.content

    async def names(self, group: str) -> list[str]:
        self._expire()
        return [name for name, each in self._documents.items() if group in each.groups]

    async def leave(self, name: str, group: str) -> None:
        document = self._find(name)
        if document is not None:
            document.groups.discard(group)

    async def remove(self, name: str) -> bool:
        self._expire()
        return self._forget(name)

    async def answer(self, name: str, number: int, answer: bytes) -> bool:
        document = self._find(name)
        if document is None or number in document.answers:
            return False
        self._check_room(len(answer))
        document.answers[number] = answer
        self._size_bytes += len(answer)
        return True

    async def answers(self, name: str) -> dict[int, bytes]:
        document = self._find(name)
        return {} if document is None else dict(document.answers)

    async def claim(self, name: str, who: str, lease_s: float) -> bool:
        document, now_ns = self._find(name), self._clock()
        if document is None or (document.holder != who and now_ns < document.held_until_ns):
            return False
        document.holder, document.held_until_ns = who, now_ns + round(lease_s * S)
        return True

    async def release(self, name: str, who: str) -> None:
        document = self._find(name)
        if document is not None and document.holder == who:
            document.held_until_ns = 0

    async def close(self) -> None:
        self._documents.clear()
        self._size_bytes = 0

    def check(self) -> None:
        """Asserts that the bytes that are counted are those that are held."""
        held = sum(each.size_bytes for each in self._documents.values())
        assert held == self._size_bytes, f"{held} bytes are held, {self._size_bytes} counted"

    def _find(self, name: str) -> _Document | None:
        self._expire()
        return self._documents.get(name)

    def _expire(self) -> None:
        now_ns = self._clock()
        for name in [n for n, each in self._documents.items() if now_ns >= each.ends_ns]:
            self._forget(name)

    def _check_room(self, added_bytes: int) -> None:
        self._expire()
        if self._size_bytes + added_bytes > self._bytes_max:
            raise CapacityError(
                f"this gateway keeps files of {self._size_bytes} bytes, at most {self._bytes_max} "
                "pass; delete some, or wait until they expire",
                retry_after_ms=1000,
            )

    def _forget(self, name: str) -> bool:
        document = self._documents.pop(name, None)
        if document is None:
            return False
        self._size_bytes -= document.size_bytes
        return True


def full(count_max: int) -> RateLimited:
    return RateLimited(
        f"there are {count_max} of them already, which is as many as one tenant may have; delete "
        "some, or wait until they expire",
        retry_after_ms=1000,
    )


# KEYS: the document, its content, its answers, its lease; then its groups.
#
# A group is a sorted set by the order of making, which Redis alone counts. Names of documents that
# have expired leave it when somebody looks.
_NAMES = """
local function names(group)
  local found = {}
  for _, name in ipairs(redis.call('ZRANGE', group, 0, -1)) do
    if redis.call('EXISTS', ARGV[1] .. name) == 1 then table.insert(found, name)
    else redis.call('ZREM', group, name) end
  end
  return found
end
"""
_MAKE = f"""
{_NAMES}
local most = tonumber(ARGV[6])
if most >= 0 and #names(KEYS[5]) >= most then return 0 end
redis.call('DEL', KEYS[1], KEYS[2], KEYS[3], KEYS[4])
redis.call('HSET', KEYS[1], 'state', ARGV[3])
redis.call('SET', KEYS[2], ARGV[4], 'PX', ARGV[5])
redis.call('PEXPIRE', KEYS[1], ARGV[5])
local number = redis.call('INCR', ARGV[1] .. 'count')
for i = 5, #KEYS do redis.call('ZADD', KEYS[i], number, ARGV[2]) end
return 1
"""
_LIST = f"{_NAMES} return names(KEYS[1])"
_STATES = f"""
{_NAMES}
local found = {{}}
for i, name in ipairs(names(KEYS[1])) do
  found[i] = redis.call('HGET', ARGV[1] .. name, 'state')
end
return found
"""
_SWAP = """
if redis.call('HGET', KEYS[1], 'state') ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], 'state', ARGV[2])
return 1
"""
_REMOVE = """
redis.call('DEL', KEYS[2], KEYS[3], KEYS[4])
return redis.call('DEL', KEYS[1])
"""
_ANSWER = """
local left = redis.call('PTTL', KEYS[1])
if left < 0 then return 0 end
local first = redis.call('HSETNX', KEYS[3], ARGV[1], ARGV[2])
redis.call('PEXPIRE', KEYS[3], left)
return first
"""
_CLAIM = """
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
local holder = redis.call('GET', KEYS[4])
if holder and holder ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[4], ARGV[1], 'PX', ARGV[2])
return 1
"""
_RELEASE = """
if redis.call('GET', KEYS[4]) == ARGV[1] then redis.call('DEL', KEYS[4]) end
return 0
"""


class RedisDocuments:
    """In Redis, for every gateway that has its address. How long things live is sent as a duration,
    and measured by Redis alone."""

    def __init__(self, url: str, *, bytes_max: int) -> None:
        """
        Args:
            bytes_max: of one document's content.

        Raises:
            ConfigError: the address is none, or the client library is not there.
        """
        self._redis = RedisClient(
            url, timeout_s=TIMEOUT_S, keeps="the files", setting="gateway.responses_redis"
        )
        self._bytes_max = bytes_max

    async def make(self, new: New) -> None:
        if len(new.content) > self._bytes_max:
            raise CapacityError(
                f"a file of {len(new.content)} bytes cannot be kept, at most {self._bytes_max} are",
                retry_after_ms=1000,
            )
        keys = [*_keys(new.name), *map(_group, new.groups)]
        most = -1 if new.count_max is None else new.count_max
        keep_ms = max(1000, round(new.keep_s * 1000))
        arguments = [_PREFIX, new.name, new.state, new.content, keep_ms, most]
        if not await self._redis.run(_MAKE, keys, arguments):
            raise full(most)

    async def state(self, name: str) -> bytes | None:
        asking = self._redis.commands.hget(_PREFIX + name, "state")
        found: bytes | None = await self._redis.asked(asking)
        return found

    async def states(self, group: str) -> list[bytes]:
        found: list[bytes] = await self._redis.run(_STATES, [_group(group)], [_PREFIX])
        return found

    async def swap(self, name: str, old: bytes, new: bytes) -> bool:
        return bool(await self._redis.run(_SWAP, _keys(name), [old, new]))

    async def content(self, name: str) -> bytes | None:
        found: bytes | None = await self._redis.asked(self._redis.commands.get(_keys(name)[1]))
        return found

    async def names(self, group: str) -> list[str]:
        found: list[bytes] = await self._redis.run(_LIST, [_group(group)], [_PREFIX])
        return [name.decode() for name in found]

    async def leave(self, name: str, group: str) -> None:
        await self._redis.asked(self._redis.commands.zrem(_group(group), name))

    async def remove(self, name: str) -> bool:
        return bool(await self._redis.run(_REMOVE, _keys(name)))

    async def answer(self, name: str, number: int, answer: bytes) -> bool:
        return bool(await self._redis.run(_ANSWER, _keys(name), [number, answer]))

    async def answers(self, name: str) -> dict[int, bytes]:
        asking = self._redis.commands.hgetall(_keys(name)[2])
        found: dict[bytes, bytes] = await self._redis.asked(asking)
        return {int(number): answer for number, answer in found.items()}

    async def claim(self, name: str, who: str, lease_s: float) -> bool:
        lease_ms = max(1, round(lease_s * 1000))
        return bool(await self._redis.run(_CLAIM, _keys(name), [who, lease_ms]))

    async def release(self, name: str, who: str) -> None:
        await self._redis.run(_RELEASE, _keys(name), [who])

    async def close(self) -> None:
        await self._redis.close()


def _keys(name: str) -> list[str]:
    key = _PREFIX + name
    return [key, key + ":content", key + ":answers", key + ":lease"]


def _group(group: str) -> str:
    return f"{_PREFIX}group:{group}"
