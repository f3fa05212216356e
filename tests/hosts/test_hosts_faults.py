"""What the network between hosts does to requests, and what a host does that goes and comes back.

One cluster for all of them, with TLS and a key file between its hosts, and plain HTTP to a client.
Every request ends within its deadline, with the tokens it would have had or with a typed error
after a true beginning of them; and when the fault is over, the cluster serves as before.
"""

import json
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hosts.cluster import DECODE, HEAD, PREFILL, HostedCluster, hosted, hosted_settings
from tests.hosts.links import Link
from tests.hosts.namespaces import network
from tests.integration.certificates import make_certificates
from tests.integration.harness import Stream, held, random_prompts, storm, storm_samplings, wait_for
from tests.models.alone import tokens_alone

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STREAMS = 6
OUTPUT_TOKENS = 300
STRIKE_AT = STREAMS * 10
DEADLINE_S = 40.0
DEADLINE_GRACE_S = 30.0
"""For a busy machine to write the error that a deadline ends with; the gateway allows 1 s."""
RECOVERY_S_MAX = 150.0
"""Ray notices a host's death in at most 15 s (``cluster.DETECTION``); then Serve starts a replica
on a host whose Ray has just started, which takes most of this on two busy cores."""


def _prompts() -> list[list[int]]:
    return random_prompts(STREAMS, seed=5, length=300)


@pytest.fixture(scope="module")
def expected(small_model: Path) -> list[list[int]]:
    """What the streams are when nothing happens."""
    return tokens_alone(small_model, _prompts(), storm_samplings(STREAMS), OUTPUT_TOKENS)


@pytest.fixture(scope="module")
def hosts(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostedCluster]:
    secrets_of_hosts = tmp_path_factory.mktemp("secrets")
    make_certificates(secrets_of_hosts)
    key_file = secrets_of_hosts / "cluster.key"
    key_file.write_text("a key for tests of hosts only")
    key_file.chmod(0o600)
    store = {
        "tls_authority": str(secrets_of_hosts / "authority.pem"),
        "tls_certificate": str(secrets_of_hosts / "member.pem"),
        "tls_key": str(secrets_of_hosts / "member.key"),
        "key_file": str(key_file),
    }
    with network([HEAD, PREFILL, DECODE], seed=7) as made:
        config = hosted_settings(
            small_model,
            made,
            store=store,
            gateway={"request_timeout_s": DEADLINE_S},
            decode={"replicas": 2, "replicas_max": 2},  # a host that goes takes both
        )
        with hosted(made, config) as cluster:
            yield cluster


@pytest.fixture
def cluster(hosts: HostedCluster) -> Iterator[HostedCluster]:
    """It serves before, and it serves after, with nothing left of what was asked in between."""
    hosts.wait_until_it_serves(within_s=RECOVERY_S_MAX)
    yield hosts
    hosts.network.heal()
    took_s = hosts.wait_until_it_serves(within_s=RECOVERY_S_MAX)
    print(f"serves again after {took_s:.1f} s; seed {hosts.network.seed}")
    wait_for("everything to be given back", lambda: held(hosts.served) == 0, timeout_s=120)


def test_nobody_on_the_way_can_read_what_hosts_say(
    cluster: HostedCluster, expected: list[list[int]]
) -> None:
    streams = storm(cluster.served, _prompts(), OUTPUT_TOKENS)
    assert [stream.tokens for stream in streams] == expected
    assert cluster.served.counter("prefill", "remote_bytes") > 0
    names = (HEAD, PREFILL, DECODE)
    pairs = [(one, other) for one in names for other in names if one != other]
    assert {pair: cluster.network.readable_count(*pair) for pair in pairs} == dict.fromkeys(
        pairs, 0
    )


@pytest.mark.parametrize(
    "link",
    [
        Link(loss_ratio=0.01),
        Link(loss_ratio=0.05),
        Link(delay_ms=50),
        Link(delay_ms=5, jitter_ms=20, duplicate_ratio=0.05, loss_ratio=0.01),
    ],
    ids=["1 % loss", "5 % loss", "50 ms", "out of order, twice, and lost"],
)
def test_a_bad_network_costs_time_and_no_token(
    cluster: HostedCluster, expected: list[list[int]], link: Link
) -> None:
    lost_before = cluster.network.lost_count()
    cluster.network.everywhere(link)
    streams = storm(cluster.served, _prompts(), OUTPUT_TOKENS)
    assert [stream.error for stream in streams] == [None] * STREAMS
    assert [stream.tokens for stream in streams] == expected
    assert (cluster.network.lost_count() > lost_before) == (link.loss_ratio > 0)


@pytest.mark.parametrize("both", [True, False], ids=["both ways", "one way"])
@pytest.mark.parametrize(
    ("one", "other"), [(PREFILL, DECODE), (DECODE, HEAD)], ids=["prefill-decode", "decode-head"]
)
def test_a_partition_delays_or_fails_requests_and_nothing_else(
    cluster: HostedCluster, expected: list[list[int]], one: str, other: str, both: bool
) -> None:
    streams = storm(
        cluster.served,
        _prompts(),
        OUTPUT_TOKENS,
        at=STRIKE_AT,
        strike=lambda: cluster.network.cut(one, other, both=both),
    )
    late = storm(cluster.served, _prompts(), OUTPUT_TOKENS)  # they begin while it lasts
    _assert_true_and_ended([*streams, *late], [*expected, *expected])
    cluster.network.heal()
    took_s = cluster.wait_until_it_serves(within_s=RECOVERY_S_MAX)
    print(f"serves {took_s:.1f} s after the partition")


@pytest.mark.parametrize("name", [PREFILL, DECODE])
def test_a_host_goes_and_comes_back(
    cluster: HostedCluster, expected: list[list[int]], name: str
) -> None:
    host = cluster.host(name)
    struck = threading.Thread(target=host.power_off)
    streams = storm(cluster.served, _prompts(), OUTPUT_TOKENS, at=STRIKE_AT, strike=struck.start)
    struck.join()
    _assert_true_and_ended(streams, expected)
    host.boot()
    cluster.start_ray(name)
    cluster.wait_until_it_serves(within_s=RECOVERY_S_MAX)
    again = storm(cluster.served, _prompts(), OUTPUT_TOKENS)
    assert [stream.tokens for stream in again] == expected


def _error_of(stream: Stream) -> dict[str, Any]:
    """As an event of a stream, or as a whole answer."""
    assert stream.error is not None
    error: dict[str, Any] = json.loads(stream.error)
    inner: dict[str, Any] = error.get("error", error)
    return inner


def _assert_true_and_ended(streams: list[Stream], expected: list[list[int]]) -> None:
    for index, (stream, tokens) in enumerate(zip(streams, expected, strict=True)):
        assert stream.ended_s or stream.error, f"stream {index} neither ended nor failed"
        assert stream.ended_s < DEADLINE_S + DEADLINE_GRACE_S, f"stream {index}"
        if stream.error is None:
            assert stream.tokens == tokens, f"stream {index}"
            continue
        error = _error_of(stream)
        assert error["type"], f"stream {index}: {error}"
        assert error.get("code") != "poison_request", f"stream {index}: {error}"
        assert stream.tokens == tokens[: len(stream.tokens)], f"stream {index}: {error}"
    errors = Counter(_error_of(s)["type"] if s.error else "none" for s in streams)
    print(f"{len(streams)} streams, their errors: {dict(errors)}")
