"""An agent's loop: the model calls a function, reads what it gave, and answers."""

import json
import os
from typing import Any

import openai

TEMPERATURES = {"Oslo": -3, "Rome": 17}
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "temperature",
        "description": "The temperature in a city, in degrees Celsius.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": list(TEMPERATURES)}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def main() -> None:
    url = os.environ.get("PDSERVE_URL", "http://127.0.0.1:8000")
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="-")
    model = client.models.list().data[0].id
    messages: list[Any] = [{"role": "user", "content": "How warm is it in Oslo?"}]
    asked = client.chat.completions.create(
        model=model,
        messages=messages,
        tools=[TOOL],
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=0,
        max_tokens=400,
    ).choices[0]
    messages.append(asked.message.model_dump(exclude_none=True))
    for call in asked.message.tool_calls or ():
        assert call.type == "function"
        city = json.loads(call.function.arguments)["city"]
        print(f"{call.function.name}({city!r}) is {TEMPERATURES[city]}")
        result = json.dumps({"celsius": TEMPERATURES[city]})
        messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    answer = client.chat.completions.create(model=model, messages=messages, max_tokens=32)
    print(answer.choices[0].message.content)


if __name__ == "__main__":
    main()
