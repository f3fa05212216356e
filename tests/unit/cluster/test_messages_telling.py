"""Whatever a model says, its events follow the API's grammar, and add up to the message."""

import json
from collections.abc import Iterable, Mapping
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.cluster.gateway.calls import Piece
from pdserve.cluster.http.answers import Chat, Choice
from pdserve.cluster.http.messages.telling import Event, Teller
from pdserve.cluster.http.speech import Manner, Speech
from pdserve.errors import Cancelled
from pdserve.messages import FinishReason
from pdserve.text.tokenizer import Tokenizer
from tests.unit.cluster.fake_session import FakeTokenizer, piece

CALL = '<tool_call>\n{"name": "f", "arguments": {"x": 1, "y": "é"}}\n</tool_call>'
THINKS = Manner(reasoning="deepseek_r1", calls="hermes")
USAGE = {"input_tokens": 5, "output_tokens": 7}
STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH

_BLOCKS = {
    "text": ("text_delta", "text", "text"),
    "thinking": ("thinking_delta", "thinking", "thinking"),
    "tool_use": ("input_json_delta", "partial_json", "input"),
}


def teller(manner: Manner = THINKS, **options: bool) -> Teller:
    dialect = Chat(cast(Tokenizer, FakeTokenizer()), logprobs=False, manner=manner)
    message: dict[str, Any] = {"id": "msg_1", "content": [], "stop_reason": None, "usage": {}}
    return Teller(message, dialect=dialect, **options)


def told(teller: Teller, pieces: Iterable[Piece]) -> list[Event]:
    choice, events = Choice(0), teller.begin(USAGE)
    for one in pieces:
        events += teller.tell(choice, one)
    return events + teller.end(USAGE)


def folded(events: list[Event]) -> list[dict[str, Any]]:
    """The content as a client knows it that adds up deltas. Checks the grammar on its way."""
    assert [event["type"] for event in events[:2]] == ["message_start", "ping"]
    assert events[0]["message"]["content"] == []
    assert [event["type"] for event in events[-2:]] == ["message_delta", "message_stop"]
    content: list[dict[str, Any]] = []
    is_open = False
    for event in events[2:-2]:
        match event["type"]:
            case "content_block_start":
                assert not is_open, "a block begins within another"
                assert event["index"] == len(content)
                content.append({**event["content_block"], "texts": []})
                is_open = True
            case "content_block_stop":
                assert is_open
                is_open = False
            case kind:
                assert kind == "content_block_delta"
                assert is_open, "a delta stands outside of its block"
                block, delta = content[-1], event["delta"]
                if delta["type"] == "signature_delta":
                    block["signature"] = delta["signature"]
                else:
                    kind, name, _ = _BLOCKS[block["type"]]
                    assert delta["type"] == kind
                    block["texts"].append(delta[name])
        assert event.get("index") == len(content) - 1
    assert not is_open
    return [_whole(block) for block in content]


def _whole(block: dict[str, Any]) -> dict[str, Any]:
    text = "".join(block.pop("texts"))
    name = _BLOCKS[block["type"]][2]
    return {**block, name: json.loads(text or "{}") if name == "input" else text}


def said(text: str, cuts: Iterable[int] = (), finish: FinishReason = STOP) -> list[Piece]:
    pieces = []
    for cut in cuts:
        pieces.append(piece(text[:cut]))
        text = text[cut:]
    return [*pieces, piece(text, finish=finish)]


def without_space(text: str | None) -> str:
    return "".join((text or "").split())


@given(
    parts=st.lists(st.sampled_from(["a", "hm", "</think>", "é", CALL, " \n", "<tool"]), max_size=8),
    cuts=st.lists(st.integers(1, 9), max_size=8),
    finish=st.sampled_from([STOP, LENGTH]),
)
def test_events_add_up_to_the_message(
    parts: list[str], cuts: list[int], finish: FinishReason
) -> None:
    text = "".join(parts)
    one, other = teller(), teller()
    events = told(one, said(text, cuts, finish))
    content = folded(events)
    assert content == one.message["content"], "who streams is told the same"
    ending = events[-2]
    for name, value in ending["delta"].items():
        assert one.message[name] == value
    assert one.message["usage"] == ending["usage"]
    # The same as a chat is told, whatever the cuts; but for space between the blocks.
    chat = Speech(THINKS).message(text)
    by_kind: dict[str, list[dict[str, Any]]] = {kind: [] for kind in _BLOCKS}
    for block in content:
        by_kind[block["type"]].append(block)
    thought = "".join(block["thinking"] for block in by_kind["thinking"])
    assert thought == (chat["reasoning_content"] or "")
    spoken = "".join(block["text"] for block in by_kind["text"])
    assert without_space(spoken) == without_space(chat["content"])
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in _calls(chat)]
    used = [(block["name"], block["input"]) for block in by_kind["tool_use"]]
    assert used == [(name, json.loads(arguments)) for name, arguments in calls]
    for block in by_kind["text"] if len(content) > 1 else ():
        assert block["text"].strip(), "the API takes no block of space alone back"
    told(other, said(text, (), finish))
    assert other.message["stop_reason"] == one.message["stop_reason"]


