"""Tools in the prompt of a model whose chat template knows none. Pure.

Templates of models that were trained to call tools write them into the prompt themselves. For the
others they are written into the messages in Hermes' words, the most widespread ones: the tools
into the system message, calls into the assistant's text, results into the user's.

    https://github.com/NousResearch/Hermes-Function-Calling
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

_INSTRUCTIONS = """\
You may call one or more functions to assist with the user query. Here are their signatures, \
within <tools></tools> tags:
<tools>
{tools}
</tools>
For each function call, return a JSON object with its name and arguments, within \
<tool_call></tool_call> tags:
<tool_call>
{{"name": <function-name>, "arguments": <arguments-object>}}
</tool_call>"""


def has_tools(message: Mapping[str, Any]) -> bool:
    """Whether there is a call or a result in it."""
    return message["role"] == "tool" or bool(message.get("tool_calls"))


def written_out(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
) -> list[dict[str, Any]]:
    """The messages as text alone; ``content`` is a text in each of them."""
    written = [_written(message) for message in messages]
    if tools:
        shown = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        instructions = _INSTRUCTIONS.format(tools=shown)
        if written[0]["role"] == "system":
            written[0]["content"] = f"{written[0]['content']}\n\n{instructions}"
        else:
            written.insert(0, {"role": "system", "content": instructions})
    return written


def _written(message: Mapping[str, Any]) -> dict[str, Any]:
    if message["role"] == "tool":
        return {
            "role": "user",
            "content": f"<tool_response>\n{message['content']}\n</tool_response>",
        }
    calls = [
        json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls") or ()
    ]
    lines = [message["content"]] * bool(message["content"])
    lines += [f"<tool_call>\n{call}\n</tool_call>" for call in calls]
    return {"role": message["role"], "content": "\n".join(lines)}
