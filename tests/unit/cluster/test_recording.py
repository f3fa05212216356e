"""The recorder's lines: what the simulator reads, and nothing of what a request is."""

from dataclasses import replace

import pytest

from pdserve.clock import MS
from pdserve.cluster.recording import Recorder
from pdserve.ids import RequestId
from pdserve.messages import Request, ServiceClass
from pdserve.simulator.traces import Trace, TraceRequest, parse_trace
from tests.unit.router.build import BLOCK_TOKENS, request


def recorder(**limits: int) -> Recorder:
    return Recorder(
        block_tokens=BLOCK_TOKENS,
        began_ns=100 * MS,
        tenant_key=b"once",
        **limits,
    )


def trace_of(recorder: Recorder) -> Trace:
    return parse_trace("".join(recorder.take_lines()), "recorded")


def asked(name: str, tokens: int = 40, **changes: object) -> Request:
    return replace(request(name, tokens), **changes)  # type: ignore[arg-type]


def test_what_is_recorded_can_be_simulated() -> None:
    kept = recorder()
    kept.on_request(
        asked("a", tenant="acme", service_class=ServiceClass.INTERACTIVE), now_ns=110 * MS
    )
    kept.on_request(request("b", 50, document="a"), now_ns=125 * MS)
    kept.on_ended(RequestId("b"), total_tokens=53)
    kept.on_ended(RequestId("a"), total_tokens=47)
    first, second = trace_of(kept).requests
    assert first.tenant not in ("", "acme")
    assert replace(first, tenant="") == TraceRequest(
        0, 40, 7, (0, 1), service_class=ServiceClass.INTERACTIVE
    )
    assert second == TraceRequest(15 * MS, 50, 3, (0, 1, 2))


def test_equal_tenants_stay_equal_and_other_recordings_call_them_otherwise() -> None:
    names = []
    for key in (b"once", b"again"):
        kept = Recorder(block_tokens=16, began_ns=0, tenant_key=key)
        for name in ("a", "b"):
            kept.on_request(asked(name, tenant="acme"), now_ns=0)
            kept.on_ended(RequestId(name), 45)
        names.append([r.tenant for r in trace_of(kept).requests])
    assert names[0][0] == names[0][1] != names[1][0]


def test_no_text_no_token_and_no_key_is_written() -> None:
    kept = recorder()
    kept.on_request(asked("secret-id", tenant="secret-tenant"), now_ns=110 * MS)
    kept.on_ended(RequestId("secret-id"), 41)
    text = "".join(kept.take_lines())
    assert "secret" not in text
    assert request("secret-id", 40).block_keys[0].hex() not in text


def test_later_attempts_belong_to_the_first() -> None:
    kept = recorder()
    kept.on_request(asked("a"), now_ns=110 * MS)
    kept.on_request(asked("a", 44, prompt_tokens=40, attempt=1), now_ns=500 * MS)
    kept.on_ended(RequestId("a"), 50)
    assert trace_of(kept).requests == (TraceRequest(0, 40, 10, (0, 1)),)


def test_what_was_given_up_or_never_asked_is_not_written() -> None:
    kept = recorder()
    kept.on_request(asked("a"), now_ns=110 * MS)
    kept.on_given_up(RequestId("a"))
    kept.on_given_up(RequestId("a"))
    kept.on_ended(RequestId("a"), 50)
    kept.on_ended(RequestId("unknown"), 50)
    assert len(kept.take_lines()) == 1  # the header
    assert kept.take_lines() == []


@pytest.mark.parametrize("limit", ["open_max", "lines_max"])
def test_what_does_not_fit_is_counted(limit: str) -> None:
    kept = recorder(**{limit: 2})
    for name in ("a", "b", "c"):
        kept.on_request(asked(name), now_ns=110 * MS)
    for name in ("a", "b", "c"):
        kept.on_ended(RequestId(name), 41)
    lost = 1 if limit == "open_max" else 2  # the header takes a line
    assert kept.lost_count == lost
    assert len(kept.take_lines()) == 1 + 3 - lost


def test_forgotten_keys_get_new_numbers_never_old_ones() -> None:
    kept = recorder(blocks_max=2)
    for name, document in (("a", "x"), ("b", "y"), ("c", "x")):
        kept.on_request(request(name, 32, document=document), now_ns=110 * MS)
        kept.on_ended(RequestId(name), 33)
    assert [r.blocks for r in trace_of(kept).requests] == [(0, 1), (2, 3), (4, 5)]
