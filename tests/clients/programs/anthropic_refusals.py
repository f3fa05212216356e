"""What Anthropic's library raises where it is refused. The server ends a request with the error
whose name the system prompt says, at once or after a word. ``KEY`` is one that is let in."""

import json
import sys

import anthropic

URL, KEY, MODEL, *ERRORS = sys.argv[1:]
ASKED = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}


def raised(key: str, *, stream: bool = False, **fields: object) -> list[object]:
    """Class, type and code of the error, and whether it says when to come again."""
    client = anthropic.Anthropic(base_url=URL, api_key=key, max_retries=0)
    try:
        answer = client.messages.create(**ASKED | fields, stream=stream)
        if stream:
            list(answer)
    except anthropic.APIStatusError as error:
        waits = "retry-after" in error.response.headers
        return [type(error).__name__, error.type, error.error_code, waits]
    return []


print(
    json.dumps(
        {
            "no key": raised("wrong"),
            "by bearer": anthropic.Anthropic(base_url=URL, auth_token=KEY)
            .messages.create(**ASKED)
            .content[0]
            .text,
            "too large": raised(KEY, system="x" * 200_000),
            "errors": {name: raised(KEY, system=name) for name in ERRORS},
            "in mid stream": {
                name: raised(KEY, system=f"late {name}", stream=True) for name in ERRORS
            },
        }
    )
)
