"""Entries for tests of orders, with what these do not look at filled in.

Times are in milliseconds; a token is a millisecond of prefill.
"""

from collections.abc import Iterator

from pdserve.clock import MS
from pdserve.ids import HostId, RequestId
from pdserve.messages import Address, Request, Sampling, ServiceClass, Stop
from pdserve.router.costs import CostModel, believed
from pdserve.router.entry import Entry
from pdserve.router.orders.base import Order

COSTS: CostModel = believed(1000)


def entry(
    name: str,
    work_ms: int,
    *,
    order: int = 0,
    at_ms: int = 0,
    cached_tokens: int = 0,
    tenant: str = "",
    service_class: ServiceClass = ServiceClass.STANDARD,
    deadline_ms: int = 10**6,
) -> Entry:
    """Of a prompt with ``work_ms`` uncached tokens beside the cached ones."""
    request = Request(
        request=RequestId(name),
        attempt=0,
        choice=0,
        model="m",
        tokens=(0,) * (cached_tokens + work_ms),
        prompt_tokens=cached_tokens + work_ms,
        block_keys=(),
        tenant=tenant,
        service_class=service_class,
        sampling=Sampling(),
        stop=Stop(max_tokens=1),
        seed=0,
        deadline_unix_ms=deadline_ms,
        reply_to=Address(HostId("h"), "/g", ""),
    )
    made = Entry(
        request,
        order=order,
        arrived_ns=at_ms * MS,
        deadline_ns=deadline_ms * MS,
        queued_at_ns=at_ms * MS,
    )
    made.work_ns = work_ms * MS
    made.uncached_tokens = work_ms
    return made


def wait(order: Order, *entries: Entry) -> None:
    for one in entries:
        order.push(one, one.queued_at_ns)


def dispatch(order: Order, one: Entry, at_ms: int = 0) -> None:
    order.dispatched(one, at_ms * MS)
    order.remove(one)


def serve(order: Order, one: Entry, elapsed_ms: int, *, left_ms: int, at_ms: int = 0) -> None:
    """One chunk of a running prefill."""
    one.work_ns, one.uncached_tokens = left_ms * MS, left_ms
    order.served(one, elapsed_ms * 1000, at_ms * MS)


def come_back(order: Order, one: Entry, at_ms: int) -> None:
    """Preempted: it waits again."""
    one.queued_at_ns = at_ms * MS
    order.push(one, at_ms * MS)


def names(order: Order, at_ms: int = 0) -> list[str]:
    return [str(one.id) for one in order.ranked(at_ms * MS)]


def contents(value: object) -> Iterator[object]:
    """Everything that an object holds, however deep, entries left whole."""
    yield value
    if isinstance(value, dict):
        inner = [*value.keys(), *value.values()]
    elif isinstance(value, list | tuple | set):
        inner = list(value)
    elif not isinstance(value, Entry) and hasattr(value, "__dict__"):
        inner = list(vars(value).values()) if not isinstance(value, type) else []
    else:
        inner = []
    for part in inner:
        yield from contents(part)
