"""What a client, its library or a proxy says in headers about time: how long it waits, and how
often it has asked before.

    x-request-timeout-ms              milliseconds from now                  ours; strict
    x-request-deadline                Unix time in seconds, fractions pass   ours; strict
    x-envoy-expected-rq-timeout-ms    what an Envoy in front allows          a hint
    x-stainless-timeout,              seconds, as OpenAI's libraries say     a hint
    x-stainless-read-timeout          them

The earliest counts. A client that named a time itself is told where it is no time; a hint that
cannot be read is none. The libraries' timeouts are those of one read: they end an answer that comes
whole, whose first byte is its last, and say nothing about how long a stream may go on.
"""

import math
from collections.abc import Iterator, Mapping

from starlette.types import Scope

from pdserve.cluster.gateway.parameters import shown
from pdserve.errors import InvalidField

TIMEOUT_HEADER = "x-request-timeout-ms"
DEADLINE_HEADER = "x-request-deadline"
PROXY_HEADER = "x-envoy-expected-rq-timeout-ms"
LIBRARY_HEADERS = ("x-stainless-timeout", "x-stainless-read-timeout")
RETRY_HEADER = "x-stainless-retry-count"
RETRY_METADATA = "grpc-previous-rpc-attempts"

TIMEOUT_MS_MAX = 24 * 3600 * 1000
RETRIES_MAX = 1000

MS_PER_S = 1000


def headers_of(scope: Scope) -> dict[str, str]:
    """The headers of an HTTP request, by their names in lower case; of one that was sent twice the
    first. Starlette's own mapping goes through all of them for each question."""
    pairs = reversed(scope["headers"])
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in pairs}


def deadline_unix_ms(
    headers: Mapping[str, str],
    *,
    now_unix_ms: int,
    wall_unix_ms: int,
    longest_ms: int,
    stream: bool,
) -> int:
    """When the request must be over, in the time of ``clock.steady_unix_ms``.

    Args:
        headers: names in lower case.
        now_unix_ms: ``clock.steady_unix_ms``.
        wall_unix_ms: the wall clock as it is set, by which the client names its deadline.
        longest_ms: of a request that names no time itself; hints only shorten it.
        stream: the answer is told while it comes.

    Raises:
        InvalidField: ``x-request-timeout-ms`` or ``x-request-deadline`` is no such time.
    """
    named = [now_unix_ms + ms for ms in (_timeout_ms(headers),) if ms is not None]
    deadline = _deadline_ms(headers, wall_unix_ms)
    if deadline is not None:
        named.append(now_unix_ms + deadline - wall_unix_ms)
    longest = [] if named else [now_unix_ms + longest_ms]
    hinted = [now_unix_ms + ms for ms in _hints_ms(headers, stream=stream)]
    return min([*named, *longest, *hinted])


def retries_of(headers: Mapping[str, str]) -> int:
    """So often the client's library, or its gRPC channel, has sent this request before."""
    for name in (RETRY_HEADER, RETRY_METADATA):
        text = headers.get(name, "")
        if text.isascii() and text.isdigit() and len(text) <= 6:
            return min(int(text), RETRIES_MAX)
    return 0


def _timeout_ms(headers: Mapping[str, str]) -> int | None:
    text = headers.get(TIMEOUT_HEADER)
    if text is None:
        return None
    if not (
        text.isascii() and text.isdigit() and len(text) <= 12 and 1 <= int(text) <= TIMEOUT_MS_MAX
    ):
        raise InvalidField(
            TIMEOUT_HEADER, f"is {shown(text)}, must be milliseconds from 1 to {TIMEOUT_MS_MAX}"
        )
    return int(text)


def _deadline_ms(headers: Mapping[str, str], now_unix_ms: int) -> int | None:
    text = headers.get(DEADLINE_HEADER)
    if text is None:
        return None
    seconds = _seconds(text)
    if seconds is None or seconds * MS_PER_S > now_unix_ms + TIMEOUT_MS_MAX:
        raise InvalidField(
            DEADLINE_HEADER,
            f"is {shown(text)}, must be a Unix time in seconds, at most "
            f"{TIMEOUT_MS_MAX // MS_PER_S} from now",
        )
    return math.floor(seconds * MS_PER_S)


def _hints_ms(headers: Mapping[str, str], *, stream: bool) -> Iterator[int]:
    proxy = _seconds(headers.get(PROXY_HEADER, ""))  # milliseconds, in the same notation
    if proxy is not None and 1 <= proxy <= TIMEOUT_MS_MAX:
        yield math.ceil(proxy)
    for name in () if stream else LIBRARY_HEADERS:
        seconds = _seconds(headers.get(name, ""))
        if seconds is not None and 0 < seconds <= TIMEOUT_MS_MAX / MS_PER_S:
            yield math.ceil(seconds * MS_PER_S)


def _seconds(text: str) -> float | None:
    """A plain decimal number that is not negative: no sign, no exponent, no ``inf``."""
    whole, point, fraction = text.partition(".")
    digits = whole + fraction
    plain = digits.isascii() and digits.isdigit() and len(digits) <= 20 and bool(whole)
    return float(text) if plain and (bool(fraction) or not point) else None