def _calls(chat: Mapping[str, Any]) -> list[dict[str, Any]]:
    return list(chat.get("tool_calls") or ())


def test_thoughts_text_and_calls_are_blocks_of_their_own() -> None:
    pieces = [piece("hm"), piece("</think>\n\nso: "), piece(CALL + "\n" + CALL, finish=STOP)]
    content = folded(told(teller(), pieces))
    assert [block["type"] for block in content] == ["thinking", "text", "tool_use", "tool_use"]
    assert content[1]["text"] == "\n\nso:"  # the parser of calls keeps no space before one
    assert content[2]["input"] == {"x": 1, "y": "é"}
    identities = {block["id"] for block in content[2:]}
    assert len(identities) == 2
    assert all(identity.startswith("toolu_") for identity in identities)


def test_a_thought_that_is_not_shown_has_a_signature_alone() -> None:
    shown, hidden = teller(), teller(shows_thoughts=False)
    pieces = [piece("hm, "), piece("so</think>a", finish=STOP)]
    told(shown, pieces)
    content = folded(told(hidden, pieces))
    assert content == hidden.message["content"]
    assert [block["type"] for block in content] == ["thinking", "text"]
    assert content[0]["thinking"] == ""
    assert content[0]["signature"] == shown.message["content"][0]["signature"] != ""


def test_tokens_of_thoughts_are_counted() -> None:
    teller_ = teller()
    told(teller_, [piece("hmm"), piece("m</think>"), piece("so", finish=STOP)])
    # The piece that ends the thought counts: nothing else has begun with it.
    assert teller_.message["usage"]["output_tokens_details"] == {"thinking_tokens": 12}
    assert teller_.message["usage"]["input_tokens"] == 5


@pytest.mark.parametrize(
    ("last", "window", "reason", "sequence"),
    [
        (piece("a", finish=STOP), False, "end_turn", None),
        (piece("a", finish=STOP), True, "end_turn", None),
        (piece("a", finish=STOP, stop_reason="\nEND"), False, "stop_sequence", "\nEND"),
        (piece("a", finish=STOP, stop_reason=7), False, "end_turn", None),
        (piece("a", finish=LENGTH), False, "max_tokens", None),
        (piece("a", finish=LENGTH), True, "model_context_window_exceeded", None),
        (piece(CALL, finish=STOP), False, "tool_use", None),
        (piece(CALL, finish=LENGTH), False, "max_tokens", None),
        (piece("", finish=STOP), False, "end_turn", None),
    ],
)
def test_why_it_ended(last: Piece, window: bool, reason: str, sequence: str | None) -> None:
    teller_ = teller(Manner(calls="hermes"), is_window_bound=window)
    events = told(teller_, [last])
    folded(events)
    assert teller_.message["stop_reason"] == reason
    assert teller_.message["stop_sequence"] == sequence
    assert events[-2]["delta"] == {"stop_reason": reason, "stop_sequence": sequence}


def test_a_call_that_is_cut_off_has_what_is_complete_of_it() -> None:
    text = '<tool_call>\n{"name": "f", "arguments": {"x": [1, 2], "y": "lo'
    teller_ = teller(Manner(calls="hermes"))
    told(teller_, said(text, (), LENGTH))
    (block,) = teller_.message["content"]
    assert block["input"] == {"x": [1, 2]}


@pytest.mark.parametrize("arguments", ["[1]", '"x"', "{'x': 1}", '{"x": NaN}'])
def test_arguments_that_are_no_object_are_none(arguments: str) -> None:
    text = f'<tool_call>\n{{"name": "f", "arguments": {arguments}}}\n</tool_call>'
    teller_ = teller(Manner(calls="hermes"))
    told(teller_, said(text))
    inputs = [b["input"] for b in teller_.message["content"] if b["type"] == "tool_use"]
    assert inputs in ([{}], [])


def test_space_alone_is_told_where_it_is_all_that_was_said() -> None:
    teller_ = teller(Manner())
    assert folded(told(teller_, said("\n", ()))) == [{"type": "text", "text": "\n"}]


def test_who_says_nothing_has_no_content() -> None:
    assert folded(told(teller(), [piece("", finish=STOP)])) == []


def test_a_cancelled_one_is_an_error() -> None:
    with pytest.raises(Cancelled):
        told(teller(), [piece("a", finish=FinishReason.CANCELLED)])
