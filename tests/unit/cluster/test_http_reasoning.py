"""Thoughts in chat completions: where they go, whole and streamed, and what a template is told."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.cluster.http.app import create_app
from pdserve.config import GatewayConfig, ReasoningStyle
from pdserve.messages import FinishReason
from tests.unit.cluster.asgi import Reply, post
from tests.unit.cluster.fake_session import FakeSession, said

CHAT = "/v1/chat/completions"
ASK = {"messages": [{"role": "user", "content": "hi"}]}


def asked(
    *texts: str,
    style: ReasoningStyle | None,
    finish: FinishReason = FinishReason.STOP,
    **fields: Any,
) -> Reply:
    session = FakeSession(said(*texts, finish=finish))
    app = create_app(session, config=GatewayConfig(reasoning_parser=style))
    return post(app, CHAT, ASK | fields)


def message(reply: Reply) -> tuple[str | None, str | None]:
    """(reasoning, content) of the only choice, whose two names for the first must agree."""
    told = reply.json()["choices"][0]["message"]
    assert told["reasoning_content"] == told["reasoning"]
    return told["reasoning"], told["content"]


def streamed(reply: Reply) -> tuple[str, str]:
    """The same, put together from the deltas."""
    reasoning = content = ""
    for event in reply.events():
        delta = event["choices"][0]["delta"]
        assert delta.get("reasoning_content") == delta.get("reasoning")
        reasoning += delta.get("reasoning", "")
        content += delta.get("content", "")
    return reasoning, content


def test_a_constrained_answer_has_no_thought() -> None:
    told = asked('{"a": 1}', style="deepseek_r1", response_format={"type": "json_object"})
    assert told.json()["choices"][0]["message"]["content"] == '{"a": 1}'


def test_a_thought_and_its_answer_are_told_apart() -> None:
    assert message(asked("<think>why</think>so", style="qwen3")) == ("why", "so")
    assert message(asked("why</think>so", style="deepseek_r1")) == ("why", "so")


def test_what_is_not_there_is_null() -> None:
    assert message(asked("so", style="qwen3")) == (None, "so")
    cut = asked("<think>why", style="qwen3", finish=FinishReason.LENGTH)
    assert message(cut) == ("why", None)


def test_without_a_parser_the_text_stays_as_it_is() -> None:
    told = asked("<think>why</think>so", style=None).json()["choices"][0]["message"]
    assert told == {"role": "assistant", "content": "<think>why</think>so", "refusal": None}


@settings(max_examples=20)
@given(cuts=st.lists(st.integers(0, 20), max_size=6).map(sorted))
def test_a_stream_says_the_same_wherever_its_pieces_end(cuts: list[int]) -> None:
    text = "<think>why</think>so"
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert streamed(asked(*pieces, style="qwen3", stream=True)) == ("why", "so")


def test_a_stream_that_ends_within_a_tag_keeps_its_beginning() -> None:
    cut = asked("<think>wh", "y</thi", style="qwen3", stream=True, finish=FinishReason.LENGTH)
    assert streamed(cut) == ("why</thi", "")
    last = cut.events()[-1]["choices"][0]
    assert last["finish_reason"] == "length"


def test_every_choice_has_its_own_thought() -> None:
    reply = asked("<think>a", "b</think>", "c", style="qwen3", stream=True, n=2)
    told: dict[int, str] = {0: "", 1: ""}
    for event in reply.events():
        (choice,) = event["choices"]
        told[choice["index"]] += choice["delta"].get("reasoning", "")
    assert told == {0: "ab", 1: "ab"}


def test_logprobs_come_for_tokens_whose_text_is_held_back() -> None:
    reply = asked("<thi", "nk>", "a", style="qwen3", stream=True, logprobs=True)
    scored = [event["choices"][0]["logprobs"] for event in reply.events()]
    assert sum(len(scores["content"]) for scores in scored if scores) == len("<think>a")


def test_the_template_is_told_whether_to_think() -> None:
    session = FakeSession()
    app = create_app(session, config=GatewayConfig(reasoning_parser="qwen3"))
    assert post(app, CHAT, ASK | {"chat_template_kwargs": {"enable_thinking": False}}).status == 200
    assert bytes(session.calls[0].prompt).endswith(b"assistant: enable_thinking=False")
    tokens = post(app, "/tokenize", ASK | {"chat_template_kwargs": {"enable_thinking": False}})
    assert tokens.json()["tokens"] == list(session.calls[0].prompt)


@pytest.mark.parametrize("path", [CHAT, "/tokenize"])
def test_arguments_that_are_no_object_are_refused(path: str) -> None:
    app = create_app(FakeSession(), config=GatewayConfig())
    reply = post(app, path, ASK | {"chat_template_kwargs": "no"})
    assert (reply.status, reply.error()["param"]) == (400, "chat_template_kwargs")
