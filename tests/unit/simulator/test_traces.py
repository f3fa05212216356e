"""Reading traces: each format, and what is said about a line that does not fit."""

import json
from pathlib import Path

import pytest

from pdserve.errors import ConfigError
from pdserve.messages import ServiceClass
from pdserve.simulator.traces import TraceRequest, load_trace, parse_trace

MOONCAKE = (
    '{"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 2]}\n'
    "\n"
    '{"timestamp": 3000, "input_length": 512, "output_length": 7, "hash_ids": [0]}\n'
)
AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    "2023-11-16 18:17:03.9799600,4808,10\r\n"
    "2023-11-16 18:17:04.0319601,3180,8\r\n"
)
BURSTGPT = (
    "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,s1,0.5,ChatGPT,472,18,490,Conversation log\n"
    "6,s1,0.5,ChatGPT,100,0,100,API log\n"
    "45.5,s2,0.5,GPT-4,1087,230,1317,API log\n"
)
RECORDING = (
    '{"pdserve_recording": 1, "block_tokens": 16}\n'
    '{"arrival_ms": 10.5, "prompt_tokens": 33, "generated_tokens": 2, "blocks": [0, 1],'
    ' "tenant": "t1", "service_class": "batch"}\n'
)


def test_mooncake_keeps_the_ids_of_full_blocks() -> None:
    trace = parse_trace(MOONCAKE, "x/conversation.jsonl")
    assert trace.requests == (
        TraceRequest(0, 1100, 5, (0, 1)),
        TraceRequest(3_000_000_000, 512, 7, (0,)),
    )
    assert (trace.block_tokens, trace.name) == (512, "conversation.jsonl")


def test_azure_keeps_all_seven_digits(tmp_path: Path) -> None:
    file = tmp_path / "code.csv"
    file.write_text("\ufeff" + AZURE, encoding="utf-8")
    trace = load_trace(file)
    assert [request.arrival_ns for request in trace.requests] == [0, 52_000_100]
    assert [request.prompt_tokens for request in trace.requests] == [4808, 3180]


@pytest.mark.parametrize(
    "later", ["2024-05-10 00:00:01.500000+00:00", "2024-05-10T00:00:01.5", "2024-05-10 00:00:01.5Z"]
)
def test_azure_takes_offsets_and_fewer_digits(later: str) -> None:
    text = f"TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:01,1,1\n{later},1,1\n"
    assert parse_trace(text, "week").requests[1].arrival_ns == 500_000_000


def test_burstgpt_leaves_failures_out_and_counts_them() -> None:
    trace = parse_trace(BURSTGPT, "burst.csv")
    assert trace.requests == (TraceRequest(0, 472, 18), TraceRequest(40_500_000_000, 1087, 230))
    assert trace.dropped_count == 1


def test_burstgpt_without_sessions() -> None:
    text = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,G,4,2,6,API\n"
    assert parse_trace(text, "burst.csv").requests == (TraceRequest(0, 4, 2),)


def test_our_recording() -> None:
    trace = parse_trace(RECORDING, "r.jsonl")
    assert trace.requests == (TraceRequest(0, 33, 2, (0, 1), "t1", ServiceClass.BATCH),)
    assert trace.block_tokens == 16


def test_requests_come_in_order_of_arrival_whatever_the_file_does() -> None:
    lines = MOONCAKE.strip().splitlines()
    trace = parse_trace("\n".join(reversed(lines)), "backwards")
    assert [request.prompt_tokens for request in trace.requests] == [1100, 512]


def recording_with(**changes: object) -> str:
    header, line = RECORDING.splitlines()
    return header + "\n" + json.dumps({**json.loads(line), **changes})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "empty"),
        ("hello\n", "line 1: 'hello' begins none of the known formats"),
        (MOONCAKE + "{", "line 4 is not JSON"),
        (MOONCAKE + "[1]", "line 4 must be an object"),
        (MOONCAKE.replace("3000", '"soon"'), "line 3: timestamp is 'soon', must be a number"),
        (MOONCAKE.replace("3000", "-1"), "line 3: timestamp is -1, must be a number, 0 or more"),
        (MOONCAKE.replace("3000", "NaN"), "line 3: timestamp is nan"),
        (MOONCAKE.replace("3000", "true"), "line 3: timestamp is True"),
        (MOONCAKE.replace("512,", "0,"), "line 3: input_length is 0, must be a whole number, 1"),
        (MOONCAKE.replace("512,", "1.5,"), "line 3: input_length is 1.5, must be a whole number"),
        (MOONCAKE.replace("[0]", '["a"]'), r"line 3: hash_ids is \['a'\], must be a list of whole"),
        (MOONCAKE.replace('"hash_ids": [0]}', '"x": 1}'), "line 3: hash_ids is missing"),
        (AZURE.replace("2023-11-16 18:17:04", "16.11."), "line 3: TIMESTAMP is '16.11.*must be li"),
        (AZURE.replace(",8", ",eight"), "line 3: GeneratedTokens is 'eight', must be a"),
        (AZURE.replace(",8", ""), "line 3: GeneratedTokens is missing"),
        (AZURE.replace(",8", ",8,9,9"), "line 3 has more fields than the 3 of the first line"),
        (BURSTGPT.replace("1087", "0"), "line 4: Request tokens is '0', must be a whole number, 1"),
        (recording_with(blocks=[1, 2, 3]), r"line 2: blocks is .* at most 2 ids"),
        (recording_with(service_class="gold"), "line 2: service_class is 'gold', must be one of"),
        (recording_with(tenant=7), "line 2: tenant is 7, must be text"),
        (RECORDING.replace(": 1,", ": 9,"), "recording version 9; this release reads 1"),
        (RECORDING.splitlines()[0], "holds no request"),
    ],
)
def test_a_bad_line_is_named_with_its_field_and_what_is_right(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_trace(text, "bad.file")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the trace .*missing: No such file"):
        load_trace(tmp_path / "missing")


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    file = tmp_path / "picture"
    file.write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(ConfigError, match="is not text in UTF-8: byte 0"):
        load_trace(file)
