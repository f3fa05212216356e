"""The lines of a batch: what is asked, and how it was answered. Pure.

    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {…}}
                                    │
    {"id": "batch_req_…", "custom_id": "a", "response": {"status_code", "request_id", "body"},
     "error": null}

A file in which a line is no such object, or cannot be told from another, is refused as a whole,
with the numbers of its lines. What is wrong with a body is found by who answers it, and concerns
its own line alone.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pdserve.cluster.gateway.parameters import shown
from pdserve.cluster.http.bodies import parse_object
from pdserve.errors import PdserveError

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")

CUSTOM_ID_CHARACTERS_MAX = 512

PROBLEMS_MAX = 100
"""That a refused file is told; who mends those sees the others."""

EXPIRED_CODE = "batch_expired"
CANCELLED_CODE = "batch_cancelled"

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


@dataclass(frozen=True, slots=True)
class Line:
    custom_id: str
    body: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Problem:
    code: str
    message: str
    line: int | None = None  # from 1
    param: str | None = None

    def told(self) -> dict[str, Any]:
        """As OpenAI's ``BatchError``."""
        return {"code": self.code, "message": self.message, "line": self.line, "param": self.param}


def lines_of(data: bytes, *, endpoint: str, lines_max: int) -> tuple[list[Line], list[Problem]]:
    """The requests of a file, and why it cannot be a batch: one of them is empty."""
    lines: list[Line] = []
    problems: list[Problem] = []
    seen: dict[str, int] = {}
    for number, text in enumerate(data.split(b"\n"), 1):
        if not text.strip():
            continue
        if len(lines) + len(problems) >= lines_max:
            problems.append(
                Problem("too_many_requests", f"The file has more than {lines_max} requests", number)
            )
            break
        found = _line(text, number, endpoint)
        if isinstance(found, Line):
            first = seen.setdefault(found.custom_id, number)
            if first != number:
                told = f"The custom_id {shown(found.custom_id)} is that of line {first} too"
                found = Problem("duplicate_custom_id", told, number, "custom_id")
        if isinstance(found, Line):
            lines.append(found)
            continue
        problems.append(found)
        if len(problems) >= PROBLEMS_MAX:
            break
    if not lines and not problems:
        problems.append(Problem("empty_file", "The file has no requests"))
    return ([], problems) if problems else (lines, [])


def _line(text: bytes, number: int, endpoint: str) -> Line | Problem:
    def problem(code: str, message: str, param: str | None = None) -> Problem:
        return Problem(code, message, number, param)

    try:
        tree = parse_object(text.removeprefix(b"\xef\xbb\xbf") if number == 1 else text)
    except PdserveError as error:
        said = str(error).replace("the body", "This line")
        return problem("invalid_json_line", said)
    custom_id = tree.get("custom_id")
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= CUSTOM_ID_CHARACTERS_MAX:
        return problem(
            "missing_required_parameter" if custom_id is None else "invalid_custom_id",
            f"custom_id must be a text of 1 to {CUSTOM_ID_CHARACTERS_MAX} characters",
            "custom_id",
        )
    if tree.get("method") != "POST":
        return problem(
            "invalid_method", f"method is {shown(tree.get('method'))}, must be POST", "method"
        )
    if tree.get("url") != endpoint:
        said = f"url is {shown(tree.get('url'))}, must be {endpoint}, the endpoint of the batch"
        return problem(
            "invalid_url" if tree.get("url") not in ENDPOINTS else "mismatched_endpoint",
            said,
            "url",
        )
    if not isinstance(tree.get("body"), dict):
        return problem("missing_required_parameter", "body must be an object", "body")
    return Line(custom_id, tree["body"])


# ── answers ──────────────────────────────────────────────────────────────────────────────────────


def answered(line: Line, request: str, status: int, body: Mapping[str, Any]) -> bytes:
    """An answer, or an error that a client would have got in its place; by its status it belongs to
    the output or to the error file."""
    response = {"status_code": status, "request_id": request, "body": body}
    return _told(line, request, response=response, error=None)


def given_up(line: Line, request: str, code: str, message: str) -> bytes:
    """Of a line that nobody has answered, since the batch ended before."""
    return _told(line, request, response=None, error={"code": code, "message": message})


def is_good(answer: Mapping[str, Any]) -> bool:
    """Whether it belongs to the output; else it belongs to the error file."""
    response = answer["response"]
    return response is not None and 200 <= response["status_code"] < 300


@dataclass(frozen=True, slots=True)
class Written:
    """A batch's files, and what they sum up to. One that has no line is no file."""

    output: bytes
    errors: bytes
    completed: int
    failed: int
    has_expired: bool  # some line had no time
    usage: dict[str, Any]


def written(lines: Sequence[Line], answers: Mapping[int, bytes]) -> Written:
    """Every line once, in the order in which they were asked."""
    good: list[bytes] = []
    bad: list[bytes] = []
    spent = Usage()
    has_expired = False
    for number in range(len(lines)):
        data = answers[number]
        answer = json.loads(data)
        (good if is_good(answer) else bad).append(data)
        has_expired |= (answer["error"] or {}).get("code") == EXPIRED_CODE
        spent.add(answer)
    return Written(
        _file(good), _file(bad), len(good), len(bad), has_expired=has_expired, usage=spent.told()
    )


@dataclass(slots=True)
class Usage:
    """Of a batch, in the words of the responses API; the other APIs have others."""

    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0

    def add(self, answer: Mapping[str, Any]) -> None:
        response = answer["response"]
        used = (response["body"].get("usage") if response else None) or {}
        self.input_tokens += used.get("input_tokens", used.get("prompt_tokens", 0))
        self.output_tokens += used.get("output_tokens", used.get("completion_tokens", 0))
        given = used.get("input_tokens_details") or used.get("prompt_tokens_details") or {}
        made = used.get("output_tokens_details") or used.get("completion_tokens_details") or {}
        self.cached_tokens += given.get("cached_tokens") or 0
        self.reasoning_tokens += made.get("reasoning_tokens") or 0

    def told(self) -> dict[str, Any]:
        return {
            "input_tokens": self.input_tokens,
            "input_tokens_details": {"cached_tokens": self.cached_tokens},
            "output_tokens": self.output_tokens,
            "output_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
            "total_tokens": self.input_tokens + self.output_tokens,
        }


def _told(line: Line, request: str, **said: Any) -> bytes:
    return _encode({"id": request, "custom_id": line.custom_id, **said}).encode()


def _file(answers: Sequence[bytes]) -> bytes:
    return b"".join(answer + b"\n" for answer in answers)
