"""Orders whose key is known when a request is queued, and stays until its work changes.

Ageing need not move keys: where everybody ages alike, comparing ``cost − c · waited`` at any moment
is comparing ``cost + c · arrival``, because ``c · now`` is on both sides. So ageing by time, by
deadline or by being passed over costs no more than none: O(log n) to join, to leave and to be
picked (``heap``).

None of these preempts but ``ShortestRemaining``.
"""

from collections.abc import Callable, Iterator, Mapping

from pdserve.ids import RequestId
from pdserve.messages import ServiceClass
from pdserve.router.entry import Entry
from pdserve.router.orders.base import Order
from pdserve.router.orders.heap import KeyedHeap

KeyFunction = Callable[[Entry], float]

AGING_TOKENS_PER_PASS = 64
"""What being passed over once is worth in tokens of cached prefix, with ``lpm_aging``."""

PRIORITY_JUMPS: Mapping[ServiceClass, float] = {
    ServiceClass.INTERACTIVE: 1.0,
    ServiceClass.STANDARD: 0.0,
    ServiceClass.BATCH: 0.0,
}
"""For ``wspt``: there a client's hint, here what its service class stands for."""


class StaticOrder(Order):
    """The least key first; at equal keys who came first."""

    def __init__(self, key: KeyFunction) -> None:
        self._key = key
        self._heap: KeyedHeap[float] = KeyedHeap()

    def push(self, entry: Entry, now_ns: int) -> None:
        self._heap.push(entry, self._key(entry))

    def remove(self, entry: Entry) -> None:
        self._heap.remove(entry)

    def refresh(self, entry: Entry, now_ns: int) -> None:
        self._heap.remove(entry)
        self._heap.push(entry, self._key(entry))

    def dispatched(self, entry: Entry, now_ns: int) -> None:
        pass

    def served(self, entry: Entry, elapsed_us: int, now_ns: int) -> None:
        pass

    def forget(self, entry: Entry) -> None:
        assert entry.id not in self._heap, f"{entry.id} waits, it cannot be forgotten"

    def may_stand_aside(self, entry: Entry) -> bool:
        return False

    def ranked(self, now_ns: int) -> Iterator[Entry]:
        return iter(self._heap)

    def key_ns(self, entry: Entry, now_ns: int) -> float:
        """In the key's own unit, which is not time for all of them."""
        return self._key(entry)

    def yields(self, running: Entry, waiting: Entry, margin_ns: int, now_ns: int) -> bool:
        return False

    def __len__(self) -> int:
        return len(self._heap)

    def __contains__(self, request: RequestId) -> bool:
        return request in self._heap

    def lengths(self) -> tuple[int, ...]:
        return (len(self._heap),)

    def check(self) -> None:
        self._heap.check()
        assert self._is_sorted(list(self._heap))

    def _is_sorted(self, entries: list[Entry]) -> bool:
        keys = [(self._key(entry), entry.order) for entry in entries]
        return keys == sorted(keys)


class ShortestRemaining(StaticOrder):
    """Least predicted work left first, and a running prefill with more left yields.

    With exact predictions this is the clairvoyant least mean (Schrage, 1968) on one server.
    """

    preempts = True

    def __init__(self) -> None:
        super().__init__(uncached_work)

    def yields(self, running: Entry, waiting: Entry, margin_ns: int, now_ns: int) -> bool:
        return running.work_ns > waiting.work_ns + margin_ns


class AgedPrefix(StaticOrder):
    """Longest cached prefix first, each pass counting as ``tokens_per_pass`` more of it.

        key = −(cached + tokens_per_pass · passes)

    A *pass* is the dispatch of somebody else. Everybody who waits is passed over alike, so passes
    are counted once for all, and an entry's own are what was counted since it joined.

    Source: SGLang issue #31954 and PR #31723 (``--lpm-aging-tokens-per-pass``).
    """

    def __init__(self, tokens_per_pass: int = AGING_TOKENS_PER_PASS) -> None:
        super().__init__(self._aged_key)
        self._tokens_per_pass = tokens_per_pass
        self._pass_count = 0
        self._joined: dict[RequestId, int] = {}  # at which pass

    def push(self, entry: Entry, now_ns: int) -> None:
        self._joined[entry.id] = self._pass_count
        super().push(entry, now_ns)

    def remove(self, entry: Entry) -> None:
        super().remove(entry)
        del self._joined[entry.id]

    def dispatched(self, entry: Entry, now_ns: int) -> None:
        self._pass_count += 1

    def _aged_key(self, entry: Entry) -> float:
        joined = self._joined.get(entry.id, self._pass_count)
        return cached_prefix(entry) + self._tokens_per_pass * joined

    def check(self) -> None:
        super().check()
        assert len(self._joined) == len(self)


# ── keys ─────────────────────────────────────────────────────────────────────────────────────────


def prompt_tokens(entry: Entry) -> float:
    """``sjf_raw``: shortest prompt first, whatever of it is cached (TensorRT-LLM PR #12428)."""
    return entry.total_tokens


def uncached_work(entry: Entry) -> float:
    """``sjf``: least predicted prefill time first (SGLang PR #13507, in tokens there)."""
    return entry.work_ns


def aged_work(ratio: float) -> KeyFunction:
    """``sjf_aging``: arrival + ratio · work, the static form of ``work − waited / ratio``.

    Who has waited ``ratio`` times its own work is passed by nobody who arrives later.

    Source: SGLang PR #30806, with time in place of tokens.
    """
    return lambda entry: entry.arrived_ns + ratio * entry.work_ns


def deadline(entry: Entry) -> float:
    """``edf``: earliest deadline first (Liu and Layland, 1973)."""
    return entry.deadline_ns


def weighted_uncached(entry: Entry) -> float:
    """``wspt``: weighted shortest processing time, weight over uncached tokens, greatest first.

    Source: NVIDIA Dynamo's router queue, ``(1 + priority_jump) / max(1, ISL − cached)``.
    """
    weight = 1 + PRIORITY_JUMPS[entry.request.service_class]
    return max(1, entry.uncached_tokens) / weight


def cached_prefix(entry: Entry) -> float:
    """``lpm``: longest cached prefix first (SGLang, arXiv:2312.07104)."""
    return entry.uncached_tokens - entry.total_tokens
