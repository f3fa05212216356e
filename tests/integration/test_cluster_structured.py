"""Answers that a schema, a pattern or a list prescribes, through a whole cluster, by the SDK."""

import json
import re
from typing import Annotated, Any, Literal

import jsonschema
import openai
from pydantic import BaseModel, ConfigDict, Field

from tests.integration.harness import TestCluster


class Person(BaseModel):
    """Bounded throughout: an answer of any length would be cut by the token limit."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(max_length=20)]
    age: Annotated[int, Field(ge=0, le=150)]
    colours: Annotated[list[Literal["red", "blue"]], Field(max_length=3)]


ASK: Any = [{"role": "user", "content": "Tell me about Ann, who is 33, as JSON."}]
LIMITED = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "colour": {"enum": ["red", "blue", None]},
    },
    "required": ["name", "age", "colour"],
    "additionalProperties": False,
}


def _client(cluster: TestCluster) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="-", max_retries=0)


def test_the_sdk_parses_what_its_class_asks_for(real_cluster: TestCluster) -> None:
    client = _client(real_cluster)
    (served,) = client.models.list()
    answer = client.chat.completions.parse(
        model=served.id,
        messages=ASK,
        response_format=Person,
        max_tokens=200,
        temperature=0,
    )
    (choice,) = answer.choices
    assert choice.finish_reason == "stop"
    assert isinstance(choice.message.parsed, Person)
    jsonschema.validate(json.loads(choice.message.content or ""), Person.model_json_schema())


def test_drawn_and_streamed_answers_keep_to_it_too(real_cluster: TestCluster) -> None:
    stream = _client(real_cluster).chat.completions.create(
        model="",
        messages=ASK,
        n=3,
        seed=7,
        temperature=1.0,
        max_tokens=400,
        stream=True,
        extra_body={"structured_outputs": {"json": LIMITED}},
    )
    texts, finishes = [""] * 3, [""] * 3
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            finishes[choice.index] = choice.finish_reason or finishes[choice.index]
    assert finishes == ["stop"] * 3
    for text in texts:
        jsonschema.validate(json.loads(text), LIMITED)


def test_patterns_and_choices_of_completions(real_cluster: TestCluster) -> None:
    dated = real_cluster.complete("Today is", guided_regex=r"\d{4}-\d\d-\d\d", max_tokens=30)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", dated["choices"][0]["text"])
    chosen = real_cluster.complete("Is it?", guided_choice=["yes", "yellow"], max_tokens=30)
    assert chosen["choices"][0]["text"] in ("yes", "yellow")
    assert {answer["choices"][0]["finish_reason"] for answer in (dated, chosen)} == {"stop"}


def test_a_tool_is_called_and_its_result_read(cluster: TestCluster) -> None:
    """The loop of every agent: a call that follows the tool's schema, then an answer."""
    tool: Any = {"type": "function", "function": {"name": "look_up", "parameters": LIMITED}}
    client = _client(cluster)
    stream = client.chat.completions.create(
        model="",
        messages=ASK,
        tools=[tool],
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=0,
        max_tokens=400,
        stream=True,
    )
    call, finish = {"id": "", "name": "", "arguments": ""}, None
    for chunk in stream:
        (choice,) = chunk.choices
        finish = choice.finish_reason or finish
        for delta in choice.delta.tool_calls or ():
            assert delta.index == 0
            assert delta.function is not None
            call["id"] += delta.id or ""
            call["name"] += delta.function.name or ""
            call["arguments"] += delta.function.arguments or ""
    assert (call["name"], finish) == ("look_up", "tool_calls")
    jsonschema.validate(json.loads(call["arguments"]), LIMITED)
    function = {"name": call["name"], "arguments": call["arguments"]}
    asked = {"id": call["id"], "type": "function", "function": function}
    loop: Any = [
        *ASK,
        {"role": "assistant", "content": None, "tool_calls": [asked]},
        {"role": "tool", "tool_call_id": call["id"], "content": "She likes red."},
    ]
    answer = client.chat.completions.create(model="", messages=loop, tools=[tool], max_tokens=8)
    assert answer.choices[0].message.content
